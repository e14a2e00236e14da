"""DataActor: rows come in, sound ones go to the lake, the others to quarantine with the reason, each exactly once.

Invariants
- The commit of a batch to its source's lake table is the commit of the batch: quarantine is written before it, both
  carry the batch id, nothing is acknowledged before both are durable. A batch that is sent again (blindly, after
  kill -9 at any point) completes what is missing, doubles nothing and is told the same counts.
- No two rows of a source's lake table have the same key. The index of keys is derived from the table: it is built
  when it is first needed and again whenever the table has moved without it.
- A batch id stands for its rows for ever: other rows under a known id are refused.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from raymill.actors.contract import Checked, KeyIndex, check, event_times, json_rows, key_hashes, key_tuples
from raymill.actors.lake import Lake
from raymill.runtime.errors import Conflict, ContractError, SpecError
from raymill.runtime.expressions import digest
from raymill.runtime.home import Home
from raymill.runtime.messages import Event, Ingested
from raymill.runtime.spec import Source

QUARANTINE = "quarantine"
"""Lake table of rejected rows."""
QUARANTINE_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("batch_id", pa.string()),
        ("row", pa.string()),
        ("reason", pa.string()),
        ("wall_s", pa.float64()),
        ("at", pa.timestamp("us", "UTC")),
    ]
)
SEEDED = "seeded-"
"""Batches whose id begins so hold rows that were corrupted on purpose; `tally` counts them apart."""
FILE_BATCH_ROWS = 131_072
"""Rows of one batch of a large file; part of the batch's id, so that a retry cuts the file at the same places."""

_RESERVED = (QUARANTINE, "predictions")


class DataActor:
    """Stop 1 of the data: contract, quarantine, exactly-once append, accepted rows as Arrow."""

    def __init__(
        self, home: str | Path, sources: list[Source], record: Callable[[list[Event]], None], pipeline: str = ""
    ) -> None:
        taken = [s.name for s in sources if s.name in _RESERVED]
        if taken:
            raise SpecError(f"source {taken[0]!r} has the name of one of raymill's own lake tables: rename it")
        self._lake = Lake(Home(Path(home)).lake)
        self._sources = {s.name: s for s in sources}
        self._record = record
        self._pipeline = pipeline
        self._indexes: dict[str, tuple[int | None, KeyIndex]] = {}
        self._lock = threading.RLock()

    def start(self) -> None:
        """Build the key indexes from the lake."""
        with self._lock:
            for source in self._sources.values():
                self._index(source)

    def stop(self) -> None:
        """Nothing is open that needs closing: every acknowledged batch is durable."""

    def health(self) -> dict[str, Any]:
        """The sources that are taken, and the keys known of each."""
        return {"ok": True, "sources": {n: len(i) for n, (_, i) in self._indexes.copy().items()}}

    def ingest(self, source: str, rows: Any, *, batch_id: str, at: int | None = None) -> Ingested:
        """Check a batch, quarantine its bad rows, append the others once, and give back the accepted ones.

        Args:
            source: name of a declared source.
            rows: Arrow table, or a reference to one in Ray's object store.
            batch_id: idempotency key, unique within the source; the same id must stand for the same rows.
            at: present event time, µs UTC, against which the source's freshness is held; absent: it is not.

        Raises:
            ContractError: the batch as a whole does not fit the source; nothing was written.
            Conflict: the batch id was used for another number of rows.
            StoreError: the lake can not be written; sending the batch again is safe.
        """
        declared = self._declared(source)
        table = _table(rows)
        with self._lock:
            appended = self._lake.batch_rows(source, batch_id)
            if appended is None:
                index = self._index(declared)
                checked = check(table, declared, known=lambda keys: self._known(declared, index, keys), at=at)
                self._quarantine(source, batch_id, checked.rejected, at)
                version = self._append(declared, index, checked.accepted, batch_id)
            else:
                checked = self._checked_before(declared, table, batch_id, appended)
                version = self._lake.version(source) or 0
            done = Ingested(
                source=source,
                batch_id=batch_id,
                lake_version=version,
                accepted=checked.accepted.num_rows,
                quarantined=_counted(checked.rejected),
                duplicate=appended is not None,
                rows_ref=_shared(checked.accepted),
            )
            self._tell(done, at)
        return done

    def ingest_path(self, source: str, path: str | Path) -> list[Ingested]:
        """Ingest a Parquet, CSV or Arrow file in batches, each once; sent again after a crash, it goes on.

        The batch ids are made from the file's name, size and time of change.

        Raises:
            ContractError: the file is missing, of another kind, or does not fit the source.
        """
        where = Path(path)
        prefix = f"{where.name}-{_fingerprint(where)}"
        batches = read_batches(where, self._declared(source))
        return [self.ingest(source, rows, batch_id=f"{prefix}-{i}") for i, rows in enumerate(batches)]

    def load_history(self, source: str, until: int) -> Ingested:
        """Ingest, as one batch, what the source's `read` gives with event times before `until` (µs UTC).

        Raises:
            ContractError: the source has no `read`, or what it gives does not fit.
        """
        declared = self._declared(source)
        rows = between(read_rows(declared), declared, None, until)
        return self.ingest(source, rows, batch_id=f"history-until-{until}")

    def quarantine(self, source: str | None = None) -> pa.Table:
        """The rejected rows (of one source), newest last: source, batch_id, row (JSON), reason, wall_s, at."""
        if self._lake.version(QUARANTINE) is None:
            return QUARANTINE_SCHEMA.empty_table()
        found = self._lake.read(QUARANTINE, where=[("source", "=", source)] if source else None)
        return found.sort_by([("wall_s", "ascending"), ("batch_id", "ascending")])

    def tally(self) -> dict[str, Any]:
        """Counts for summary and status, from the lake alone.

        `ingested {source: n}`, `without_label {source: n}` (rows whose `known_at` is null, where one is declared),
        `quarantined {reason: n}` and `seeded_bad {reason: n}` (those of batches named `seeded-…`).
        """
        held = {n: s for n, s in self._sources.items() if self._lake.version(n) is not None}
        bad = self.quarantine()
        seeded = pc.starts_with(bad["batch_id"], SEEDED)
        return {
            "ingested": {n: self._lake.count(n) for n in held},
            "without_label": {
                n: self._lake.read(n, columns=[s.known_at])[s.known_at].null_count
                for n, s in held.items()
                if s.known_at
            },
            "quarantined": _counted(bad.filter(pc.invert(seeded))),
            "seeded_bad": _counted(bad.filter(seeded)),
        }

    def _declared(self, source: str) -> Source:
        if source not in self._sources:
            raise ContractError(f"source {source!r} is not declared; this pipeline has {sorted(self._sources)}")
        return self._sources[source]

    def _index(self, source: Source) -> KeyIndex:
        """The keys in the lake now; rebuilt if the table is not at the version the index was last brought to."""
        version = self._lake.version(source.name)
        if source.name in self._indexes and self._indexes[source.name][0] == version:
            return self._indexes[source.name][1]
        index = KeyIndex()
        if version is not None:
            index.add(key_hashes(self._lake.read(source.name, version=version, columns=source.key)))
        self._indexes[source.name] = (version, index)
        return index

    def _known(self, source: Source, index: KeyIndex, keys: pa.Table) -> np.ndarray:
        """Bool [n]: which keys the lake holds; a hit in the index is confirmed by the rows themselves."""
        found = index.maybe(key_hashes(keys))
        hits = np.flatnonzero(found)
        if len(hits):
            suspects = keys.take(hits)
            where = [(c, "in", suspects[c].unique().to_pylist()) for c in source.key]
            held = set(key_tuples(self._lake.read(source.name, columns=source.key, where=where)))
            found[hits] = [key in held for key in key_tuples(suspects)]
        return found

    def _append(self, source: Source, index: KeyIndex, accepted: pa.Table, batch_id: str) -> int:
        version = self._lake.append(source.name, accepted, batch_id=batch_id)
        index.add(key_hashes(accepted.select(list(source.key))))
        self._indexes[source.name] = (version, index)
        return version

    def _quarantine(self, source: str, batch_id: str, rejected: pa.Table, at: int | None) -> None:
        """Append the rejected rows that quarantine does not hold yet from an earlier, unfinished try."""
        if not rejected.num_rows:
            return
        # Between an unfinished try and this one other batches may have come, and made more rows duplicates.
        missing = sorted((Counter(_pairs(rejected)) - self._held(source, batch_id)).elements())
        if not missing:
            return
        n = len(missing)
        columns = [[source] * n, [batch_id] * n, *zip(*missing, strict=True), [time.time()] * n, [at] * n]
        rows = pa.table(
            [pa.array(c, f.type) for c, f in zip(columns, QUARANTINE_SCHEMA, strict=True)], QUARANTINE_SCHEMA
        )
        self._lake.append(QUARANTINE, rows, batch_id=f"{source}/{batch_id}/{digest(missing)}")

    def _held(self, source: str, batch_id: str) -> Counter[tuple[str, str]]:
        if self._lake.version(QUARANTINE) is None:
            return Counter()
        where = [("source", "=", source), ("batch_id", "=", batch_id)]
        return Counter(_pairs(self._lake.read(QUARANTINE, where=where, columns=["row", "reason"])))

    def _checked_before(self, source: Source, rows: pa.Table, batch_id: str, appended: int) -> Checked:
        """The verdict over a batch that is in the lake, as it was given then (the lake now holds its own keys)."""
        checked = check(rows, source)
        # Rows that quarantine holds as duplicates, though within the batch they are none, had a key known before.
        lost = self._held(source.name, batch_id) - Counter(_pairs(checked.rejected))
        if lost:
            texts = {text for text, _ in lost}
            there = [i for i, text in enumerate(json_rows(rows)) if text in texts]
            then = set(key_tuples(check(rows.take(there), source).accepted.select(list(source.key))))
            checked = check(rows, source, known=lambda keys: np.array([k in then for k in key_tuples(keys)], np.bool_))
        if checked.accepted.num_rows != appended:
            raise Conflict(
                f"batch {batch_id!r} of source {source.name!r} appended {appended} rows before, but these make "
                f"{checked.accepted.num_rows}: give other rows an id of their own"
            )
        return checked

    def _tell(self, done: Ingested, at: int | None) -> None:
        self._record(
            [
                Event(
                    kind="rows.appended",
                    subject=done.source,
                    pipeline=self._pipeline,
                    at=at,
                    wall_s=time.time(),
                    data={
                        "batch_id": done.batch_id,
                        "lake_version": done.lake_version,
                        "accepted": done.accepted,
                        "quarantined": done.quarantined,
                    },
                    key=f"rows.appended/{done.source}/{done.batch_id}",
                )
            ]
        )


def read_rows(source: Source) -> pa.Table:
    """All rows that the source's `read` gives, unchecked.

    Raises:
        ContractError: the source has no `read`, or it gives no Arrow table.
    """
    if source.read is None:
        raise ContractError(f"source {source.name!r} declares no `read`: its rows are only sent in")
    rows = source.read() if callable(source.read) else pa.concat_tables(read_batches(Path(source.read), source))
    if not isinstance(rows, pa.Table):
        raise ContractError(f"`read` of source {source.name!r} gave {type(rows).__name__}: return an Arrow table")
    return rows


def between(rows: pa.Table, source: Source, start_at: int | None, end_at: int | None) -> pa.Table:
    """The rows with event time in [start_at, end_at), µs UTC; an absent end is open.

    Rows whose time is null or unreadable go with the slice that has no start, so that each row is in one slice.
    """
    times = event_times(rows, source)
    wanted = times.is_valid() if start_at is not None else pa.array(np.ones(rows.num_rows, np.bool_))
    if start_at is not None:
        wanted = pc.and_(wanted, pc.fill_null(pc.greater_equal(times, pa.scalar(start_at, times.type)), False))
    if end_at is not None:
        wanted = pc.and_(wanted, pc.fill_null(pc.less(times, pa.scalar(end_at, times.type)), start_at is None))
    return rows.filter(wanted).combine_chunks()


def read_batches(path: Path, source: Source) -> Iterator[pa.Table]:
    """A Parquet, CSV or Arrow file in tables of `FILE_BATCH_ROWS` (the last may be shorter), in the file's order.

    Raises:
        ContractError: the file is missing, damaged, or of another kind.
    """
    waiting: list[pa.RecordBatch] = []
    try:
        for batch in _record_batches(path, source):
            waiting.append(batch)
            while sum(b.num_rows for b in waiting) >= FILE_BATCH_ROWS:
                table = pa.Table.from_batches(waiting)
                yield table.slice(0, FILE_BATCH_ROWS)
                waiting = table.slice(FILE_BATCH_ROWS).to_batches()
    except (OSError, pa.ArrowInvalid) as err:
        raise ContractError(f"{path} for source {source.name!r} can not be read: {err}") from err
    if waiting:
        yield pa.Table.from_batches(waiting)


def _record_batches(path: Path, source: Source) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        yield from pq.ParquetFile(path).iter_batches(FILE_BATCH_ROWS)
    elif path.suffix == ".csv":
        # All text: the contract parses, so that one bad value costs its row and not the file.
        texts = dict.fromkeys(source.schema, pa.string())
        options = pacsv.ConvertOptions(column_types=texts, null_values=[""], strings_can_be_null=True)
        yield from pacsv.open_csv(path, convert_options=options)
    elif path.suffix in (".arrow", ".feather", ".ipc"):
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        raise ContractError(f"{path} for source {source.name!r}: only .parquet, .csv, .arrow, .feather, .ipc are read")


def _fingerprint(path: Path) -> str:
    try:
        facts = path.stat()
    except OSError as err:
        raise ContractError(f"{path} can not be read: {err}") from err
    return digest(path.name, facts.st_size, facts.st_mtime_ns)


def _table(rows: Any) -> pa.Table:
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    ray = sys.modules.get("ray")
    if ray is not None and isinstance(rows, ray.ObjectRef):
        rows = ray.get(rows)
    if not isinstance(rows, pa.Table):
        raise ContractError(f"rows must be an Arrow table, not {type(rows).__name__}")
    return rows


def _shared(rows: pa.Table) -> Any:
    """A reference in the object store; without Ray the table itself."""
    ray = sys.modules.get("ray")
    return ray.put(rows) if ray is not None and ray.is_initialized() else rows


def _pairs(rejected: pa.Table) -> list[tuple[str, str]]:
    return list(zip(rejected["row"].to_pylist(), rejected["reason"].to_pylist(), strict=True))


def _counted(rejected: pa.Table) -> dict[str, int]:
    return dict(sorted(Counter(rejected["reason"].to_pylist()).items()))
