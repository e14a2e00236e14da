"""ASGI in and out: a request read whole within its limit, a reply sent, every error as `{error, code, remedy}`."""

from __future__ import annotations

import asyncio
import ipaddress
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any
from urllib.parse import parse_qsl

import orjson
import psutil

from raymill.actors.wire import MAX_BODY_BYTES
from raymill.runtime.errors import Overloaded, RaymillError, RequestError, TooLarge, WrongMethod

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

JSON = "application/json"
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


class GoneAway(Exception):
    """The caller closed the connection before its request was complete."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request, its body read."""

    method: str
    parts: tuple[str, ...]
    """Path, split at the slashes."""
    headers: Mapping[str, str]
    """Names in lower case."""
    query: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What is sent back."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


async def read(scope: Scope, receive: Receive) -> Request:
    """The whole request.

    Raises:
        TooLarge: the body is larger than `MAX_BODY_BYTES`; it is not read further.
        RequestError: its encoding is not understood.
        GoneAway: the caller left.
    """
    headers = headers_of(scope)
    if headers.get("content-encoding", "identity") != "identity":
        raise RequestError(f"content-encoding {headers['content-encoding']!r} is not understood: send the body plain")
    stated = headers.get("content-length", "")
    _check_size(int(stated) if stated.isascii() and stated.isdigit() else 0)
    message = await receive()
    body = message.get("body", b"")
    if message.get("more_body"):
        chunks, size = [body], len(body)
        while message.get("more_body"):
            message = await receive()
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            _check_size(size)
        body = b"".join(chunks)
    if message["type"] == "http.disconnect":
        raise GoneAway
    return Request(
        method=scope["method"],
        parts=parts_of(scope),
        headers=headers,
        query=dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)),
        body=bytes(body),
    )


def headers_of(scope: Scope) -> dict[str, str]:
    """Headers of a request, names in lower case; of several the last."""
    return {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}


def parts_of(scope: Scope) -> tuple[str, ...]:
    """The path of a request, split at its slashes."""
    return tuple(scope["path"].strip("/").split("/"))


def peer_of(scope: Scope) -> str:
    """Address of whoever connected; empty: unknown, or this host's own proxy.

    Of connections from loopback alone uvicorn takes the caller's address from `X-Forwarded-For`, with port 0.
    """
    host, port = scope.get("client") or ("", 0)
    return str(host) if port else ""


async def send_reply(send: Send, reply: Reply) -> None:
    """Send a reply in one piece."""
    headers = [
        (b"content-type", reply.content_type.encode()),
        (b"content-length", str(len(reply.body)).encode()),
        *((k.encode(), v.encode("latin-1")) for k, v in reply.headers.items()),
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


async def ask(app: Any, scope: Scope, body: bytes, left: asyncio.Event) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Have an application answer a request that is whole: status, headers and body.

    Args:
        app: of ASGI 3.
        scope: the request.
        body: its body.
        left: set when whoever asked goes away.

    Raises:
        RuntimeError: it ended without an answer.
    """
    begun: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    given = False

    async def receive() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        (begun if message["type"] == "http.response.start" else parts).append(message)

    await app(scope, receive, send)
    if not begun or not parts or parts[-1].get("more_body"):
        raise RuntimeError("the application gave no answer, or half of one")
    return begun[0]["status"], [*begun[0].get("headers", ())], b"".join([p.get("body", b"") for p in parts])


def json_reply(document: object, status: int = 200) -> Reply:
    """A reply of JSON."""
    return Reply(status, orjson.dumps(document, option=_OPTIONS))


def error_reply(error: RaymillError, status: int | None = None) -> Reply:
    """A reply that says what is wrong, under which name, and what to do."""
    cause = getattr(error, "cause", None)  # Ray wraps what an actor raised
    error = cause if isinstance(cause, RaymillError) else error
    if isinstance(error, Overloaded):
        return _come_again(error.message, error.retry_after_s)
    status = error.http_status if status is None else status
    body = orjson.dumps({"error": error.message, "code": error.code, "remedy": error.remedy})
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    if isinstance(error, WrongMethod):
        headers = {"allow": error.allow}
    return Reply(status, body, headers=headers)


@lru_cache(64)
def _come_again(message: str, seconds: int) -> Reply:
    """Kept: where more is asked than can be answered, most of the work is to say so."""
    error = Overloaded(message)
    body = orjson.dumps({"error": message, "code": error.code, "remedy": error.remedy})
    return Reply(error.http_status, body, headers={"retry-after": str(seconds)})


@lru_cache(1024)
def is_local(peer: str) -> bool:
    """Whether the peer is this host or the head's, where the proxy is (or unknown: a test, or a Unix socket)."""
    try:
        return not peer or ipaddress.ip_address(peer).is_loopback or peer in _own_addresses()
    except ValueError:
        return False


@cache
def _own_addresses() -> frozenset[str]:
    ray = sys.modules.get("ray")
    head = [ray.get_runtime_context().gcs_address.rpartition(":")[0]] if ray and ray.is_initialized() else []
    return frozenset([*head, *(a.address for found in psutil.net_if_addrs().values() for a in found)])


def _check_size(size: int) -> None:
    if size > MAX_BODY_BYTES:
        raise TooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes: split the rows over several requests")
