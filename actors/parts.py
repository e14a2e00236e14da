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

import pyarrow as pa
import pyarrow.parquet as pq

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

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all rows."""
        self.check(columns)
        return self._table.select(list(columns))


class Parts(_Columns):
    """Parquet files of one schema, in the order given."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = [os.fspath(p) for p in paths]

    def __len__(self) -> int:
        return sum(m.num_rows for m in self._metadata)

    @cached_property
    def _metadata(self) -> list[Any]:
        try:
            return [pq.read_metadata(p) for p in self._paths]
        except (OSError, pa.ArrowException) as err:
            raise StoreError(f"could not read stored parts: {err}; were they vacuumed away?") from err

    @cached_property
    def _schema(self) -> pa.Schema:
        return pa.unify_schemas([m.schema.to_arrow_schema() for m in self._metadata])

    @property
    def column_names(self) -> list[str]:
        return list(self._schema.names)

    def blocks(self) -> Iterator[Block]:
        """Row group by row group."""
        first = 0
        for p, metadata in enumerate(self._metadata):
            for g in range(metadata.num_row_groups):
                rows = metadata.row_group(g).num_rows
                yield Block(first, rows, (p, g))
                first += rows

    def read(self, block: Block, columns: Sequence[str]) -> pa.Table:
        """Columns of a row group; one that its file does not have is null."""
        self.check(columns)
        p, g = block.origin
        try:
            with pq.ParquetFile(self._paths[p], metadata=self._metadata[p], memory_map=True) as file:
                has = set(file.schema_arrow.names)
                found = file.read_row_group(g, columns=[c for c in columns if c in has], use_threads=False)
        except (OSError, pa.ArrowException) as err:
            raise StoreError(f"could not read stored part {self._paths[p]}: {err}") from err
        for name in columns:
            if name not in has:
                found = found.append_column(name, pa.nulls(block.rows, self._schema.field(name).type))
        return found.select(list(columns))

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all rows."""
        self.check(columns)
        wanted = pa.schema([self._schema.field(c) for c in columns]) if self._paths else pa.schema([])
        with ThreadPoolExecutor(threads()) as pool:
            read = list(pool.map(lambda b: self.read(b, columns), list(self.blocks())))
        return pa.concat_tables([wanted.empty_table(), *(t.cast(wanted) for t in read)])
