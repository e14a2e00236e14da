"""The fast lane for the proxy: small requests to predict, and gRPC's, as streams of a few HTTP/2 connections.

Over HTTP/1.1 each request under way has a connection of its own, so proxy and replica read, write and wake each other
once a request. Here whatever comes together is read at once, and the replies to a batch are written together. The
proxy sends its small requests to predict this way and all else by HTTP/1.1 (`cluster/serve_proxy.py`). Calls of
`ModelInfer` come this way, too, past the gRPC server of the replica, which takes more time for a call than a model.

Invariants
- A stream is answered as the same request is over HTTP/1.1, or the same call by the gRPC server; what is odd goes to
  the ASGI application, as over HTTP/1.1.
- What a stream holds is bounded: bytes of a head, of a body, streams under way.
- Whoever comes this way is of this host, or the proxy (`FastLane` sees to it); who breaks the protocol is logged, and
  the connection ends. The proxy sends again what was under way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from raymill.actors import asgi, grpc_heads, grpc_service, http2
from raymill.actors.answering import failure
from raymill.actors.asgi import Reply
from raymill.actors.fast_server import MAX_BLOCK_BYTES, Accounts, Fast
from raymill.actors.grpc_heads import GrpcHead
from raymill.actors.http2 import Malformed
from raymill.actors.http_head import Head
from raymill.actors.lane import Ticket
from raymill.actors.oip_grpc import GrpcCall
from raymill.actors.serve_accounts import GONE
from raymill.actors.stream_replies import Replies
from raymill.actors.wire import MAX_BODY_BYTES
from raymill.runtime.api_keys import Right
from raymill.runtime.errors import RaymillError, TooLarge

_log = logging.getLogger(__name__)

MOST_STREAMS = 1024
"""Under way on one connection. HAProxy opens a hundred, and then another connection."""
MOST_BODY_BYTES = 32 << 10
"""Of a request over HTTP: half of the window that a stream has, so that none waits for more."""
MOST_MESSAGE_BYTES = MAX_BODY_BYTES + 5
"""Of a gRPC call."""
_CREDIT_BYTES = 1 << 20
"""After so many the proxy is told that it may send as many again."""


class _Asked:
    """A request under way."""

    __slots__ = (
        "_connection",
        "accounts",
        "block",
        "head",
        "left",
        "parts",
        "request_id",
        "since",
        "size",
        "stream",
        "ticket",
    )

    def __init__(self, connection: Streams, stream: int, block: bytes, head: Head | GrpcHead | None) -> None:
        self._connection, self.stream, self.block, self.head = connection, stream, block, head
        self.accounts: Accounts | None = None
        """Where it was counted when it began."""
        self.parts: list[bytes] = []
        self.size = 0
        self.request_id = ""
        self.since = 0.0
        """When it was whole; 0: it is not."""
        self.ticket: Ticket | None = None
        self.left: asyncio.Event | None = None
        """Tells the ASGI application, if it is asked, that the caller has gone."""

    def answered(self, reply: Reply) -> None:
        """The reply is there."""
        self.ticket = None  # as `fastlane._Due` does
        self._connection.reply(self, reply)


class Streams(asyncio.Protocol):
    """One connection."""

    _replies: Replies

    def __init__(self, fast: Fast, arguments: Mapping[str, Any]) -> None:
        """`arguments` are those with which uvicorn makes a connection's protocol."""
        self._fast, self._app = fast, arguments["config"].loaded_app
        self._server, self._state = arguments["server_state"], arguments["app_state"]
        self._held = b""
        self._greeted = False
        self._last = 0
        """The stream that was opened last."""
        self._begun: tuple[int, int, bytes] | None = None
        """Stream, flags and bytes of a header block that goes on."""
        self._streams: dict[int, _Asked] = {}
        self._came = 0
        """Bytes of data since the proxy was told that it may send more."""
        self._tasks: set[asyncio.Task[None]] = set()

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._replies = Replies(transport, lambda: bool(self._streams))
        self._server.connections.add(self)
        transport.write(
            http2.settings(header_table_size=0, max_concurrent_streams=MOST_STREAMS)
            + http2.frame(http2.WINDOW_UPDATE, 0, 0, (http2.MAX_WINDOW - http2.FIRST_WINDOW).to_bytes(4, "big"))
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._replies.lost()
        for stream in list(self._streams):
            self._forget(stream)

    def data_received(self, data: bytes) -> None:
        if self._held:
            data, self._held = self._held + data, b""
        try:
            self._held = data[self._read(data) :]
        except Malformed as err:
            _log.error("a connection of HTTP/2 is closed: %s", err)
            self._replies.write(http2.goaway(self._last, err.code, str(err)))
            self._replies.flush()
            self._transport.close()

    def shutdown(self) -> None:
        """The server stops: what was asked is answered, and the proxy is told to ask nothing more here."""
        self._replies.retire()

    # Frames

    def _read(self, data: bytes) -> int:
        """Frames from the front of what came, as far as they are whole; where the next one begins."""
        at, end = 0, len(data)
        if not self._greeted:
            if not http2.PREFACE.startswith(data[: len(http2.PREFACE)]):
                raise Malformed("it does not begin as HTTP/2 does")
            if end < len(http2.PREFACE):
                return 0
            self._greeted, at = True, len(http2.PREFACE)
        while end - at >= http2.FRAME_HEAD.size and not self._transport.is_closing():
            upper, lower, kind, flags, stream = http2.FRAME_HEAD.unpack_from(data, at)
            begin = at + http2.FRAME_HEAD.size
            until = begin + (upper << 8 | lower)
            if until - begin > http2.MAX_FRAME_BYTES:
                raise Malformed("a frame larger than was agreed on", http2.FRAME_SIZE_ERROR)
            if until > end:
                break
            at = until
            if self._begun is not None and kind != http2.CONTINUATION:
                raise Malformed("a header block that is not continued")
            if kind == http2.DATA:
                self._data(stream, flags, data[begin:until])
            elif kind == http2.HEADERS:
                self._headers(stream, flags, data[begin:until])
            else:
                self._other(kind, flags, stream & http2.MAX_STREAM, data[begin:until])
        if self._came >= _CREDIT_BYTES:
            self._replies.write(http2.frame(http2.WINDOW_UPDATE, 0, 0, self._came.to_bytes(4, "big")))
            self._came = 0
        return at

    def _headers(self, stream: int, flags: int, payload: bytes) -> None:
        if flags & (http2.PADDED | http2.WITH_PRIORITY):
            payload = http2.unpadded(flags, payload)
        if not flags & http2.END_HEADERS:
            self._begun = stream, flags, payload
            return
        asked = self._streams.get(stream)
        if asked is not None:  # trailers: they say nothing here
            if asked.since or not flags & http2.END_STREAM:
                raise Malformed(f"headers in the middle of stream {stream}, or after its end")
            http2.read_block(payload, MAX_BLOCK_BYTES)
            self._call(asked, b"".join(asked.parts))
            return
        if stream <= self._last or not stream & 1:
            raise Malformed(f"stream {stream} after {self._last}")
        self._last = stream
        if len(self._streams) >= MOST_STREAMS:
            self._reset(stream, http2.REFUSED_STREAM)
            return
        head = self._fast.head_of_stream(payload)
        self._streams[stream] = asked = _Asked(self, stream, payload, head)
        refusal = None
        if isinstance(head, GrpcHead):  # its message may be large, and whose is refused is not kept
            refusal = self._fast.refusal(head.headers, Right.PREDICT, True)
        if refusal is not None:
            self.reply(asked, refusal)
        elif flags & http2.END_STREAM:
            self._call(asked, b"")

    def _data(self, stream: int, flags: int, payload: bytes) -> None:
        self._came += len(payload)
        if flags & http2.PADDED:
            payload = http2.unpadded(http2.PADDED, payload)
        asked = self._streams.get(stream)
        if asked is None or asked.since:
            if not 0 < stream <= self._last:
                raise Malformed(f"data of stream {stream}, which was not opened")
            return  # of one that was reset, or answered before its end
        asked.size += len(payload)
        most = MOST_MESSAGE_BYTES if isinstance(asked.head, GrpcHead) else MOST_BODY_BYTES
        if asked.size > most:
            error = TooLarge(f"there are more than {most} bytes: split the rows over several requests")
            self.reply(asked, asgi.error_reply(error))
            self._reset(stream, http2.NO_ERROR)
        elif not flags & http2.END_STREAM:
            asked.parts.append(payload)
            if asked.size > MOST_BODY_BYTES:  # else it has not used up half of its window
                self._replies.write(http2.frame(http2.WINDOW_UPDATE, 0, stream, len(payload).to_bytes(4, "big")))
        else:
            self._call(asked, b"".join((*asked.parts, payload)) if asked.parts else payload)

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == http2.WINDOW_UPDATE:
            self._replies.take_more(stream, http2.number(payload))
        elif kind == http2.RST_STREAM:
            http2.number(payload)
            self._forget(stream)
        elif kind == http2.CONTINUATION:
            self._continue(stream, flags, payload)
        elif kind == http2.SETTINGS and not flags & http2.ACK:
            window = http2.read_settings(payload).get(http2.INITIAL_WINDOW_SIZE)
            self._replies.write(http2.frame(http2.SETTINGS, http2.ACK, 0))
            if window is not None:
                self._replies.set_window(window)
        elif kind == http2.PING and flags & http2.ACK:
            self._replies.known()
        elif kind == http2.PING:
            self._replies.write(http2.frame(http2.PING, http2.ACK, 0, payload))
        elif kind == http2.PUSH_PROMISE:
            raise Malformed("a push from a client")

    def _continue(self, stream: int, flags: int, payload: bytes) -> None:
        if self._begun is None or self._begun[0] != stream:
            raise Malformed("a header block goes on that did not begin")
        _, begun, before = self._begun
        if len(before) + len(payload) > MAX_BLOCK_BYTES:
            raise Malformed("a header block without end")
        self._begun = None
        self._headers(stream, begun & http2.END_STREAM | flags & http2.END_HEADERS, before + payload)

    def _reset(self, stream: int, code: int) -> None:
        self._replies.write(http2.frame(http2.RST_STREAM, 0, stream, code.to_bytes(4, "big")))

    def _forget(self, stream: int) -> None:
        """Whoever asked has gone."""
        asked = self._streams.pop(stream, None)
        if asked is not None:
            if asked.ticket is not None:
                asked.ticket.left = True
            if asked.left is not None:
                asked.left.set()
            self._count(asked, GONE)
        self._replies.forget(stream)

    # Requests and replies

    def _call(self, asked: _Asked, body: bytes) -> None:
        head, fast = asked.head, self._fast
        asked.since = time.perf_counter()
        if head is None:
            asked.left = asyncio.Event()
            task = asyncio.get_running_loop().create_task(self._by_application(asked, body, asked.left))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(head, GrpcHead):
            self._infer(asked, head, body)
        elif head.length != len(body):
            del self._streams[asked.stream]
            self._reset(asked.stream, http2.PROTOCOL_ERROR)
        else:
            asked.request_id = head.request_id or fast.new_request_id()
            asked.accounts = fast.accounts
            ticket = fast.call(head, body, True, asked.answered)
            if asked.stream in self._streams:
                asked.ticket = ticket

    def _infer(self, asked: _Asked, head: GrpcHead, body: bytes) -> None:
        asked.accounts = grpc_service.books()
        asked.accounts.begin()
        try:
            call = GrpcCall.of(grpc_heads.message_of(body), head.headers, head.timeout_s)
        except RaymillError as err:
            self.reply(asked, asgi.error_reply(err))
            return
        ticket = self._fast.service.submit(call, asked.answered)
        if asked.stream in self._streams:
            asked.ticket = ticket

    def reply(self, asked: _Asked, reply: Reply) -> None:
        """A reply of the fast lane."""
        if self._streams.pop(asked.stream, None) is None:
            return
        if not isinstance(asked.head, GrpcHead):
            self._respond(asked.stream, reply, asked.request_id or self._fast.new_request_id())
        elif reply.status == 200:
            self._replies.send(asked.stream, *grpc_heads.answer(reply.body))
        else:
            code, words = grpc_service.code_of(reply.status).value[0], grpc_service.words_of(reply)
            self._replies.send(asked.stream, *grpc_heads.failure(code, words))
        self._count(asked, reply.status)

    def _respond(self, stream: int, reply: Reply, request_id: str) -> None:
        more = b""
        if reply.headers:
            fields = [http2.field(k.encode("latin-1"), v.encode("latin-1")) for k, v in reply.headers.items()]
            more = b"".join(fields)
        block = b"%b%b%b%b" % (
            self._fast.block_beginnings.of(reply.status, reply.content_type, self._server.default_headers),
            http2.field(b"content-length", b"%d" % len(reply.body)),
            more,
            http2.field(b"x-request-id", request_id.encode("latin-1")),
        )
        self._replies.send(stream, block, reply.body)

    async def _by_application(self, asked: _Asked, body: bytes, left: asyncio.Event) -> None:
        """What is not for the fast lane, as uvicorn would have it answered."""
        scope = scope_of(http2.read_block(asked.block, MAX_BLOCK_BYTES), self._state)
        try:
            status, headers, content = await asgi.ask(self._app, scope, body, left)
        except Exception as err:  # noqa: BLE001 - edge of the application
            reply = failure(err, "the application")
            status, headers, content = reply.status, [(b"content-type", reply.content_type.encode())], reply.body
        if self._streams.pop(asked.stream, None) is not None:
            fields = [http2.field(*one) for one in [*self._server.default_headers, *headers]]
            self._replies.send(asked.stream, http2.status_field(status) + b"".join(fields), content)

    def _count(self, asked: _Asked, status: int) -> None:
        if asked.accounts is not None and asked.head is not None:
            asked.accounts.end(status, time.perf_counter() - asked.since, asked.request_id, asked.head.path)


def scope_of(fields: list[tuple[bytes, bytes]], state: Mapping[str, Any]) -> dict[str, Any]:
    """The ASGI scope of a request with these headers."""
    pseudo = {name: value for name, value in fields if name.startswith(b":")}
    path, _, query = pseudo.get(b":path", b"").partition(b"?")
    host = [(b"host", pseudo[b":authority"])] if b":authority" in pseudo else []
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "2",
        "method": pseudo.get(b":method", b"").decode("latin-1"),
        "scheme": "http",
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [*host, *(one for one in fields if not one[0].startswith(b":"))],
        "client": None,
        "server": None,
        "state": dict(state),
    }
