"""Prediction ids: ULIDs, so that ids sort by the time they were made; standard library only (the client makes them)."""

from __future__ import annotations

import os
import time
from functools import lru_cache

_CROCKFORD = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_TO_LETTER = bytes(_CROCKFORD[b & 31] for b in range(256))
MAX_ID_LENGTH = 128
_STOCK = 256
_tails: list[str] = []
"""Random parts in stock: to ask the kernel for each one costs more than the rest of an id."""
os.register_at_fork(after_in_child=_tails.clear)


def new_ids(count: int) -> list[str]:
    """`count` fresh ULIDs: 48 bits of wall time in milliseconds, 80 random bits."""
    head = _head(time.time_ns() // 1_000_000)
    if count == 1:
        try:
            return [head + _tails.pop()]
        except IndexError:
            _tails.extend(_fresh_tails(_STOCK))
    return [head + tail for tail in _fresh_tails(count)]


def _fresh_tails(count: int) -> list[str]:
    tail = os.urandom(16 * count).translate(_TO_LETTER).decode("ascii")
    return [tail[i : i + 16] for i in range(0, 16 * count, 16)]


@lru_cache(maxsize=2)
def _head(millis: int) -> str:
    return "".join(chr(_CROCKFORD[millis >> shift & 31]) for shift in range(45, -1, -5))
