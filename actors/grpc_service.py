"""gRPC of the Open Inference Protocol, answered in the replica, by the gRPC server that Serve starts there.

Serve's proxy (HAProxy) sends the calls to the replicas' own gRPC servers and asks `add_to_server` for what they offer.
There it is registered as a service that the server itself executes, not as one that Serve turns into calls of a
deployment; what Serve would have counted is counted for it.

Invariants
- A call gets the answer that the same tensor gets over HTTP: both go through `Service.submit`.
- A caller who connects from another host is refused: Serve lets replicas listen on every interface.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol
from urllib.parse import unquote

import grpc
import orjson
from google.protobuf.message import DecodeError

from raymill.actors import asgi, oip_grpc
from raymill.actors.answering import Call, version_of
from raymill.actors.asgi import Reply
from raymill.actors.door import PROXY_ALONE, Door
from raymill.actors.fast_server import Accounts, NoAccounts
from raymill.actors.fastlane import PIPELINED
from raymill.actors.held_calls import HeldCalls
from raymill.actors.lane import Ticket
from raymill.actors.model_set import ModelSet
from raymill.actors.open_inference_pb2 import (
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ModelStreamInferResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerReadyRequest,
    ServerReadyResponse,
)
from raymill.actors.serve_accounts import GONE, ServeAccounts, open_access_log
from raymill.actors.waiting_room import GRPC_VARIABLE, HELD_VARIABLE, HTTP_VARIABLE, own_door
from raymill.runtime.api_keys import Right
from raymill.runtime.errors import RaymillError, RequestError, Unavailable

_log = logging.getLogger(__name__)

SERVICE = "inference.GRPCInferenceService"

_CODES = {
    200: grpc.StatusCode.OK,
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.UNAVAILABLE,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    GONE: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
Context = Any  # grpc.aio.ServicerContext, which has no types


class Service(Protocol):
    """What answers: the serving replica."""

    door: Door
    traces: Any

    @property
    def models(self) -> ModelSet:
        """What is served."""

    def submit(self, call: Call, done: Callable[[Reply], None]) -> Ticket | None:
        """Have a call answered; `done` gets the reply on the event loop, perhaps before this returns."""


_NO_TRACE: Mapping[str, str] = {}
_here: list[Service] = []
_books: list[Accounts] = []


def answer_with(service: Service) -> None:
    """Have this process's gRPC server answer with that replica; the newest counts."""
    _here[:] = [service]


def books() -> Accounts:
    """Where this process's calls of `ModelInfer` are counted."""
    return _books[0] if _books else NoAccounts()


def add_to_server(_: Any, server: Any) -> None:
    """Offer the service on a gRPC server of Serve's (`grpc_servicer_functions`)."""
    if hasattr(server, "add_passthrough_service"):
        server.add_passthrough_service(SERVICE)
    _books[:] = [_accounts(server)]
    methods = _Methods(_books[0], _held_calls(server))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods.handlers()),))


class _Methods:
    """The seven methods."""

    def __init__(self, accounts: Accounts, held: HeldCalls | None) -> None:
        """`held`: where calls wait for a replica, in a process that is none."""
        self._accounts, self._held = accounts, held

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """By name; `ModelInfer` gets and gives bytes."""
        unary = grpc.unary_unary_rpc_method_handler
        simple: dict[str, tuple[Callable[[Any], Any], type[Any]]] = {
            "ServerLive": (lambda _: ServerLiveResponse(live=True), ServerLiveRequest),
            "ServerReady": (lambda _: ServerReadyResponse(ready=_service().models.is_ready), ServerReadyRequest),
            "ServerMetadata": (lambda _: oip_grpc.server_metadata(), ServerMetadataRequest),
            "ModelReady": (_model_ready, ModelReadyRequest),
            "ModelMetadata": (_model_metadata, ModelMetadataRequest),
        }
        found = {
            name: unary(
                self._asked(name, answer, kind),
            )
            for name, (answer, kind) in simple.items()
        }
        found["ModelInfer"] = unary(self.infer)
        found["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self.stream)
        return found

    def _asked(self, name: str, answer: Callable[[Any], Any], kind: type[Any]) -> Callable[[bytes, Context], Any]:
        """A method that knows its answer at once."""
        right = None if name == "ServerLive" else Right.PREDICT

        async def method(request: bytes, context: Context) -> bytes:
            if right is not None and self._waits:
                return await self._wait(name, request, context)
            refusal = _refused(context, right)
            try:
                if refusal is None:
                    return _bytes(answer(kind.FromString(request)))
            except DecodeError as err:
                refusal = asgi.error_reply(RequestError(f"the message is no {kind.__name__} ({err})"))
            except RaymillError as err:
                refusal = asgi.error_reply(err)
            return await _abort(context, refusal)

        return method

    @property
    def _waits(self) -> bool:
        return self._held is not None and not _here

    async def _wait(self, name: str, request: bytes, context: Context) -> bytes:
        assert self._held is not None
        return await self._held.unary(_path(name), request, context, Right.PREDICT, _is_local(context.peer()))

    async def infer(self, request: bytes, context: Context) -> bytes:
        """`ModelInfer`: a message in, a message out."""
        if self._waits:
            return await self._wait("ModelInfer", request, context)
        refusal = _refused(context)
        reply = refusal if refusal is not None else await self._answer(request, _trace_of(context))
        return reply.body if reply.status == 200 else await _abort(context, reply)

    async def stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """`ModelStreamInfer`: answers in the order of the requests, of which `PIPELINED` may be under way."""
        if self._waits:
            assert self._held is not None
            paths, is_local = (_path("ModelStreamInfer"), _path("ServerReady")), _is_local(context.peer())
            async for answer in self._held.stream(*paths, requests, context, Right.PREDICT, is_local):
                yield answer
            return
        refusal = _refused(context)
        if refusal is not None:
            await _abort(context, refusal)
        under_way: deque[asyncio.Task[Reply]] = deque()
        trace = _trace_of(context)
        try:
            async for request in requests:
                under_way.append(asyncio.ensure_future(self._answer(request, trace)))
                while under_way and (len(under_way) > PIPELINED or under_way[0].done()):
                    yield _streamed(await under_way.popleft())
            while under_way:
                yield _streamed(await under_way.popleft())
        finally:
            for task in under_way:
                task.cancel()

    async def _answer(self, request: bytes, trace: Mapping[str, str]) -> Reply:
        """The reply; a caller who leaves is not computed for."""
        begun, status = time.perf_counter(), GONE
        self._accounts.begin()
        ticket: Ticket | None = None
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        try:
            ticket = _submit(request, trace, lambda reply: None if future.done() else future.set_result(reply))
            reply = await future
            status = reply.status
            return reply
        finally:
            if ticket is not None:
                ticket.left = True
            self._accounts.end(status, time.perf_counter() - begun, "", "ModelInfer")


def _submit(request: bytes, trace: Mapping[str, str], done: Callable[[Reply], None]) -> Ticket | None:
    try:
        return _service().submit(oip_grpc.GrpcCall.of(request, trace), done)
    except RaymillError as err:
        done(asgi.error_reply(err))
        return None


def _service() -> Service:
    if not _here:
        raise Unavailable("gRPC is answered by replicas that have started, and this process has none")
    return _here[0]


def _model_ready(request: ModelReadyRequest) -> ModelReadyResponse:
    model = _service().models.with_version(request.name, request.version or None)
    return ModelReadyResponse(ready=model.is_ready(version_of(request.version or None)))


def _model_metadata(request: ModelMetadataRequest) -> ModelMetadataResponse:
    model = _service().models.with_version(request.name, request.version or None)
    return oip_grpc.model_metadata(model.spec, sorted(model.programs))


async def _abort(context: Context, reply: Reply) -> bytes:
    await context.abort(code_of(reply.status), words_of(reply))
    raise AssertionError("abort raises")


def _path(method: str) -> str:
    return f"/{SERVICE}/{method}"


def _streamed(reply: Reply) -> bytes:
    if reply.status == 200:
        return _bytes(ModelStreamInferResponse(infer_response=ModelInferResponse.FromString(reply.body)))
    return _bytes(ModelStreamInferResponse(error_message=words_of(reply)))


def code_of(status: int) -> grpc.StatusCode:
    """The code that stands for a reply's status."""
    return _CODES.get(status, grpc.StatusCode.INTERNAL)


def words_of(reply: Reply) -> str:
    """What a caller is told by a reply that refuses."""
    told = orjson.loads(reply.body)
    return f"{told['error']} ({told['remedy']})"


def _trace_of(context: Context) -> Mapping[str, str]:
    """The metadata that say which trace a call belongs to, where requests are traced."""
    if not _here or _here[0].traces is None:
        return _NO_TRACE
    return {key: text for key, text in context.invocation_metadata() or () if key in ("traceparent", "tracestate")}


def _refused(context: Context, right: Right | None = Right.PREDICT) -> Reply | None:
    if not _here:
        return None if _is_local(context.peer()) else PROXY_ALONE
    headers = {key: text for key, text in context.invocation_metadata() or () if isinstance(text, str)}
    return _here[0].door.refusal(headers, right, _is_local(context.peer()))


@lru_cache(1024)
def _is_local(peer: str) -> bool:
    """Whether `ipv4:127.0.0.1:5000`, `ipv6:[::1]:5000` or `unix:…` is of this host."""
    kind, _, rest = peer.partition(":")
    return kind == "unix" or asgi.is_local(unquote(rest).rpartition(":")[0].strip("[]"))


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _held_calls(server: Any) -> HeldCalls | None:
    """Where calls wait, if this is the server of Serve's fallback proxy."""
    owner = getattr(getattr(server, "service_handler_factory", None), "__self__", None)
    if owner is None or hasattr(owner, "_metrics_manager") or GRPC_VARIABLE not in os.environ:
        return None
    ports = {"http_port": int(os.environ[HTTP_VARIABLE]), "grpc_port": int(os.environ[GRPC_VARIABLE])}
    return HeldCalls(own_door(), _abort, held_s=float(os.environ[HELD_VARIABLE]), **ports)


def _accounts(server: Any) -> Accounts:
    """Books of the Serve replica whose server this is; of a proxy's or another's: none."""
    replica = getattr(getattr(server, "service_handler_factory", None), "__self__", None)
    if not hasattr(replica, "_metrics_manager"):
        return NoAccounts()
    open_access_log()
    try:
        return ServeAccounts(replica, f"/{SERVICE}/ModelInfer", lambda status: code_of(status).name)
    except Exception as err:  # noqa: BLE001 - Serve's insides: the calls are answered, and the log says what is not counted
        _log.warning("gRPC calls are not counted for Serve: %s: %s", type(err).__name__, err)
        return NoAccounts()
