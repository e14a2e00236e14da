"""Replies on one HTTP/2 connection to the proxy: written together, within what the proxy takes, and how it ends.

Invariant: no caller waits for another who does not read. HAProxy (2.8) stops reading a connection once the reply of
one stream is larger than its buffer and stays there. So a reply of more than `SMALL_BYTES` leaves when the proxy opens
no further stream on the connection and all others there have their replies.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from raymill.actors import http2
from raymill.actors.fast_server import socket_of, write_now
from raymill.actors.http2 import Malformed

SMALL_BYTES = 12 << 10
"""Of a reply; less than HAProxy keeps of a stream (its buffer, without what it leaves free for headers)."""
WRITTEN_TOGETHER = 16
"""Replies of a batch: the proxy goes on with the first while those after them are made."""
PATIENCE_S = 1.0
"""For which the proxy may take to close a connection that is over."""


class _Body:
    """What is left of a reply that waits for the proxy to take more."""

    __slots__ = ("rest", "stream", "trailers", "window")

    def __init__(self, stream: int, rest: bytes, trailers: bytes, window: int) -> None:
        self.stream, self.trailers, self.window = stream, trailers, window
        self.rest = memoryview(rest)  # of which parts are cut without a copy of all that is left


class Replies:
    """Of one connection."""

    def __init__(self, transport: asyncio.Transport, is_asked: Callable[[], bool]) -> None:
        """`is_asked` says whether a stream waits for its reply."""
        self._transport, self._is_asked = transport, is_asked
        self._socket = socket_of(transport)
        self._loop = asyncio.get_running_loop()
        self._window = self._stream_window = http2.FIRST_WINDOW
        """Bytes that the proxy takes: on this connection, and of a new stream's reply."""
        self._out: list[bytes] = []
        self._soon = False
        self._waiting: list[_Body] = []
        self._large: deque[tuple[int, bytes, bytes, bytes]] = deque()
        """Stream, headers, body and trailers of those that leave when all others have."""
        self._retired = False
        self._known = False
        """Whether the proxy has said that it knows: no further stream comes."""
        self._closes = False

    def lost(self) -> None:
        """The connection is closed."""
        self._socket = -1  # its number may be another connection's from now on
        self._waiting.clear()
        self._large.clear()

    def send(self, stream: int, block: bytes, body: bytes, trailers: bytes = b"") -> None:
        """A reply: its headers, its body, and what comes after it."""
        size = len(body)
        if not size or (size <= SMALL_BYTES and size <= min(self._window, self._stream_window) and not self._waiting):
            self._window -= size
            self.write(http2.message(stream, block, body, trailers))
        elif size <= SMALL_BYTES:
            self._begin(stream, block, body, trailers)
        else:
            self._large.append((stream, block, body, trailers))
            self.retire()
        if self._retired:
            self.go_on()

    def write(self, data: bytes) -> None:
        """Frames, with those of the same turn of the loop."""
        self._out.append(data)
        if len(self._out) >= WRITTEN_TOGETHER:
            self.flush()
        elif not self._soon:
            self._soon = True
            self._loop.call_soon(self._flush_soon)

    def flush(self) -> None:
        """Write what has gathered."""
        if self._out and not self._transport.is_closing():
            data = b"".join(self._out)
            self._out.clear()
            write_now(self._transport, self._socket, data)

    def forget(self, stream: int) -> None:
        """Nobody wants its reply any more."""
        self._waiting = [body for body in self._waiting if body.stream != stream]
        self._large = deque(one for one in self._large if one[0] != stream)
        self.go_on()

    def take_more(self, stream: int, size: int) -> None:
        """The proxy takes so many bytes more, of one stream or (0) of all together.

        Raises:
            Malformed: more than may be.
        """
        if stream == 0:
            self._window += size
            if self._window > http2.MAX_WINDOW:
                raise Malformed("a window that is too large", http2.FLOW_CONTROL_ERROR)
        for body in self._waiting:
            if body.stream == stream:
                body.window += size
        self._pump()

    def set_window(self, size: int) -> None:
        """The proxy takes so much of each stream.

        Raises:
            Malformed: more than may be.
        """
        if size > http2.MAX_WINDOW:
            raise Malformed("a window that is too large", http2.FLOW_CONTROL_ERROR)
        for body in self._waiting:
            body.window += size - self._stream_window
        self._stream_window = size
        self._pump()

    def retire(self) -> None:
        """Have the proxy open no further stream here; those that it opens before it knows are answered."""
        if not self._retired:
            self._retired = True
            self.write(http2.goaway(http2.MAX_STREAM))
            self.write(http2.frame(http2.PING, 0, 0, bytes(8)))

    def known(self) -> None:
        """The proxy has answered the ping: it knows of all that was written before."""
        self._known = self._retired
        self.go_on()

    def go_on(self) -> None:
        """Once no further stream comes and the others are answered: the large replies, then the end."""
        if not self._known or self._waiting or self._is_asked():
            return
        if self._large:
            self._begin(*self._large.popleft())
        elif not self._closes:
            self._closes = True  # the proxy closes, having read all
            self._loop.call_later(PATIENCE_S, self._transport.close)

    def _begin(self, stream: int, block: bytes, body: bytes, trailers: bytes) -> None:
        """Send as much as the proxy takes now, the rest when it takes more."""
        self.write(http2.frame(http2.HEADERS, http2.END_HEADERS, stream, block))
        self._waiting.append(_Body(stream, body, trailers, self._stream_window))
        self._pump()

    def _pump(self) -> None:
        for body in self._waiting:
            while self._window > 0 and body.window > 0 and body.rest:
                size = min(self._window, body.window, http2.MAX_FRAME_BYTES)
                part, body.rest = body.rest[:size], body.rest[size:]
                self._window -= len(part)
                body.window -= len(part)
                goes_on = body.rest or body.trailers
                self.write(http2.frame(http2.DATA, 0 if goes_on else http2.END_STREAM, body.stream, bytes(part)))
            if body.trailers and not body.rest:
                self.write(http2.last(body.stream, body.trailers))
        self._waiting = [body for body in self._waiting if body.rest]
        if self._retired:
            self.go_on()

    def _flush_soon(self) -> None:
        self._soon = False
        self.flush()
