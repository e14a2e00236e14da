"""How the online store's records are named and put together; writer and readers share it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymill.actors.aggregates import BEFORE_ALL
from raymill.actors.evaluate import Ints
from raymill.actors.feature_plan import ViewPlan

_PROGRESS = struct.Struct("<qqq")
ENTITY_AT = 17
"""Where an entity begins in the name of a record: behind a letter and the view's digest."""
_LONGEST_KEY = 400
"""Entity keys longer than this (LMDB takes 511 bytes) are stored under their hash."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a view has come."""

    newest: int = BEFORE_ALL
    """Largest event time seen, µs."""
    floor: int = BEFORE_ALL
    """Earliest moment that can be answered, µs."""
    lake_version: int = -1
    """Version of the lake table up to which all rows are in; −1: not known to be."""

    def to_bytes(self) -> bytes:
        """Packed."""
        return _PROGRESS.pack(self.newest, self.floor, self.lake_version)

    @classmethod
    def from_bytes(cls, data: bytes) -> Progress:
        """Unpacked."""
        return cls(*_PROGRESS.unpack(data))


def entity_key(values: tuple[Any, ...]) -> bytes:
    """One entity's name in the store: unambiguous, at most 400 bytes."""
    parts = []
    for value in values:
        if isinstance(value, str):
            text = value.encode()
            parts.append(b"%d:%b" % (len(text), text))
        else:
            parts.append(b"i%d;" % value)
    key = b"".join(parts)
    return key if len(key) <= _LONGEST_KEY else b"h" + hashlib.sha256(key).digest()


def record_key(view: ViewPlan, entity: bytes) -> bytes:
    """Name of an entity's events."""
    return b"v" + view.digest.encode() + entity


def newest_key(view: ViewPlan, entity: bytes) -> bytes:
    """Name of an entity's newest values."""
    return b"n" + view.digest.encode() + entity


def text_key(view: ViewPlan, code: bytes) -> bytes:
    """Name of a string that a lookup's events hold by its hash."""
    return b"s" + view.digest.encode() + code


def progress_key(view: ViewPlan) -> bytes:
    """Name of a view's progress."""
    return view.progress_name


def floor_of(txn: Any, view: ViewPlan) -> int | None:
    """Earliest moment of a view that can be answered, µs; None: it is not in the store."""
    found = txn.get(progress_key(view))
    return None if found is None else int(_PROGRESS.unpack(found)[1])


def progress_of(txn: Any, view: ViewPlan) -> Progress | None:
    """How far a view has come; None: it is not in the store."""
    found = txn.get(progress_key(view))
    return None if found is None else Progress.from_bytes(found)


def joined(records: Sequence[Any]) -> tuple[Ints, Ints]:
    """One buffer of all records, and where each begins; −1 for a missing one."""
    starts = np.full(len(records), -1, dtype=np.int64)
    at = 0
    for g, record in enumerate(records):
        if record is not None:
            starts[g] = at
            at += len(record) >> 3
    data = bytearray().join(r for r in records if r is not None)
    return np.frombuffer(data, dtype=np.int64), starts
