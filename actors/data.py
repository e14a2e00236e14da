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

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors.contract import Checked, check, json_rows
from raymill.actors.keys import KeyIndex, key_hashes, key_tuples
from raymill.actors.lake import Lake
from raymill.actors.row_refs import shared, table_of
from raymill.actors.sources import between, file_batches, read_rows
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
        table = table_of(rows)
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
                rows_ref=shared(checked.accepted),
            )
            self._tell(done, at)
        return done

    def ingest_path(self, source: str, path: str | Path) -> list[Ingested]:
        """Ingest a Parquet, CSV or Arrow file in batches, each once; sent again after a crash, it goes on.

        The batch ids are made from the file's name, size and time of change.

        Raises:
            ContractError: the file is missing, of another kind, or does not fit the source.
        """
        batches = file_batches(Path(path), self._declared(source))
        return [self.ingest(source, rows, batch_id=batch_id) for batch_id, rows in batches]

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


def _pairs(rejected: pa.Table) -> list[tuple[str, str]]:
    return list(zip(rejected["row"].to_pylist(), rejected["reason"].to_pylist(), strict=True))


def _counted(rejected: pa.Table) -> dict[str, int]:
    return dict(sorted(Counter(rejected["reason"].to_pylist()).items()))
