"""What the lake holds of a source already: its keys, and the values of columns that other sources refer to.

Invariants
- Both are derived from the tables: read when they are first needed, and again whenever a table has moved without us.
- An answer is exact: a hit among hashes is confirmed by the rows themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors.contract import InLake
from raymill.actors.keys import KeyIndex, key_hashes, key_tuples, plain_rows
from raymill.actors.lake import Lake
from raymill.runtime.spec import Source


class Known:
    """Keys and referred values of the lake's tables; 8 bytes a row, referred values in full. Not thread-safe.

    Where rows are corrected, a key is one of a version: `Source.version_key`.
    """

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._indexes: dict[str, tuple[int | None, KeyIndex]] = {}
        self._values: dict[str, tuple[int | None, pa.Array]] = {}

    def counts(self) -> dict[str, int]:
        """Keys known of each source that was asked for."""
        return {name: len(index) for name, (_, index) in self._indexes.copy().items()}

    def look_up(self, source: Source) -> InLake:
        """What the contract may ask about a batch of the source."""
        index = self.index(source)
        return InLake(
            keys=lambda keys: self._has_keys(source, index, keys),
            rows=lambda rows: self._has_rows(source, rows),
            values=self._has_values,
        )

    def index(self, source: Source) -> KeyIndex:
        """The keys in the lake now; built anew if the table is not at the version it was last brought to."""
        version = self._lake.version(source.name)
        if source.name in self._indexes and self._indexes[source.name][0] == version:
            return self._indexes[source.name][1]
        index = KeyIndex()
        if version is not None:
            index.add(key_hashes(self._lake.read(source.name, version=version, columns=source.version_key)))
        self._indexes[source.name] = (version, index)
        return index

    def version(self, source: Source) -> int:
        """Version of the table for which the keys were looked up; one that is made now begins at 0."""
        return self._indexes[source.name][0] or 0

    def appended(self, source: Source, rows: pa.Table, version: int) -> None:
        """Take note of rows that this process has appended, which made that version of the table."""
        _, index = self._indexes[source.name]
        index.add(key_hashes(rows.select(list(source.version_key))))
        self._indexes[source.name] = (version, index)

    def _has_keys(self, source: Source, index: KeyIndex, keys: pa.Table) -> np.ndarray:
        """Bool [n]: which keys the lake holds."""
        found = index.maybe(key_hashes(keys))
        hits = np.flatnonzero(found)
        if len(hits):
            suspects = keys.take(hits)
            where = _among(suspects, source.key)
            held = set(key_tuples(self._lake.read(source.name, columns=source.version_key, where=where)))
            found[hits] = [key in held for key in key_tuples(suspects)]
        return found

    def _has_rows(self, source: Source, rows: pa.Table) -> np.ndarray:
        """Bool [n]: which rows the lake holds just as they are."""
        names = list(source.schema)
        held = self._lake.read(source.name, columns=names, where=_among(rows, source.key))
        there = set(plain_rows(held))
        return np.array([row in there for row in plain_rows(rows.select(names))], np.bool_)

    def _has_values(self, place: str, values: pa.Array) -> np.ndarray:
        """Bool [n]: which values stand in the column `<source>.<column>` of the lake."""
        table, column = place.split(".")
        version = self._lake.version(table)
        if version is None:
            return np.zeros(len(values), np.bool_)
        if place not in self._values or self._values[place][0] != version:
            held = self._lake.read(table, version=version, columns=[column])[column]
            self._values[place] = (version, pc.unique(held.combine_chunks()))
        return np.asarray(pc.is_in(values, value_set=self._values[place][1]).to_numpy(zero_copy_only=False))


def _among(keys: pa.Table, columns: Sequence[str]) -> list[tuple[str, str, list[object]]]:
    return [(c, "in", keys[c].unique().to_pylist()) for c in columns]
