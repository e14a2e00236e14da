"""The fast lane: uvicorn's own HTTP protocol, which answers the two predict routes itself and leaves all else to it.

A request's way: bytes of one read → head (known heads are not parsed again) → `Service.submit` → reply → bytes; no
task, no ASGI scope, no queue between. uvicorn and Serve see every other request exactly as if this were not here.

Invariants
- Replies leave a connection in the order of its requests, whichever lane they took.
- A request that was read whole is answered, or its caller has gone: a server that stops closes a connection only
  after the last reply.
- What a caller may hold on to is bounded: bytes of a head, of a body, requests in a row, seconds without progress.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from raymill.actors import asgi, http2, http_head
from raymill.actors.asgi import Reply
from raymill.actors.fast_server import MAX_BLOCK_BYTES, Fast, socket_of, write_now
from raymill.actors.http_head import Head
from raymill.actors.lane import Ticket
from raymill.runtime.api_keys import Right
from raymill.runtime.errors import TooLarge, TooSlow

PIPELINED = 64
"""Requests of one connection that may be under way."""
PATIENCE_S = 20.0
"""For how long a request that is not whole may bring nothing worth mentioning."""
PROGRESS_BYTES = 64 << 10
"""What is worth mentioning."""


class _Due:
    """A request under way on a connection."""

    __slots__ = ("_protocol", "head", "reply", "request_id", "since", "ticket")

    def __init__(self, protocol: FastLane, head: Head, request_id: str) -> None:
        self._protocol, self.head, self.request_id = protocol, head, request_id
        self.since = time.perf_counter()
        self.reply: Reply | None = None
        self.ticket: Ticket | None = None

    def answered(self, reply: Reply) -> None:
        """The reply is there; it leaves when those before it have left."""
        self.reply = reply
        self.ticket = None  # it holds this method: in a circle all of it would wait for the garbage collector
        self._protocol.flush()


class FastLane(HttpToolsProtocol):
    """One connection."""

    def __init__(self, fast: Fast, **arguments: Any) -> None:
        super().__init__(**arguments)
        fast.begin(arguments)
        self._fast = fast
        self._plain = bool(fast.reason) or bool(self.root_path)
        """Whether everything goes to uvicorn."""
        self._is_local = False
        """Whether the other end is of this host, or the proxy."""
        self._socket = -1
        """Where replies may be written at once; negative: nowhere."""
        self._held = b""
        """What was read and not yet looked at."""
        self._waits = False
        """Whether `_held` waits for replies to leave."""
        self._head: Head | None = None
        """Head of the request whose body is being read."""
        self._parts: list[bytes] = []
        self._missing = 0
        self._due: deque[_Due] = deque()
        self._inside = False
        """Whether uvicorn's parser is inside a message."""
        self._stops = False
        self._clock: asyncio.TimerHandle | None = None
        self._came = 0
        """Bytes since the clock last looked."""
        self._active = 0.0
        """When a reply left last, or the request began that is being read."""
        self._head_open, self._head_bytes = False, 0
        self._ended = False
        """Whether the last request said that it is the last."""

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_local = asgi.is_local(self.client[0] if self.client else "")
        self._socket = socket_of(transport)
        self._active = self.loop.time()
        self._clock = self.loop.call_later(PATIENCE_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._clock is not None:
            self._clock.cancel()
        self._socket = -1  # its number may be another connection's from now on
        gone, self._due = self._due, deque()
        for due in gone:
            if due.ticket is not None:
                due.ticket.left = True
            self._count(due, 499)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._came += len(data)
        if self._ended:
            return
        if self._plain:
            self._feed(data)
            return
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        if self._waits:
            self._held += data
            self.flow.pause_reading()  # uvicorn resumes by itself
            return
        if self._head is not None:
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            whole, head = b"".join(self._parts), self._head
            self._head, self._parts = None, []
            self._call(head, whole[: head.length])
            data = whole[head.length :]
        elif self._held:
            data, self._held = self._held + data, b""
        if data:
            self._take(data)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._resume_soon()

    def shutdown(self) -> None:
        """The server stops: no further request, but those read whole are answered."""
        self._stops = True
        if not self._due:  # else the last reply closes
            super().shutdown()

    # Requests in

    def _take(self, data: bytes) -> None:
        """Requests from the front of what was read, as far as they are whole."""
        while data:
            if self._ended or self.transport.is_closing():
                return
            if self._inside:
                self._feed(data)
                return
            if len(self._due) >= PIPELINED or self.flow.write_paused:
                self._hold(data)
                return
            at = data.find(http_head.END, 0, http_head.MAX_HEAD_BYTES)
            if at < 0:
                if not http_head.may_begin(data) or len(data) >= http_head.MAX_HEAD_BYTES:
                    self._turn(data)
                else:
                    self._held, self._active = data, self.loop.time()
                return
            begin = at + len(http_head.END)
            head = self._fast.head(data[:begin])
            if head is None or self._uvicorn_answers():
                if not self._becomes_streams(data):
                    self._turn(data)
                return
            end = begin + head.length
            if len(data) < end and self._fast.refusal(head.headers, Right.PREDICT, self._is_local) is not None:
                self._turn(data)  # refused there too, and its body is not kept
                return
            if len(data) < end:
                self._head, self._parts, self._missing = head, [data[begin:]], end - len(data)
                self._active = self.loop.time()
                return
            body, data = data[begin:end], data[end:]
            self._call(head, body)

    def _call(self, head: Head, body: bytes) -> None:
        fast = self._fast
        self._ended = not head.keep_alive
        due = _Due(self, head, head.request_id or fast.new_request_id())
        self._due.append(due)
        ticket = fast.call(head, body, self._is_local, due.answered)
        if due.reply is None:
            due.ticket = ticket

    def _turn(self, data: bytes) -> None:
        """These bytes are uvicorn's, once the replies before them have left."""
        if self._due:
            self._hold(data)
        else:
            self._feed(data)

    def _becomes_streams(self, data: bytes) -> bool:
        """Whether the proxy begins HTTP/2 here, which another protocol goes on with."""
        fast = self._fast
        is_new = self._is_local and not self._due and self.cycle is None
        if fast.as_streams is None or fast.arguments is None or not is_new or not data.startswith(http2.PREFACE):
            return False
        streams = fast.as_streams(fast.arguments)
        self.connections.discard(self)
        if self._clock is not None:
            self._clock.cancel()
        self._socket = -1
        self.transport.set_protocol(streams)
        streams.connection_made(self.transport)
        streams.data_received(data)
        return True

    def _uvicorn_answers(self) -> bool:
        return bool(self.pipeline) or (self.cycle is not None and not self.cycle.response_complete)

    def _feed(self, data: bytes) -> None:
        if self.parser is None or self.transport.is_closing():
            return
        super().data_received(data)
        if any(name == b"upgrade" for name, _ in self.headers or ()):
            self._plain = True
        if self._head_open:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_BLOCK_BYTES:
                error = TooLarge(f"the head of the request has more than {MAX_BLOCK_BYTES} bytes")
                self._refuse(asgi.error_reply(error, 431))
        if self._stops:
            super().shutdown()

    def on_message_begin(self) -> None:
        self._inside, self._head_open, self._head_bytes = True, True, 0
        self._active = self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_open = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._inside = False
        super().on_message_complete()

    def _hold(self, data: bytes) -> None:
        self._held, self._waits = data, True
        self.flow.pause_reading()

    def _resume_soon(self) -> None:
        if self._waits and len(self._due) < PIPELINED // 2 and not self.flow.write_paused:
            self.loop.call_soon(self._resume)

    def _resume(self) -> None:
        if not self._waits or self.transport.is_closing():
            return
        data, self._held, self._waits = self._held, b"", False
        self.flow.resume_reading()
        self._take(data)

    # Replies out

    def flush(self) -> None:
        """Send the replies that are there, in the order of the requests."""
        if self.transport.is_closing():
            return
        out: list[bytes] = []
        while self._due and (reply := self._due[0].reply) is not None:
            due = self._due.popleft()
            last = not due.head.keep_alive or (self._stops and not self._due and not self._waits)
            out.append(self._bytes_of(reply, due.request_id, last))
            self._count(due, reply.status)
            if last:
                self._send(b"".join(out))
                self.transport.close()
                return
        if out:
            self._active = self.loop.time()
            self._send(out[0] if len(out) == 1 else b"".join(out))
            if self._waits:
                self._resume_soon()

    def _send(self, data: bytes) -> None:
        write_now(self.transport, self._socket, data)

    def _bytes_of(self, reply: Reply, request_id: str, last: bool) -> bytes:
        begin = self._fast.beginnings.of(reply.status, reply.content_type, self.server_state.default_headers)
        head = "".join([f"{key}: {text}\r\n" for key, text in reply.headers.items()]) if reply.headers else ""
        end = "connection: close\r\n\r\n" if last else "\r\n"
        return b"%b%b%b" % (
            begin,
            f"{len(reply.body)}\r\n{head}x-request-id: {request_id}\r\n{end}".encode("latin-1"),
            reply.body,
        )

    def _count(self, due: _Due, status: int) -> None:
        if self._fast.accounts is not None:
            self._fast.accounts.end(status, time.perf_counter() - due.since, due.request_id, due.head.path)

    # Time

    def _look(self) -> None:
        """Every now and then: close what brings nothing or takes nothing, and what has been idle for long."""
        came, self._came = self._came, 0
        now = self.loop.time()
        if self.transport.is_closing():
            return
        if self.flow.write_paused and came < PROGRESS_BYTES and now - self._active > PATIENCE_S:
            self.transport.abort()
            return
        halfway = self._head is not None or (self._held and not self._waits) or self._inside
        if halfway and not self.flow.read_paused and came < PROGRESS_BYTES and now - self._active >= PATIENCE_S:
            self._refuse(asgi.error_reply(TooSlow(f"the request was not whole after {PATIENCE_S:.0f} s")))
            return
        idle = not (halfway or self._due or self._waits or self._uvicorn_answers())
        if idle and self.timeout_keep_alive_task is None and now - self._active > self.timeout_keep_alive:
            self.transport.close()
            return
        self._clock = self.loop.call_later(PATIENCE_S, self._look)

    def _refuse(self, reply: Reply) -> None:
        """Tell what is wrong, if nothing is being told yet, and close."""
        if not self._due and not self._uvicorn_answers():
            self.transport.write(self._bytes_of(reply, self._fast.new_request_id(), True))
        self.transport.close()
