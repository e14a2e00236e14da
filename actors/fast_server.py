"""What the connections of one server share, whichever protocol they speak: who answers, the books, known heads.

A head that was read before is not read again: its bytes are looked up.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from raymill.actors import grpc_heads, http2, http_head
from raymill.actors.answering import Call, HttpCall
from raymill.actors.asgi import Reply
from raymill.actors.grpc_heads import GrpcHead
from raymill.actors.http_head import Head
from raymill.actors.lane import Ticket
from raymill.runtime.api_keys import Right

MAX_BLOCK_BYTES = 4 * http_head.MAX_HEAD_BYTES
"""Of the headers of a stream, as of a head that is left to uvicorn."""
_KNOWN_HEADS = 512
_KNOWN_HEAD_BYTES = 2048

Refusal = Callable[[Mapping[str, str], Right, bool], Reply | None]
"""What `Door.refusal` is: headers, the right that is needed, whether the connection is of this host."""


class Service(Protocol):
    """What answers."""

    def submit(self, call: Call, done: Callable[[Reply], None]) -> Ticket | None:
        """Have a call answered; `done` gets the reply on the event loop, perhaps before this returns."""


class Accounts(Protocol):
    """Where requests are counted."""

    def begin(self) -> None:
        """A request is under way."""

    def end(self, status: int, seconds: float, request_id: str, path: str) -> None:
        """It was answered so; 499: its caller had gone."""


class NoAccounts:
    """Counts nothing: where no Serve is around."""

    def begin(self) -> None:
        """Nothing."""

    def end(self, status: int, seconds: float, request_id: str, path: str) -> None:
        """Nothing."""


class Beginnings:
    """Replies up to the length of their bodies, each written once a second."""

    def __init__(self, write: Callable[[int, list[tuple[bytes, bytes]]], bytes]) -> None:
        """`write` makes one of a status and headers, of which the last is the type of the content."""
        self._write = write
        self._known: dict[tuple[int, str], bytes] = {}
        self._default_headers: list[tuple[bytes, bytes]] = []

    def of(self, status: int, content_type: str, default_headers: list[tuple[bytes, bytes]]) -> bytes:
        """That of a reply, with uvicorn's own headers."""
        if default_headers is not self._default_headers:  # uvicorn makes a new list each second, with the date
            self._default_headers = default_headers
            self._known.clear()
        found = self._known.get((status, content_type))
        if found is None:
            fields = [*default_headers, (b"content-type", content_type.encode("latin-1"))]
            found = self._known[status, content_type] = self._write(status, fields)
        return found


class Fast:
    """What the connections of one server share."""

    def __init__(
        self,
        service: Service,
        accounts_of: Callable[[Any], Accounts] | None = None,
        refusal: Refusal = lambda *_: None,
    ) -> None:
        """`accounts_of` finds, from the server's ASGI application, where to count; `refusal` is the door's."""
        self.service, self.refusal = service, refusal
        self.accounts: Accounts | None = None
        self.reason = ""
        """Why the fast lane is not used; empty: it is."""
        self.as_streams: Callable[[Mapping[str, Any]], asyncio.Protocol] | None = None
        """Makes what a connection becomes that the proxy begins as HTTP/2, of `arguments`; None: none may."""
        self.requests = 0
        self.arguments: dict[str, Any] | None = None
        """What uvicorn makes a connection's protocol with; None before the first."""
        self._accounts_of = accounts_of or (lambda app: NoAccounts())
        self._heads: dict[bytes, Head] = {}
        self._blocks: dict[bytes, Head | GrpcHead] = {}
        self.beginnings, self.block_beginnings = Beginnings(_as_http1), Beginnings(_as_block)
        p = os.urandom(10).hex()
        self._prefix = f"{p[:8]}-{p[8:12]}-{p[12:16]}-{p[16:20]}-"
        self._numbers = itertools.count(1)

    def begin(self, arguments: dict[str, Any]) -> None:
        """A connection begins, whose protocol uvicorn makes of these."""
        self.arguments = arguments
        if self.accounts is None and not self.reason:
            try:
                self.accounts = self._accounts_of(arguments["config"].loaded_app)
            except Exception as err:  # noqa: BLE001 - Serve's insides: whatever breaks there, the other lane answers
                self.reason = f"requests could not be counted for Serve: {type(err).__name__}: {err}"

    def head(self, block: bytes) -> Head | None:
        """The head of these bytes; None: not for the fast lane."""
        head = self._heads.get(block)
        if head is None and http_head.may_begin(block):
            head = http_head.read_head(block)
            _remember(self._heads, block, head)
        return head

    def head_of_stream(self, block: bytes) -> Head | GrpcHead | None:
        """The same of an HTTP/2 header block, which may be a gRPC call's.

        Raises:
            http2.Malformed: it is none.
        """
        head = self._blocks.get(block)
        if head is None:
            fields = http2.read_block(block, MAX_BLOCK_BYTES)
            head = grpc_heads.read(fields) or http_head.read_head(http2.as_http1(fields))
            _remember(self._blocks, block, head)
        return head

    def call(self, head: Head, body: bytes, is_local: bool, done: Callable[[Reply], None]) -> Ticket | None:
        """Have a request answered; `done` gets the reply on the event loop, perhaps before this returns."""
        self.requests += 1
        if self.accounts is not None:
            self.accounts.begin()
        refusal = self.refusal(head.headers, Right.PREDICT, is_local)
        if refusal is not None:
            done(refusal)
            return None
        call = HttpCall(head.model, head.infer, head.version, head.headers, body, head.bare)
        return self.service.submit(call, done)

    def new_request_id(self) -> str:
        """A name for a request, in the form of a UUID."""
        return f"{self._prefix}{next(self._numbers):012x}"


def _as_http1(status: int, fields: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join([STATUS_LINE[status], *(b"%b: %b\r\n" % one for one in fields), b"content-length: "])


def _as_block(status: int, fields: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join([http2.status_field(status), *(http2.field(*one) for one in fields)])


def _remember(known: dict[bytes, Any], block: bytes, head: Head | GrpcHead | None) -> None:
    """A head that may come again is not read again."""
    if head is not None and head.is_common and len(block) <= _KNOWN_HEAD_BYTES:
        if len(known) >= _KNOWN_HEADS:
            known.clear()
        known[block] = head


def write_now(transport: asyncio.WriteTransport, descriptor: int, data: bytes) -> None:
    """Into the socket at once: uvloop's own `write` waits until all that can be read has been.

    Args:
        transport: takes what the socket does not.
        descriptor: the socket's (`socket_of`).
        data: what is written.
    """
    sent = 0
    if descriptor >= 0 and not transport.get_write_buffer_size():
        try:
            sent = os.write(descriptor, data)
        except OSError:  # full, or broken: the transport finds out
            sent = 0
    if sent < len(data):
        transport.write(data[sent:])


def socket_of(transport: asyncio.Transport) -> int:
    """The descriptor of a plain connection; negative: of one with TLS, or in memory."""
    found = transport.get_extra_info("socket")
    if found is None or transport.get_extra_info("sslcontext") is not None:
        return -1
    return int(found.fileno())
