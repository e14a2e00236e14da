"""The lake: one Delta table per source, in a folder or an object store, every batch in it exactly once.

Invariants
- A batch id is written into the same Delta commit as the batch's rows (a transaction id of the protocol), so a
  batch that is sent again, after a crash or by two writers at once, is appended once.
- A commit is one atomic file (in an object store: a conditional put): kill -9 at any point leaves either the whole
  batch or nothing.
- Rows come back in no particular order; what needs one sorts.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from raymill.actors.lake_cache import PartCache
from raymill.actors.lake_layout import FEWEST
from raymill.actors.lake_migrations import add_missing, migrate
from raymill.actors.lake_place import Place, as_store_error
from raymill.actors.lake_upkeep import (
    KEEP_LOG,
    SORTED_BY,
    Described,
    Merged,
    Vacuumed,
    added_rows,
    compact,
    describe,
    first_whole,
    is_whole,
    parts_of,
    vacuum,
)
from raymill.actors.parts import Parts
from raymill.actors.plain_pages import writer_properties
from raymill.runtime.errors import Conflict, ContractError, StoreError
from raymill.runtime.home import current_home
from raymill.runtime.spec import Source

ATTEMPTS = 20
"""Rounds of look-then-write when other writers get in between (each round has delta-rs' own 15 retries in it)."""
UPKEEP_EVERY = 32
"""Versions after which a table's log is checkpointed and its small parts are merged.

A table that stays open gets slower with every commit it has seen: 9 ms an append at first, 54 ms after 400.
"""


class Lake:
    """The Delta tables under one folder or URL; safe for several threads, processes and hosts at once."""

    def __init__(self, root: str | Path, cache: Path | None = None) -> None:
        """A lake.

        Args:
            root: a folder, or an object store's URL, e.g. `s3://bucket/prefix`; its keys come from the environment.
            cache: where copies of an object store's parts are kept; absent: in RAYMILL_HOME.
        """
        self.root = str(root)
        self._place = Place(root)
        self._cache = PartCache(cache or current_home().parts)
        self._writers: dict[str, DeltaTable] = {}
        self._opened: dict[str, int] = {}
        self._looked_up: dict[str, tuple[str, int, int | None]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def append(
        self, table: str, rows: pa.Table, *, batch_id: str, after: int | None = None, by: str | None = None
    ) -> int:
        """Append `rows` once and return a version of the table that holds them.

        A batch id that was appended before writes nothing and returns the present version. The first batch
        makes the table, with its columns and types. An empty batch is remembered like any other. Now and then
        small parts are merged on the way.

        Args:
            table: name of the table.
            rows: Arrow table with the table's columns, in any order.
            batch_id: what the batch is known by for ever.
            after: the rows hold for that version of the table alone: where it has moved on nothing is written.
            by: column whose order merged parts keep (the event time), if this batch makes the table.

        Raises:
            Conflict: the table is no longer at version `after`.
            ContractError: the columns are not those of the table.
            StoreError: the table can not be written.
        """
        with self._lock_of(table), as_store_error(self._place, table, "append to"):
            for _ in range(ATTEMPTS):
                writer = self._writer(table, rows.schema, by)
                if self._rows_of(table, writer, batch_id) is not None:
                    return writer.version()
                _check_columns(table, writer, rows)
                if after is not None and writer.version() != after:
                    raise Conflict(f"lake table {table!r} is at version {writer.version()}, no longer at {after}")
                try:
                    return self._settled(table, _commit(writer, rows, batch_id, alone=after is not None))
                except CommitFailedError:  # another writer was first, perhaps with this very batch: look again
                    self._writers.pop(table, None)
        raise StoreError(
            f"batch {batch_id!r} could not be appended to lake table {table!r}: {ATTEMPTS} times another writer was "
            f"first; send it again, it is appended once"
        )

    def read(
        self,
        table: str,
        *,
        version: int | None = None,
        columns: Sequence[str] | None = None,
        where: list[tuple[str, str, Any]] | None = None,
        or_later: bool = False,
        since: int | None = None,
    ) -> pa.Table:
        """The rows of a version (the newest if none is named), in no particular order.

        Args:
            table: name of the table.
            version: what `append` or `version` returned at some time.
            columns: the columns wanted; absent: all.
            where: `(column, operator, value)` triples that must all hold; operators as in pyarrow, `in` included.
            or_later: where that version was vacuumed, the next one that was not: it has all its rows, and perhaps more.
            since: an earlier version: only from the files that came after it, so all rows that it lacks, and perhaps
                more (of files that were merged); from all files, where it is no longer known.

        Raises:
            StoreError: there is no such table or version, or it is damaged.
        """
        with as_store_error(self._place, table, "read"):
            if or_later and version is not None:
                version = first_whole(self._place, table, version)
            found = self._place.open(table, version)
            known = None if since is None else self._parts_at(table, since)
            if known is not None:
                return added_rows(found, known, columns, where)
            return found.to_pyarrow_table(columns=list(columns) if columns is not None else None, filters=where)

    def _parts_at(self, table: str, version: int) -> set[str] | None:
        """Paths of a version's files; None: its log was cleaned away."""
        try:
            return {part.path for part in parts_of(self._place.open(table, version))}
        except DeltaError:
            return None

    def parts(self, table: str, *, version: int | None = None, by: str | None = None) -> Parts:
        """The files of a version as they are stored, for the point-in-time join; ordered `by` a column's least value.

        Raises:
            StoreError: there is no such table or version.
        """
        with as_store_error(self._place, table, "read"):
            found = self._place.open(table, version)
            parts = [(p.path, p.size) for p in parts_of(found)]
            uri = self._place.uri(table)
            if self._place.is_local:
                paths = [Path(uri, path) for path, _ in parts]
            else:
                paths = self._cache.fetch(self._place.files(table), uri, parts)
            return Parts(paths, by=by, schema=pa.schema(found.schema().to_arrow()))

    def version(self, table: str) -> int | None:
        """Newest version of the table; None: there is none yet."""
        with self._lock_of(table), as_store_error(self._place, table, "look at"):
            writer = self._writer(table, None)
            return None if writer is None else writer.version()

    def batch_rows(self, table: str, batch_id: str) -> int | None:
        """Number of rows that the batch appended; None: it was never appended."""
        with self._lock_of(table), as_store_error(self._place, table, "look at"):
            writer = self._writer(table, None)
            return None if writer is None else self._rows_of(table, writer, batch_id)

    def has_batch(self, table: str, batch_id: str) -> bool:
        """Whether the batch was appended."""
        return self.batch_rows(table, batch_id) is not None

    def count(self, table: str, *, version: int | None = None) -> int:
        """Rows in a version, the newest if none is named, from the log alone; 0: there is no such table."""
        with self._lock_of(table), as_store_error(self._place, table, "count"):
            found = self._writer(table, None) if version is None else self._place.open(table, version)
            return 0 if found is None else int(found.count())

    def tables(self) -> list[str]:
        """Names of the tables, sorted."""
        with as_store_error(self._place, "*", "list"):
            return self._place.tables()

    def migrate(self, source: Source) -> int | None:
        """Bring a source's table to its declared columns, as `lake_migrations.migrate`."""
        return migrate(self._place, source)

    def add_columns(self, table: str, schema: pa.Schema) -> None:
        """Give a table the columns that it lacks of a schema, null in its old rows (`lake_migrations.add_missing`)."""
        with self._lock_of(table), as_store_error(self._place, table, "add columns to"):
            writer = self._writer(table, None)
            if writer is not None and {f.name for f in writer.schema().fields}.issuperset(schema.names):
                return
            self._writers.pop(table, None)
            add_missing(self._place, table, schema)

    def is_whole(self, table: str, version: int) -> bool:
        """Whether a version can be read: none of its files was vacuumed."""
        with as_store_error(self._place, table, "look at"):
            return is_whole(self._place, table, version)

    def describe(self, table: str) -> Described:
        """A table in numbers, as `lake_upkeep.describe`."""
        return describe(self._place, table)

    def compact(self, table: str, *, fewest: int = FEWEST) -> Merged | None:
        """Merge small parts in the order of time, as `lake_upkeep.compact`."""
        return compact(self._place, table, fewest=fewest)

    def vacuum(
        self,
        table: str,
        *,
        pins: Collection[int],
        older_than_s: float,
        now_s: float | None = None,
        dry_run: bool = False,
    ) -> Vacuumed:
        """Remove files that no pinned, newest or young version needs, as `lake_upkeep.vacuum`."""
        return vacuum(self._place, table, pins=pins, older_than_s=older_than_s, now_s=now_s, dry_run=dry_run)

    def _settled(self, table: str, version: int) -> int:
        """The version after an append, or the one that merged parts of it, if no other batch came between."""
        if version % UPKEEP_EVERY:
            return version
        self._writers.pop(table).create_checkpoint()
        merged = compact(self._place, table)
        return version + 1 if merged and merged.version == version + 1 else version

    def _lock_of(self, table: str) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(table, threading.Lock())

    def _rows_of(self, table: str, writer: DeltaTable, batch_id: str) -> int | None:
        # Kept for one batch a table: who asks whether a batch is there appends it next, and a look costs 6 ms.
        version = writer.version()
        if table not in self._looked_up or self._looked_up[table][:2] != (batch_id, version):
            self._looked_up[table] = (batch_id, version, writer.transaction_version(batch_id))
        return self._looked_up[table][2]

    def _writer(self, table: str, schema: pa.Schema | None, by: str | None = None) -> Any:
        """The table as it is now: kept open and caught up, opened, or made from `schema`; None if it is absent."""
        kept = self._writers.get(table)
        if kept is not None:
            # Catching up costs 4 ms even where nothing is new; every commit is the file of the next number.
            if self._place.has_version(table, kept.version() + 1):
                kept.update_incremental()
            if kept.version() - self._opened[table] < 2 * UPKEEP_EVERY:
                return kept
        elif not self._place.has(table):
            if schema is None:
                return None
            _create(self._place, table, schema, by)
        self._writers[table] = self._place.open(table)
        self._opened[table] = self._writers[table].version()
        return self._writers[table]


def _create(place: Place, table: str, schema: pa.Schema, by: str | None) -> None:
    uri = place.uri(table)
    if place.is_local:
        Path(uri).mkdir(parents=True, exist_ok=True)
    properties = {"delta.enableExpiredLogCleanup": "false"} | ({SORTED_BY: by} if by else {})
    try:
        DeltaTable.create(
            uri,
            schema,
            mode="ignore",
            configuration=properties,
            storage_options=place.options,
            raise_if_key_not_exists=False,
            # No retries: delta-rs would commit the loser of a race as version 1, with other metadata than 0 has.
            commit_properties=CommitProperties(max_commit_retries=0),
        )
    except CommitFailedError:
        if not place.has(table):  # else another writer made it first, and its table is as good
            raise


def _check_columns(table: str, writer: DeltaTable, rows: pa.Table) -> None:
    # Compared as Delta types: Arrow has several types (large, fixed-size) for each of those.
    has = {f.name: f.type for f in writer.schema().fields}
    given = {f.name: f.type for f in Schema.from_arrow(rows.schema).fields}
    if has != given:
        wrong = sorted(n for n in has.keys() | given.keys() if has.get(n) != given.get(n))
        told = ", ".join(f"{n} is {given.get(n, 'missing')} instead of {has.get(n, 'absent')}" for n in wrong)
        raise ContractError(f"the rows do not have the columns of lake table {table!r}: {told}")


def _commit(writer: DeltaTable, rows: pa.Table, batch_id: str, *, alone: bool) -> int:
    # The number of a transaction is the writer's to choose: the rows of the batch are what a retry wants to know.
    transaction = Transaction(batch_id, rows.num_rows)
    properties = CommitProperties(app_transactions=[transaction], max_commit_retries=0 if alone else None)
    if rows.num_rows:
        # In one piece: delta-rs writes pieces in any order, and rows that come in the order of time should stay so.
        whole = rows.select([f.name for f in writer.schema().fields]).combine_chunks()
        write_deltalake(
            writer,
            whole,
            mode="append",
            commit_properties=properties,
            post_commithook_properties=KEEP_LOG,
            writer_properties=writer_properties(whole),
        )
    else:
        writer.create_write_transaction(
            [], "append", writer.schema(), commit_properties=properties, post_commithook_properties=KEEP_LOG
        )
        writer.update_incremental()
    return writer.version()
