"""Where callers wait while no replica runs: Serve's fallback proxy, to which HAProxy sends what no replica can take.

Serve's own proxy holds requests and wakes the endpoint for them. Here is what it does not do: it asks nobody for a key,
and words its errors in plain text. Calls over gRPC: `held_calls`.

Invariant: nobody wakes the endpoint who could not ask it; the door is asked first, as in a replica.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from raymill.actors import asgi
from raymill.actors.access import right_for
from raymill.actors.asgi import Reply, Scope
from raymill.actors.door import Door
from raymill.runtime.api_keys import KeyPolicy, Right
from raymill.runtime.errors import Expired, Overloaded, RaymillError, Unavailable

KEYS_VARIABLE = "RAYMILL_KEYS"
"""The session's `KeyPolicy`; absent: off. `up` sets it for the proxy, as the next three."""
GRPC_VARIABLE = "RAYMILL_GRPC_PORT"
"""Port at which callers reach gRPC: HAProxy's."""
HTTP_VARIABLE = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
"""Port of this proxy's own HTTP."""
HELD_VARIABLE = "RAYMILL_HELD_S"
"""For how many seconds a request is held."""
RETRY_AFTER_S = 5
"""What is told to those who can not wait: about the time that a replica takes to start."""
_ALIVE = asgi.json_reply({"live": True})
_SECONDS = re.compile(r"\d{1,6}(\.\d{1,6})?", re.ASCII)
_SHORTEST_S = 0.001
_SERVES = b"x-request-timeout-seconds"


class LazyDoor:
    """The replicas' door, opened when it is first needed: the proxy starts before the records do."""

    def __init__(self, door: Door) -> None:
        self._door, self._opened = door, False
        self._opening = asyncio.Lock()

    async def refusal(self, headers: Mapping[str, str], right: Right | None, is_local: bool) -> Reply | None:
        """As `Door.refusal`; where the records do not answer, nobody is let in."""
        if not self._opened:
            async with self._opening:
                try:
                    if not self._opened:
                        await asyncio.to_thread(self._door.start)
                        self._opened = True
                except RaymillError as err:
                    return asgi.error_reply(err)
        return self._door.refusal(headers, right, is_local)


class WaitingRoom:
    """Middleware of the proxy: asks for keys before a request may wait, and words what Serve answers by itself."""

    def __init__(self, app: Any, door: LazyDoor) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        reply = await self._reply(scope)
        if reply is None:
            patience = _patience(asgi.headers_of(scope))
            await self._app(_held_for(scope, patience), receive, _worded(send, patience))
        else:
            await asgi.send_reply(send, reply)

    async def _reply(self, scope: Scope) -> Reply | None:
        """What is answered here; None: the request may wait."""
        right = right_for(asgi.parts_of(scope))
        refusal = await self._door.refusal(
            asgi.headers_of(scope), right or Right.PREDICT, asgi.is_local(asgi.peer_of(scope))
        )
        if refusal is None or refusal.status != 401 or right is not None:
            return refusal
        return _page() if asgi.parts_of(scope) == ("docs",) else _ALIVE


@cache
def _page() -> Reply:
    from raymill.actors import openapi

    return Reply(200, openapi.page(), openapi.PAGE_TYPE, openapi.PAGE_HEADERS)


def _patience(headers: Mapping[str, str]) -> str | None:
    """Seconds that the caller waits (header `timeout`), where a request is held for longer; None: where it is not."""
    text = headers.get("timeout", "")
    is_shorter = _SECONDS.fullmatch(text) and float(text) < float(os.environ.get(HELD_VARIABLE, "inf"))
    return text if is_shorter else None  # what is no number the replica refuses


def _held_for(scope: Scope, patience: str | None) -> Scope:
    """The request as Serve is to hold it: it reads how long in a header of its own, 0 being for ever."""
    if patience is None:
        return scope
    seconds = str(max(float(patience), _SHORTEST_S)).encode()
    return {**scope, "headers": [*(h for h in scope["headers"] if h[0] != _SERVES), (_SERVES, seconds)]}


def _worded(send: asgi.Send, patience: str | None) -> asgi.Send:
    """Gives an error that is Serve's, in plain text, the form of ours; everything else passes."""
    mine: list[Reply] = []

    async def worded(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply = _reply_for(message["status"], dict(message.get("headers", ())), patience)
            if reply is not None:
                mine.append(reply)
                await asgi.send_reply(send, reply)
        if not mine:
            await send(message)

    return worded


def _reply_for(status: int, headers: Mapping[bytes, bytes], patience: str | None) -> Reply | None:
    if status not in (408, 429, 503) or headers.get(b"content-type", b"").startswith(b"application/json"):
        return None
    if status == 408 and patience is not None:
        return asgi.error_reply(Expired(f"no replica was ready within the request's timeout of {patience} s"))
    error: RaymillError = Unavailable("no replica was ready in the time for which a request is held")
    if status == 429:
        error = Overloaded("no replica runs, and as many requests as may wait for the first one do")
    elif status == 503:
        error = Unavailable("no replica can be started: `raymill status` says why")
    reply = asgi.error_reply(error, status)
    return Reply(status, reply.body, headers={"retry-after": str(RETRY_AFTER_S)})


def middlewares() -> list[Any]:
    """What Serve puts before its HTTP servers, by import path: the waiting room in a proxy, nothing in a replica."""
    import ray
    from starlette.middleware import Middleware

    name = ray.get_runtime_context().get_actor_name() or ""
    return [Middleware(WaitingRoom, door=own_door())] if name.startswith("SERVE_PROXY_ACTOR") else []


@cache
def own_door() -> LazyDoor:
    """The door of this process."""
    from raymill.runtime.records import RemoteRecords

    return LazyDoor(Door(KeyPolicy(os.environ.get(KEYS_VARIABLE, KeyPolicy.OFF)), RemoteRecords(patience_s=5.0)))
