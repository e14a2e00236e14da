"""Calls over gRPC that come while no replica runs: they wait in Serve's fallback proxy, as requests over HTTP do.

Serve's proxy would wake the endpoint for services that it turns into calls of a deployment; ours is executed where the
call arrives. So the first call that waits asks the endpoint over HTTP whether it is ready, which Serve holds until a
replica runs; then all are passed on to HAProxy, again and again until it has heard of that replica.

Invariants
- Nobody wakes the endpoint who could not ask it.
- A call is passed on whole, with its metadata and deadline, and never waits here twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
import httpx

from raymill.actors import asgi
from raymill.actors.asgi import Reply
from raymill.actors.waiting_room import RETRY_AFTER_S, LazyDoor
from raymill.runtime.api_keys import Right
from raymill.runtime.errors import Overloaded, Unavailable

PASSED = "x-raymill-waited"
"""Metadata of a call that has waited: should it come back, it is told at once that no replica runs."""
MOST = 4096
"""Calls that wait at once."""
_PAUSE_S = 0.1
"""Between two looks whether HAProxy has heard of the replica that runs."""
_KEPT_OUT = ("content-type", "te", "user-agent", PASSED)
Refuse = Callable[[Any, Reply], Awaitable[Any]]


class HeldCalls:
    """Calls that wait in this process; counted by `waiting`."""

    def __init__(self, door: LazyDoor, refuse: Refuse, *, http_port: int, grpc_port: int, held_s: float) -> None:
        """`refuse` ends a call with a reply's status and words."""
        self._door, self._refuse, self._held_s = door, refuse, held_s
        self._wake_url = f"http://127.0.0.1:{http_port}/v2/health/ready"
        self._target = f"127.0.0.1:{grpc_port}"
        self._channel: Any = None
        self._waking: asyncio.Task[Reply | None] | None = None
        self.waiting = 0

    async def unary(self, method: str, message: bytes, context: Any, right: Right | None, is_local: bool) -> bytes:
        """The answer of a replica to a call of one message."""
        metadata, end = await self._admitted(context, right, is_local)
        try:
            while True:
                try:
                    answer: bytes = await self._calls.unary_unary(method)(
                        message, metadata=metadata, timeout=max(end - time.monotonic(), 0.0)
                    )
                    return answer
                except grpc.aio.AioRpcError as err:
                    if err.code() is not grpc.StatusCode.UNAVAILABLE or end - time.monotonic() < _PAUSE_S:
                        await context.abort(err.code(), err.details() or "")
                await asyncio.sleep(_PAUSE_S)
        finally:
            self.waiting -= 1

    async def stream(
        self, method: str, ready: str, messages: AsyncIterator[bytes], context: Any, right: Right, is_local: bool
    ) -> AsyncIterator[bytes]:
        """A replica's answers to a stream, which is passed on once the method `ready` is answered."""
        await self.unary(ready, b"", context, right, is_local)
        call = self._calls.stream_stream(method)(messages, metadata=_metadata(context))
        try:
            async for answer in call:
                yield answer
        except grpc.aio.AioRpcError as err:
            await context.abort(err.code(), err.details() or "")
        finally:
            call.cancel()  # the caller may have left

    @property
    def _calls(self) -> Any:
        if self._channel is None:  # made on the server's loop
            self._channel = grpc.aio.insecure_channel(self._target, options=(("grpc.max_receive_message_length", -1),))
        return self._channel

    async def _admitted(
        self, context: Any, right: Right | None, is_local: bool
    ) -> tuple[tuple[tuple[str, str | bytes], ...], float]:
        """The call's metadata and the moment until which it may wait, once a replica runs; counted as waiting."""
        end = time.monotonic() + min(self._held_s, context.time_remaining() or self._held_s)
        headers = {key: text for key, text in context.invocation_metadata() or () if isinstance(text, str)}
        if PASSED in headers:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no replica that answers gRPC is known to the proxy yet")
        refusal = await self._door.refusal(headers, right, is_local)
        if refusal is None and self.waiting >= MOST:
            refusal = asgi.error_reply(Overloaded(f"no replica runs, and {MOST} calls wait for the first one"))
        if refusal is not None:
            await self._refuse(context, refusal)
        self.waiting += 1
        try:
            refusal = await self._woken(headers)
            if refusal is not None:
                await self._refuse(context, refusal)
        except BaseException:  # the caller has gone, too
            self.waiting -= 1
            raise
        return _metadata(context), end

    async def _woken(self, headers: Mapping[str, str]) -> Reply | None:
        """Wait for a replica, all callers together; what to answer if none comes."""
        if self._waking is None or self._waking.done():
            sent = {k: v for k, v in headers.items() if k in ("authorization", "x-forwarded-for", "forwarded")}
            self._waking = asyncio.get_running_loop().create_task(self._wake(sent))
        return await asyncio.shield(self._waking)

    async def _wake(self, headers: Mapping[str, str]) -> Reply | None:
        try:
            async with httpx.AsyncClient(timeout=self._held_s + 5, trust_env=False) as client:
                answer = await client.get(self._wake_url, headers=dict(headers))
        except httpx.HTTPError as err:
            return asgi.error_reply(Unavailable(f"the endpoint could not be woken ({type(err).__name__}: {err})"))
        serves_own = answer.headers.get("retry-after") == str(RETRY_AFTER_S)  # not a replica's, which runs
        return Reply(answer.status_code, answer.content) if serves_own or answer.status_code in (401, 403) else None


def _metadata(context: Any) -> tuple[tuple[str, str | bytes], ...]:
    """A call's metadata as they are passed on."""
    told = ((str(k), v) for k, v in context.invocation_metadata() or ())
    return (*((k, v) for k, v in told if k not in _KEPT_OUT and not k.startswith((":", "grpc-"))), (PASSED, "1"))
