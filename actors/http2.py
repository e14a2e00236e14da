"""HTTP/2 as bytes (RFC 9113, header blocks RFC 7541), pure: what the server of a connection has to read and write.

Invariant: nothing of one header block is remembered for the next, since we allow no dynamic table: the same bytes say
the same every time, so that who has read a block once knows it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hpack.exceptions import HPACKError
from hpack.hpack import Decoder, encode_integer

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client begins with."""
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
"""Kinds of frames."""
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, WITH_PRIORITY = 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, REFUSED_STREAM, COMPRESSION_ERROR = 0, 1, 3, 6, 7, 9
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 2, 3, 4
"""Settings."""
MAX_FRAME_BYTES = 16 << 10
"""Which a peer may send, and we, without having agreed on more."""
FIRST_WINDOW = (1 << 16) - 1
"""Bytes of data that may be sent on a connection, and on a stream, before anything was agreed on."""
MAX_WINDOW = MAX_STREAM = (1 << 31) - 1
FRAME_HEAD = struct.Struct(">HBBBI")
"""Length (upper 16 bits, lower 8), kind, flags, stream."""
_OK = b"\x88"
"""A header block's `:status: 200`."""
_FORBIDDEN = (b"\r", b"\n", b"\0")


class Malformed(Exception):
    """The peer sent what HTTP/2 does not allow; the connection ends."""

    def __init__(self, message: str, code: int = PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code
        """As it is told to the peer."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame's bytes."""
    return FRAME_HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def settings(**values: int) -> bytes:
    """A frame of settings, by their names here in lower case."""
    pairs = (struct.pack(">HI", globals()[name.upper()], value) for name, value in values.items())
    return frame(SETTINGS, 0, 0, b"".join(pairs))


def read_settings(payload: bytes) -> dict[int, int]:
    """What a frame of settings says.

    Raises:
        Malformed: it is not whole.
    """
    if len(payload) % 6:
        raise Malformed("settings that are not whole", FRAME_SIZE_ERROR)
    return dict(struct.iter_unpack(">HI", payload))


def goaway(last: int, code: int = NO_ERROR, reason: str = "") -> bytes:
    """A frame that says: no further stream, and none after `last` is answered."""
    return frame(GOAWAY, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big") + reason.encode())


def number(payload: bytes) -> int:
    """The 31 bits that a frame with a single number holds.

    Raises:
        Malformed: it has another length.
    """
    if len(payload) != 4:
        raise Malformed(f"a frame of {len(payload)} bytes that has 4", FRAME_SIZE_ERROR)
    return int.from_bytes(payload, "big") & MAX_STREAM


def unpadded(flags: int, payload: bytes) -> bytes:
    """What a frame of data or headers holds, without padding and priority.

    Raises:
        Malformed: there is more padding than payload.
    """
    begin, end = 0, len(payload)
    if flags & PADDED:
        begin, end = 1, end - (payload[0] if payload else 0)
    if flags & WITH_PRIORITY:
        begin += 5
    if begin > end:
        raise Malformed("more padding than payload")
    return payload[begin:end]


def message(stream: int, block: bytes, body: bytes, trailers: bytes = b"") -> bytes:
    """Frames of a whole request or reply; no part may be larger than a frame."""
    head, data = len(block), len(body)
    return b"%b%b%b%b%b" % (
        FRAME_HEAD.pack(head >> 8, head & 0xFF, HEADERS, END_HEADERS, stream),
        block,
        FRAME_HEAD.pack(data >> 8, data & 0xFF, DATA, 0 if trailers else END_STREAM, stream),
        body,
        last(stream, trailers) if trailers else b"",
    )


def last(stream: int, block: bytes) -> bytes:
    """A frame of headers with which a stream ends: trailers, or all there is."""
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, block)


def field(name: bytes, value: bytes) -> bytes:
    """A header as part of a block: in letters, remembered by nobody."""
    if len(name) < 0x7F and len(value) < 0x7F:
        return b"\0%c%b%c%b" % (len(name), name, len(value), value)
    return b"".join((b"\0", encode_integer(len(name), 7), name, encode_integer(len(value), 7), value))


def status_field(status: int) -> bytes:
    """The `:status` that a block begins with."""
    return _OK if status == 200 else field(b":status", b"%d" % status)


def read_block(block: bytes, most_bytes: int) -> list[tuple[bytes, bytes]]:
    """Names and values of a header block, in order.

    Raises:
        Malformed: it is none, has more than `most_bytes`, refers to a dynamic table, or holds the end of a line.
    """
    decoder = Decoder(max_header_list_size=most_bytes)
    decoder.header_table_size = decoder.max_allowed_table_size = 0
    try:
        found = [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)]
    except HPACKError as err:
        raise Malformed(f"a block of headers that can not be read: {err}", COMPRESSION_ERROR) from err
    if any(c in text for one in found for text in one for c in _FORBIDDEN):
        raise Malformed("a header with the end of a line in it")
    return found


def as_http1(fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The head that HTTP/1.1 would have for a request with these headers; of a malformed one, a malformed head."""
    pseudo = {name: value for name, value in fields if name.startswith(b":")}
    lines = [b"%b %b HTTP/1.1" % (pseudo.get(b":method", b""), pseudo.get(b":path", b""))]
    if b":authority" in pseudo:
        lines.append(b"host: " + pseudo[b":authority"])
    lines += [b"%b: %b" % one for one in fields if not one[0].startswith(b":")]
    return b"\r\n".join([*lines, b"", b""])
