"""The head of a request that the fast lane may take, pure: which bytes are such a head, and what they say.

Invariant: only what httptools itself reads as a plain `POST` with a known length to one of the two predict routes is
taken; whatever is odd (chunks, Expect, an upgrade, a query, escapes, HTTP/1.0, a coding) is left to uvicorn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import httptools

from raymill.actors.wire import ARROW_STREAM, MAX_BODY_BYTES

_BEGINNINGS = (b"POST /predict/", b"POST /v2/models/")
END = b"\r\n\r\n"
MAX_HEAD_BYTES = 16 << 10
"""HAProxy's own limit, as Serve sets it up."""
REQUEST_ID = "x-request-id"

_ODD = frozenset(
    {
        "transfer-encoding",
        "expect",
        "upgrade",
        "content-encoding",
        "x-request-timeout-seconds",  # Serve's own, which it must see
        "trailer",
        "te",
    }
)
_ASKING = frozenset({"inference-header-content-length", "x-raymill-version", "timeout"})
"""Headers that say something of what is asked."""
_LONGEST_ID = 128


@dataclass(frozen=True, slots=True)
class Head:
    """What the head of a request says."""

    model: str
    infer: bool
    """Whether it goes to `/v2/models/…/infer`."""
    version: str | None
    """Version in the path."""
    headers: Mapping[str, str]
    """Names in lower case; of several the last, as on the other lane."""
    length: int
    """Bytes of the body."""
    keep_alive: bool
    request_id: str | None
    """The caller's name for the request."""
    path: str
    """In its short form, for the books."""
    bare: bool
    """Whether body and model alone say what is asked, as `HttpCall.bare`."""

    @property
    def is_common(self) -> bool:
        """Whether another request may have the same one: it names neither itself nor a trace."""
        return self.request_id is None and "traceparent" not in self.headers


def may_begin(data: bytes) -> bool:
    """Whether the bytes, perhaps only the first few, can be a request for the fast lane."""
    return data.startswith(_BEGINNINGS) or any(begin.startswith(data) for begin in _BEGINNINGS)


def read_head(block: bytes) -> Head | None:
    """The head whose bytes end with an empty line; None: it is not for the fast lane."""
    found = _Collector()
    found.parser = parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(block)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    if found.said != (b"POST", "1.1", False) or found.body:
        return None
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in found.headers}
    length = headers.get("content-length", "")
    if _ODD & headers.keys() or not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY_BYTES:
        return None
    route = _route(found.url)
    request_id = headers.get(REQUEST_ID)
    if route is None or not (request_id is None or _is_plain(request_id)):
        return None
    model, infer, version = route
    path = f"/v2/models/{model}/infer" if infer else f"/predict/{model}"
    arrow = not infer and any(ARROW_STREAM in headers.get(name, "") for name in ("content-type", "accept"))
    bare = version is None and not arrow and not _ASKING & headers.keys()
    return Head(model, infer, version, headers, int(length), found.keep_alive, request_id, path, bare)


def _route(url: bytes) -> tuple[str, bool, str | None] | None:
    if not url.isascii() or not url.startswith(b"/") or any(c in url for c in (b"%", b"?", b"#")):
        return None
    match url.decode("ascii").strip("/").split("/"):
        case ["predict", model]:
            return model, False, None
        case ["v2", "models", model, "infer"]:
            return model, True, None
        case ["v2", "models", model, "versions", version, "infer"]:
            return model, True, version
    return None


def _is_plain(text: str) -> bool:
    return 0 < len(text) <= _LONGEST_ID and text.isascii() and text.isprintable()


class _Collector:
    """What httptools calls back with."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.parser: httptools.HttpRequestParser | None = None
        self.said: tuple[bytes, str, bool] | None = None
        """Method, version of HTTP, whether it wants another protocol."""
        self.keep_alive = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        # Where uvicorn asks, too: after an empty body the parser has forgotten.
        parser = self.parser
        if parser is not None:
            self.said = (parser.get_method(), parser.get_http_version(), parser.should_upgrade())
            self.keep_alive = parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self.body += body
