"""A call of `ModelInfer` as it is on HTTP/2, pure (gRPC's PROTOCOL-HTTP2.md): what is asked, and how it is answered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from raymill.actors import http2
from raymill.runtime.errors import RequestError

INFER = b"/inference.GRPCInferenceService/ModelInfer"
_KIND = b"application/grpc"
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])", re.ASCII)
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_PLAIN = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) != "%")
_BEGIN = http2.status_field(200) + http2.field(b"content-type", _KIND)
_MOST_WORDS = 1000
"""Letters of a message that says what is wrong: they go into a frame of headers."""
_OK = http2.field(b"grpc-status", b"0")


@dataclass(frozen=True, slots=True)
class GrpcHead:
    """What the headers of a call say."""

    headers: Mapping[str, str]
    """Names in lower case; of several the last."""
    timeout_s: float | None
    """For how long an answer is of use."""

    @property
    def path(self) -> str:
        """The method's name, for the books."""
        return "ModelInfer"

    @property
    def is_common(self) -> bool:
        """Whether another call may have the same one."""
        return self.timeout_s is None and "traceparent" not in self.headers


def read(fields: Sequence[tuple[bytes, bytes]]) -> GrpcHead | None:
    """The head of a `ModelInfer`; None: it is something else, or compressed."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in fields}
    is_one = headers.get(":method") == "POST" and headers.get(":path", "").encode("latin-1") == INFER
    if not is_one or not headers.get("content-type", "").encode("latin-1").startswith(_KIND):
        return None
    if headers.get("grpc-encoding", "identity") != "identity":
        return None
    timeout = _TIMEOUT.fullmatch(headers.get("grpc-timeout", ""))
    return GrpcHead(headers, int(timeout[1]) * _UNIT_S[timeout[2]] if timeout else None)


def message_of(body: bytes) -> bytes:
    """The one message that a call's data holds.

    Raises:
        RequestError: there is none, more than one, half of one, or it is compressed.
    """
    if len(body) < 5 or body[0] or int.from_bytes(body[1:5], "big") != len(body) - 5:
        raise RequestError("a call of ModelInfer is one whole message, not compressed")
    return body[5:]


def answer(message: bytes) -> tuple[bytes, bytes, bytes]:
    """Headers, data and trailers of a call that succeeded."""
    return _BEGIN, b"\0%b%b" % (len(message).to_bytes(4, "big"), message), _OK


def failure(code: int, words: str) -> tuple[bytes, bytes, bytes]:
    """The same of one that did not."""
    told = quote(words[:_MOST_WORDS], safe=_PLAIN).encode("ascii")
    return _BEGIN, b"", http2.field(b"grpc-status", b"%d" % code) + http2.field(b"grpc-message", told)
