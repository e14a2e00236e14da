"""Newest values, ready to read: one packed record per entity of a view whose every feature is a newest value.

A record is the answer at every moment from which all of the entity's events are known (`whole_from`); for earlier
moments (a replay, a late request) the events beside it are asked. So both give the same values, bit for bit.

Form: `whole_from` int64, `time` int64 (event time of the newest), then a float32 for every leaf, NaN for null. The
view's digest, which names definition and layout, is in the record's key.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from raymill.actors.aggregates import BEFORE_ALL
from raymill.actors.divided import DividedPages
from raymill.actors.evaluate import Floats, Ints, to_float32
from raymill.actors.feature_plan import ViewPlan
from raymill.actors.lmdb_pages import Pages
from raymill.actors.windows import NEVER, newest_events

_HEAD = struct.Struct("<qq")


@lru_cache(maxsize=256)
def layout(leaves: int) -> np.dtype[Any]:
    """A record's type."""
    return np.dtype([("whole_from", "<i8"), ("time", "<i8"), ("leaves", "<f4", (leaves,))])


def packed(view: ViewPlan, buffer: Ints, starts: Ints) -> list[bytes | None]:
    """The records of entities, from their events as `windows.pack` lays them out; None for one without events."""
    n = buffer[starts[:-1]] if len(starts) > 1 else np.empty(0, dtype=np.int64)
    has = np.flatnonzero(n > 0)
    records = np.zeros(len(has), dtype=layout(len(view.leaves)))
    first, last = starts[:-1][has] + 1, n[has] - 1
    # The last of the order of becoming known is the event that is known last.
    latest = first + buffer[first + 3 * n[has] + last]
    records["whole_from"] = np.maximum(buffer[latest], buffer[latest + n[has]])
    records["time"] = buffer[first + last]
    newest = newest_events(buffer, first, n[has])
    floats = buffer.view(np.float64)
    for j, operand in enumerate(view.leaves[:, 1]):
        records["leaves"][:, j] = to_float32(floats[first + (4 + operand) * n[has] + newest])
    found: list[bytes | None] = [None] * len(n)
    size, data = records.itemsize, records.tobytes()
    for i, g in enumerate(has.tolist()):
        found[g] = data[i * size : (i + 1) * size]
    return found


class NewestReader:
    """Reads a view's records in one transaction; what it needs to know of the view is worked out once."""

    def __init__(self, view: ViewPlan, prefix: bytes, pages: Pages | DividedPages | None) -> None:
        self._pages = pages
        self.view = view
        self._type = layout(len(view.leaves))
        self._age_us = -1 if view.max_age_us is None else view.max_age_us
        self.integer = len(view.entity) == 1 and view.source.dtypes[view.entity[0]] != "string"
        """Whether `of_integers` may be asked."""
        self._integer = prefix.replace(b"%", b"%%") + b"i%d;"
        self._prefix = prefix
        self._features = view.newest_leaves
        if self._features is not None and np.array_equal(self._features, np.arange(len(view.leaves))):
            self._features = None
        nan = np.full(len(view.leaves), np.nan, dtype=np.float32)
        self._nothing = _HEAD.pack(BEFORE_ALL, NEVER) + nan.tobytes()
        self._prefix_bytes, self._nothing_bytes = (np.frombuffer(b, dtype=np.uint8) for b in (prefix, self._nothing))

    def of_integers(self, txn: Any, keys: Sequence[int]) -> npt.NDArray[Any]:
        """Records of entities with one integer column as key, event time NEVER for one that has none."""
        if self._pages is not None and len(keys) >= self._pages.fewest:
            found = self._pages.of_integers(txn, self._prefix_bytes, keys, self._nothing_bytes)
            if found is not None:
                return found.view(self._type)[:, 0]
        # All names in one formatting and all records by one iterator: half of what a loop over the keys takes.
        names = ((self._integer + b"\n") * len(keys) % tuple(keys)).splitlines()
        return np.frombuffer(b"".join(map(txn.get, names, repeat(self._nothing))), dtype=self._type)

    def of_one_integer(self, txn: Any, key: int, at: int) -> tuple[npt.NDArray[np.float32], Ints] | None:
        """Leaves [1, leaves] and age of one entity; None: not all of its events are known at the moment."""
        record = txn.get(self._integer % key, self._nothing)
        whole_from, time = _HEAD.unpack_from(record)
        if whole_from > at:
            return None
        age = -1 if time == NEVER else at - time
        leaves = np.frombuffer(self._nothing if 0 <= self._age_us < age else record, dtype=np.float32, offset=16)
        return leaves[None], np.array((age,))

    def of_keys(self, txn: Any, keys: Sequence[bytes]) -> npt.NDArray[Any]:
        """Records of entities by their names in the store."""
        names = [self._prefix + k for k in keys]
        if self._pages is not None and len(names) >= self._pages.fewest:
            found = self._pages.of_names(txn, names, self._nothing_bytes)
            if found is not None:
                return found.view(self._type)[:, 0]
        return np.frombuffer(b"".join([txn.get(n, self._nothing) for n in names]), dtype=self._type)

    def values(self, records: npt.NDArray[Any], at: Ints | int) -> npt.NDArray[np.float32]:
        """The leaves [entities, leaves] at moments ≥ `whole_from`."""
        leaves: npt.NDArray[np.float32] = records["leaves"]
        if self._age_us < 0:
            return leaves
        # Of an entity without events the difference is below zero, and its values are NaN already.
        old = (at - records["time"]) > self._age_us
        if old.any():
            leaves = leaves.copy()
            leaves[old] = np.nan
        return leaves

    def features_of(self, leaves: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The features [entities, features] in the view's order."""
        return leaves if self._features is None else leaves[:, self._features]


def as_leaves(values: npt.NDArray[np.float32]) -> Floats:
    """As the events give them: float64, which become the same float32 again."""
    return values.astype(np.float64)
