"""Prediction ids: ULIDs, so that ids sort by the time they were made; standard library only (the client makes them)."""

from __future__ import annotations

import os
import time
from functools import lru_cache

_CROCKFORD = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_TO_LETTER = bytes(_CROCKFORD[b & 31] for b in range(256))
MAX_ID_LENGTH = 128


def new_ids(count: int) -> list[str]:
    """`count` fresh ULIDs: 48 bits of wall time in milliseconds, 80 random bits."""
    head = _head(time.time_ns() // 1_000_000)
    tail = os.urandom(16 * count).translate(_TO_LETTER).decode("ascii")
    return [head + tail[i : i + 16] for i in range(0, 16 * count, 16)]


@lru_cache(maxsize=2)
def _head(millis: int) -> str:
    return "".join(chr(_CROCKFORD[millis >> shift & 31]) for shift in range(45, -1, -5))
