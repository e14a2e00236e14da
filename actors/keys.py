"""Keys of rows as 64-bit hashes, and which of them were seen: pure.

Invariants
- Equal keys have equal hashes on every machine and day.
- A hash alone never makes a row a duplicate: hits are confirmed by the values.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class KeyIndex:
    """The keys accepted so far as 64-bit hashes, 8 bytes each: a fast no, and a maybe that its owner confirms.

    Two keys may share a hash (n keys: about n² / 2⁶⁵ pairs), so a hit alone never makes a row a duplicate.
    """

    MERGE_AT = 65_536
    """Fresh hashes wait in a set up to this many, so that a small batch does not sort the whole index anew."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._fresh: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._fresh)

    def add(self, hashes: np.ndarray) -> None:
        """Take in the hashes [n] of accepted keys."""
        if len(self._fresh) + len(hashes) < self.MERGE_AT:
            self._fresh.update(hashes.tolist())
            return
        waiting = np.fromiter(self._fresh, np.uint64, len(self._fresh))
        fresh = np.unique(np.concatenate([waiting, hashes]))
        place = np.searchsorted(self._sorted, fresh)
        if len(self._sorted):
            new = self._sorted[np.minimum(place, len(self._sorted) - 1)] != fresh
            fresh, place = fresh[new], place[new]
        self._sorted = np.insert(self._sorted, place, fresh)  # sorting all of it anew takes twenty times as long
        self._fresh = set()

    def maybe(self, hashes: np.ndarray) -> np.ndarray:
        """Bool [n]: false where the key is certainly new."""
        found = np.fromiter((h in self._fresh for h in hashes.tolist()), np.bool_, len(hashes))
        if len(self._sorted):
            place = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
            found |= self._sorted[place] == hashes
        return found


def key_hashes(keys: pa.Table) -> np.ndarray:
    """64-bit hash [n] of each row; equal rows have equal hashes on every machine and day."""
    mixed = np.full(keys.num_rows, 0x9E3779B97F4A7C15, np.uint64)
    for column in keys.columns:
        mixed = _mix(mixed ^ _column_words(column.combine_chunks()))
    return mixed


def first_alike(keys: pa.Table) -> np.ndarray:
    """Number [n] of the first row that has the same key (compared by value, not by hash): itself, for a new one."""
    hashes = key_hashes(keys)
    found = np.arange(keys.num_rows)
    _, group, size = np.unique(hashes, return_inverse=True, return_counts=True)
    suspects = np.flatnonzero(size[group] > 1)
    seen: dict[tuple[Any, ...], int] = {}
    for i, key in zip(suspects.tolist(), key_tuples(keys.take(suspects)), strict=True):
        found[i] = seen.setdefault(key, i)
    return found


def key_tuples(keys: pa.Table) -> list[tuple[Any, ...]]:
    """Each row as a tuple of plain values."""
    return list(zip(*(c.to_pylist() for c in keys.columns), strict=True))


def plain_rows(rows: pa.Table) -> list[tuple[Any, ...]]:
    """Each row as a tuple that tells it from others: a NaN is a null, media are their checksums."""
    columns = {name: _plain(rows[name].combine_chunks()) for name in rows.column_names}
    return key_tuples(pa.table(columns))


def _plain(values: pa.Array) -> pa.Array:
    if pa.types.is_struct(values.type):
        return pc.struct_field(values, "sha256")
    if pa.types.is_floating(values.type):
        return pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    return values


def _column_words(values: pa.Array) -> np.ndarray:
    """One uint64 per value."""
    if pa.types.is_string(values.type):
        coded = values.dictionary_encode()
        seen = coded.dictionary.to_pylist()
        words = np.array(
            [int.from_bytes(hashlib.blake2b(v.encode(), digest_size=8).digest()) for v in seen] + [1], np.uint64
        )
        return words[coded.indices.fill_null(len(seen)).to_numpy(False)]
    if pa.types.is_floating(values.type):
        values = pc.add(values, 0.0).view(pa.int64())  # −0 and 0 are one key
    return _mix(values.cast(pa.int64()).fill_null(0).to_numpy(False).view(np.uint64))


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finisher: every bit of the input moves every bit of the output."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
