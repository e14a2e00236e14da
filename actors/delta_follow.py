"""Another team's Delta table as a stream: first a snapshot, then what each later version appended.

Invariants
- The version at which the following began is in the lake (an empty batch `…-snapshot`) before any of its rows, so a
  killed snapshot goes on with the same version.
- A version's files are read in the order of their names, and cut like a file: same ids at every try.
- Only appends are followed. A version that rewrites rows is set aside with the reason, and the next one follows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import pyarrow as pa
from deltalake import DeltaTable as Table
from deltalake.exceptions import DeltaError

from raymill.actors.contract import arrow_schema
from raymill.actors.incoming import Batch, IsTaken
from raymill.actors.lake_place import Place, in_one_line
from raymill.actors.sources import batch_rows, cut, end_of, named
from raymill.runtime.errors import StoreError
from raymill.runtime.spec import DeltaTable, Source

POLL_S = 0.5
"""Time between two looks for a new version."""
_KEEPS_ROWS = ("OPTIMIZE",)
"""Operations that move rows to other files without changing them."""


class DeltaFollower:
    """Follows a Delta table; a `Stream`."""

    def __init__(self, source: Source, declared: DeltaTable, is_taken: IsTaken) -> None:
        self._source, self._declared, self._is_taken = source, declared, is_taken
        self._prefix = ""
        self._done: int | None = None
        """Newest version whose rows are in the lake."""
        self._newest = 0
        """Newest version that was seen."""
        self._given: Batch | None = None
        self._coming: Iterator[Batch] = iter(())

    def open(self) -> None:
        with _as_store_error(self._declared):
            table = _open(self._declared, self._declared.version)
            self._prefix = f"delta-{str(table.metadata().id)[:13]}"

    def close(self) -> None:
        self._coming = iter(())

    def next(self, wait_s: float) -> Batch | None:
        end = time.monotonic() + wait_s
        with _as_store_error(self._declared):
            while self._given is None:
                self._given = next(self._coming, None) or self._look()
                if self._given is None:
                    if time.monotonic() >= end:
                        return None
                    time.sleep(min(POLL_S, max(0.0, end - time.monotonic())))
        return self._given

    def acknowledge(self, batch: Batch) -> None:
        self._given = None
        version, is_last = batch.position
        if is_last:
            self._done = version

    def waiting(self) -> int | None:
        return None if self._done is None else max(self._newest - self._done, 0)

    def _look(self) -> Batch | None:
        """The first batch of the next version that has any."""
        if self._done is None:
            self._coming = self._beginning()
            if (batch := next(self._coming, None)) is not None:
                return batch
        if self._done is None or self._declared.version is not None:
            return None
        self._newest = _open(self._declared).version()
        while self._done < self._newest:
            self._coming = self._appended(self._done + 1)
            if (batch := next(self._coming, None)) is not None:
                return batch
            self._done += 1  # nothing in it concerns rows
        return None

    def _beginning(self) -> Iterator[Batch]:
        """The snapshot, or what is left of it; nothing where an earlier process has begun to follow."""
        version = self._declared.version
        if version is not None:
            if self._is_taken(end_of(self._of(version))):
                self._done = version
                return
        else:
            version = _open(self._declared).version()
            for earlier in range(version, -1, -1):
                if self._is_taken(end_of(self._of(earlier))):
                    self._done = earlier
                    return
                if self._is_taken(f"{self._of(earlier)}-snapshot"):
                    version = earlier
                    break
            else:
                yield Batch(batch_id=f"{self._of(version)}-snapshot", rows=self._none(), position=(version, False))
        yield from self._batches(version, None)

    def _appended(self, version: int) -> Iterator[Batch]:
        table = _open(self._declared, version)
        before, now = set(_files(_open(self._declared, version - 1))), set(_files(table))
        removed, added = before - now, now - before
        if not (removed or added):
            return
        if removed:
            operation = self._operation(version)
            if operation in _KEEPS_ROWS:
                return
            told = {"table": self._declared.path, "version": version, "operation": operation, "files": len(removed)}
            aside = ((orjson.dumps(told).decode(), "version:rewrites_rows"),)
            yield Batch(batch_id=end_of(self._of(version)), rows=self._none(), rejected=aside, position=(version, True))
            return
        yield from self._batches(version, added)

    def _batches(self, version: int, files: set[str] | None) -> Iterator[Batch]:
        prefix = self._of(version)
        tables = cut(_record_batches(_open(self._declared, version), self._source, files), batch_rows(self._source))
        origin = orjson.dumps({"table": self._declared.path, "version": version}).decode()
        for batch_id, rows in named(prefix, tables, self._source):
            position = (version, batch_id == end_of(prefix))
            yield Batch(batch_id=batch_id, rows=rows, origin=origin, position=position)

    def _operation(self, version: int) -> str:
        told = {entry["version"]: entry.get("operation") for entry in _open(self._declared).history()}
        return str(told.get(version, "unknown"))

    def _of(self, version: int) -> str:
        return f"{self._prefix}-v{version}"

    def _none(self) -> pa.Table:
        return arrow_schema(self._source).empty_table()


def snapshot(declared: DeltaTable, source: Source) -> pa.Table:
    """All rows of the declared version, else of the newest; those of its columns that the source declares.

    Raises:
        StoreError: there is no such table or version, or it can not be read.
    """
    with _as_store_error(declared):
        table = _open(declared, declared.version)
        return pa.Table.from_batches(list(_record_batches(table, source, None)) or [_first_columns(table, source)])


def _open(declared: DeltaTable, version: int | None = None) -> Table:
    return Table(declared.path, version=version, storage_options=Place(declared.path).options)


def _record_batches(table: Table, source: Source, files: set[str] | None) -> Iterator[pa.RecordBatch]:
    dataset = table.to_pyarrow_dataset()
    columns = [name for name in dataset.schema.names if name in source.schema]
    for fragment in sorted(dataset.get_fragments(), key=lambda f: str(f.path)):
        if files is None or fragment.path in files:
            yield from fragment.to_batches(schema=dataset.schema, columns=columns)


def _first_columns(table: Table, source: Source) -> pa.RecordBatch:
    schema = table.to_pyarrow_dataset().schema
    return pa.RecordBatch.from_pylist([], pa.schema([f for f in schema if f.name in source.schema]))


def _files(table: Table) -> list[str]:
    return [str(f.path) for f in table.to_pyarrow_dataset().get_fragments()]


@contextmanager
def _as_store_error(declared: DeltaTable) -> Iterator[None]:
    try:
        yield
    except (DeltaError, OSError, pa.ArrowException) as err:
        raise StoreError(
            f"Delta table {declared.path} can not be read: {in_one_line(err)}; does it exist, and are its credentials "
            f"in the environment?"
        ) from err
