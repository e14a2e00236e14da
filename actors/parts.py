"""Rows as they are stored: Parquet files, read column by column and row group by row group, no more than is asked for.

What the join reads: `Parts` for files, `Rows` for a table in memory; both give blocks that threads read at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raymill.actors.evaluate import Ints
from raymill.actors.plain_pages import Bytes, is_plain, mapped, plain_offset, take_plain
from raymill.actors.windows import NEVER
from raymill.runtime.errors import ContractError, StoreError

BLOCK = 1 << 20
"""Rows of a block of a table in memory."""


def threads() -> int:
    """How many threads one join uses: the processors that this process may run on, no more than 16."""
    return min(len(os.sched_getaffinity(0)), 16)


@dataclass(frozen=True)
class Block:
    """Some rows that lie together."""

    first: int
    """Number of its first row in the whole."""
    rows: int
    """How many."""
    origin: Any
    """Where they are."""


class _Columns:
    """What has named columns."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        raise NotImplementedError

    def check(self, columns: Sequence[str]) -> None:
        """Raise ContractError where one of the columns is missing."""
        for name in columns:
            if name not in self.column_names:
                raise ContractError(f"column {name!r} is missing: the rows have {', '.join(self.column_names)}")


class Rows(_Columns):
    """A table in memory."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @property
    def column_names(self) -> list[str]:
        return list(self._table.column_names)

    def blocks(self) -> Iterator[Block]:
        """It in pieces."""
        for first in range(0, len(self), BLOCK):
            yield Block(first, min(BLOCK, len(self) - first), None)

    def read(self, block: Block, columns: Sequence[str]) -> pa.Table:
        """Columns of a block."""
        return self.table(columns).slice(block.first, block.rows)

    def take(self, block: Block, columns: Sequence[str], chosen: Ints) -> pa.Table:
        """Some rows of a block, by their number in the whole."""
        return self.read(block, columns).take(pa.array(chosen - block.first))

    def numbers(self, block: Block, name: str) -> Ints:
        """An int64 or timestamp column of a block, as int64 (µs), NEVER for null; Arrow's own memory if it can be."""
        return _integers(self.read(block, [name]).column(0))

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all rows."""
        self.check(columns)
        return self._table.select(list(columns))


class Parts(_Columns):
    """Parquet files of one schema, in the order given, or that of a column."""

    def __init__(self, paths: Sequence[str | Path], *, by: str | None = None, schema: pa.Schema | None = None) -> None:
        """Files at these paths.

        Args:
            paths: local files.
            by: column whose smallest value orders the row groups: the event time, if rows were written in its order.
            schema: columns that there are, though no file may have them yet; absent: those of the files.
        """
        self._by = by
        self._extra = schema
        self._paths = [os.fspath(p) for p in paths]
        self._mapped: dict[int, Bytes] = {}
        self._offsets: dict[tuple[int, int, str], int | None] = {}

    def __len__(self) -> int:
        return sum(m.num_rows for m in self._metadata)

    @cached_property
    def _metadata(self) -> list[Any]:
        try:
            return [pq.read_metadata(pa.BufferReader(self._files(p))) for p in range(len(self._paths))]
        except pa.ArrowException as err:
            raise StoreError(f"could not read stored parts, {', '.join(self._paths)}: {err}") from err

    @cached_property
    def _schema(self) -> pa.Schema:
        return pa.unify_schemas([*self._schemas, *self._to_come])

    @property
    def _to_come(self) -> list[pa.Schema]:
        there = {name for s in self._schemas for name in s.names}
        return [pa.schema([f for f in self._extra if f.name not in there])] if self._extra is not None else []

    @cached_property
    def _schemas(self) -> list[pa.Schema]:
        return [m.schema.to_arrow_schema() for m in self._metadata]

    @property
    def column_names(self) -> list[str]:
        return list(self._schema.names)

    def blocks(self) -> Iterator[Block]:
        """Row group by row group."""
        first = 0
        for p, g in self._order:
            rows = self._metadata[p].row_group(g).num_rows
            yield Block(first, rows, (p, g))
            first += rows

    @cached_property
    def _order(self) -> list[tuple[int, int]]:
        """Numbers of file and row group, in the order asked for as far as the files say."""
        groups = [(p, g) for p, m in enumerate(self._metadata) for g in range(m.num_row_groups)]
        least = {}
        for p, g in groups if self._by is not None else []:
            column = self._number(p).get(self._by or "")
            statistics = None if column is None else self._metadata[p].row_group(g).column(column).statistics
            if statistics is None or not statistics.has_min_max:
                return groups
            least[p, g] = statistics.min
        return sorted(groups, key=least.__getitem__) if least else groups

    def read(self, block: Block, columns: Sequence[str]) -> pa.Table:
        """Columns of a row group; one that its file does not have is null."""
        self.check(columns)
        found: dict[str, Any] = dict.fromkeys(columns)
        for name in columns:
            if (offset := self._offset(block, name)) is not None:
                values = np.empty(block.rows, dtype=np.int64)
                self._read(block, offset, values)
                found[name] = _array(values, self._schema.field(name).type)
        missing = [c for c in columns if found[c] is None]
        if missing:
            found |= dict(zip(missing, self._decoded(block, missing).columns, strict=True))
        return pa.table(found)

    def take(self, block: Block, columns: Sequence[str], chosen: Ints) -> pa.Table:
        """Some rows of a row group, by their number in the whole."""
        self.check(columns)
        found: dict[str, Any] = dict.fromkeys(columns)
        for name in columns:
            if (offset := self._offset(block, name)) is not None:
                values = np.empty(len(chosen), dtype=np.float64)
                if len(chosen) and chosen[-1] - chosen[0] == len(chosen) - 1 and (np.diff(chosen) == 1).all():
                    self._read(block, offset + 8 * int(chosen[0] - block.first), values)
                else:
                    take_plain(self._files(block.origin[0]), offset, chosen, block.first, values)
                found[name] = _array(values, self._schema.field(name).type)
        missing = [c for c in columns if found[c] is None]
        if missing:
            some = self._decoded(block, missing).take(pa.array(chosen - block.first))
            found |= dict(zip(missing, some.columns, strict=True))
        return pa.table(found)

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all rows; where all parts are plain, each is one piece."""
        self.check(columns)
        blocks = list(self.blocks())
        whole: dict[str, Any] = {}
        with ThreadPoolExecutor(threads()) as pool:
            for name in dict.fromkeys(columns):
                kind = self._schema.field(name).type
                plain = [self.place(b, name) for b in blocks]
                if all(p is not None for p in plain) and blocks:
                    values = np.empty(len(self), dtype=np.int64)
                    places = [values[b.first : b.first + b.rows] for b in blocks]
                    list(pool.map(_copy, plain, places))
                    whole[name] = _array(values, kind)
                else:
                    read = pool.map(lambda b, n=name: self.read(b, [n]).column(0).cast(self.kind(n)), blocks)
                    whole[name] = pa.chunked_array([c for r in read for c in r.chunks], kind)
        return pa.table(whole)

    def _read(self, block: Block, start: int, into: Any) -> None:
        """Bytes of a file from `start` on: rows in a row are read, since a mapped file may stay in memory whole."""
        path = self._paths[block.origin[0]]
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                if file.readinto(into.view(np.uint8).data) != into.nbytes:
                    raise OSError("it ends too early")
        except OSError as err:
            raise StoreError(f"could not read stored part {path}: {err}") from err

    def kind(self, name: str) -> pa.DataType:
        """Type of a column."""
        return self._schema.field(name).type

    def numbers(self, block: Block, name: str) -> Ints:
        """As `Rows.numbers`: in the mapped file where the values lie there as they are, on no 8-byte boundary."""
        self.check([name])
        plain = self.place(block, name)
        if plain is not None and self.kind(name) != pa.float64():
            return np.frombuffer(plain[0], np.int64, block.rows, plain[1])
        return _integers(self._decoded(block, [name]).column(0))

    def extremes(self, block: Block, name: str) -> tuple[int, int] | None:
        """Smallest and largest of an int64 or timestamp (µs) column of a block, as its file says; None: it does not."""
        p, g = block.origin
        column = self._number(p).get(name)
        kind = self._schemas[p].field(name).type if column is not None else pa.null()
        found = None if column is None else self._metadata[p].row_group(g).column(column).statistics
        whole = kind == pa.int64() or (pa.types.is_timestamp(kind) and kind.unit == "us")
        if not whole or found is None or not found.has_min_max:
            return None
        return int(found.min_raw), int(found.max_raw)

    def path(self, block: Block) -> str:
        """File that the block lies in."""
        return self._paths[block.origin[0]]

    def release(self) -> None:
        """Let go of the mapped files, and with them of the memory that their pages take; they are mapped anew."""
        self._mapped = {}

    def place(self, block: Block, name: str) -> tuple[Bytes, int] | None:
        """The mapped file and the place in it where the column's values lie as they are; None: they must be decoded."""
        offset = self._offset(block, name)
        return None if offset is None else (self._files(block.origin[0]), offset)

    def _offset(self, block: Block, name: str) -> int | None:
        p, g = block.origin
        if (p, g, name) not in self._offsets:
            kind = self.kind(name)
            column = self._number(p).get(name)
            same = column is not None and self._schemas[p].field(name).type == kind
            chunk = self._metadata[p].row_group(g).column(column) if same and is_plain(kind) else None
            try:
                self._offsets[p, g, name] = None if chunk is None else plain_offset(chunk, self._paths[p])
            except OSError as err:
                raise StoreError(f"could not read stored part {self._paths[p]}: {err}") from err
        return self._offsets[p, g, name]

    def _number(self, part: int) -> dict[str, int]:
        """Column chunks of a file by the name of a flat column."""
        return {self._metadata[part].schema.column(i).path: i for i in range(self._metadata[part].num_columns)}

    def _files(self, part: int) -> Bytes:
        if part not in self._mapped:
            try:
                self._mapped[part] = mapped(self._paths[part])
            except OSError as err:
                raise StoreError(
                    f"could not read stored part {self._paths[part]}: {err}; was its version vacuumed away?"
                ) from err
        return self._mapped[part]

    def _decoded(self, block: Block, columns: Sequence[str]) -> pa.Table:
        p, g = block.origin
        try:
            with pq.ParquetFile(pa.BufferReader(self._files(p)), metadata=self._metadata[p]) as file:
                has = set(file.schema_arrow.names)
                found = file.read_row_group(g, columns=[c for c in columns if c in has], use_threads=False)
        except (OSError, pa.ArrowException) as err:
            raise StoreError(f"could not read stored part {self._paths[p]}: {err}") from err
        for name in columns:
            if name not in has:
                found = found.append_column(name, pa.nulls(block.rows, self._schema.field(name).type))
        return found.select(list(columns))


def _copy(plain: tuple[Bytes, int], into: Ints) -> None:
    data, start = plain
    into.view(np.uint8)[:] = data[start : start + into.nbytes]


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    """An Arrow array over the same memory."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _integers(column: pa.ChunkedArray) -> Ints:
    whole = column.combine_chunks()
    if pa.types.is_timestamp(whole.type):
        whole = whole.cast(pa.timestamp("us", tz=whole.type.tz))
    whole = whole.cast(pa.int64())
    return (whole.fill_null(NEVER) if whole.null_count else whole).to_numpy()
