"""DataActor: rows come in, sound ones go to the lake, the others to quarantine with the reason, each exactly once.

Invariants
- The commit of a batch to its source's lake table is the commit of the batch: quarantine is written before it, both
  carry the batch id, nothing is acknowledged before both are durable. A batch that is sent again (blindly, after
  kill -9 at any point) completes what is missing, doubles nothing and is told the same counts.
- No two rows of a source's lake table have the same key; where the source has corrections, the same key and known-at.
  The index of keys is derived from the table: it is built when it is first needed and again whenever the table has
  moved without it.
- A batch id stands for its rows for ever: other rows under a known id are refused.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from raymill.actors.contract import REJECTED_SCHEMA, Checked, check
from raymill.actors.known import Known
from raymill.actors.lake import ATTEMPTS, Lake
from raymill.actors.quarantine import LOG, MEDIA, TABLE, Quarantine
from raymill.actors.quarantine_life import Entry, State, Step, next_step
from raymill.actors.row_refs import shared, table_of
from raymill.actors.row_text import checksums_in, rows_of
from raymill.actors.sources import between, file_batches, read_rows
from raymill.runtime.errors import Conflict, ContractError, SpecError, StoreError
from raymill.runtime.home import Home
from raymill.runtime.messages import Event, Ingested
from raymill.runtime.spec import Source
from raymill.runtime.stores import Stores, places_of
from raymill.runtime.turns import turn

SEEDED = "seeded-"
"""Batches whose id begins so hold rows that were corrupted on purpose; `tally` counts them apart."""

_RESERVED = (TABLE, LOG, MEDIA, "predictions")


T = TypeVar("T")


class _Overtaken(Exception):
    """The table has moved on since the keys in it were looked up."""


class DataActor:
    """Stop 1 of the data: contract, quarantine, exactly-once append, accepted rows as Arrow."""

    def __init__(
        self,
        home: str | Path,
        sources: list[Source],
        record: Callable[[list[Event]], None],
        pipeline: str = "",
        stores: Stores | None = None,
    ) -> None:
        taken = [s.name for s in sources if s.name in _RESERVED]
        if taken:
            raise SpecError(f"source {taken[0]!r} has the name of one of raymill's own lake tables: rename it")
        folders = Home(Path(home))
        self._lake = Lake(places_of(folders, stores or Stores()).lake)
        self._held = Quarantine(self._lake, folders.locks / "quarantine")
        self._known = Known(self._lake)
        self._locks = folders.locks
        self._sources = {s.name: s for s in sources}
        self._record = record
        self._pipeline = pipeline
        self._lock = threading.RLock()

    def start(self) -> None:
        """Bring the lake's tables to the declared columns, and build the key indexes from them."""
        with self._lock:
            for source in self._sources.values():
                self._lake.migrate(source)
                self._known.index(source)

    def stop(self) -> None:
        """Nothing is open that needs closing: every acknowledged batch is durable."""

    def health(self) -> dict[str, Any]:
        """The sources that are taken, and the keys known of each."""
        return {"ok": True, "sources": self._known.counts()}

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
        with self._turn(source):
            done = _until_alone(lambda: self._take(declared, table, batch_id, at))
            self._tell(done, at)
        return done

    def ingest_path(self, source: str, path: str | Path) -> list[Ingested]:
        """Ingest a Parquet, CSV or Arrow file in batches, each once; sent again after a crash, it goes on.

        The batch ids are made from the file's name, size and time of change.

        Raises:
            ContractError: the file is missing, of another kind, or does not fit the source.
        """
        batches = file_batches(path, self._declared(source))
        return [self.ingest(source, rows, batch_id=batch_id) for batch_id, rows in batches]

    def load_history(self, source: str, until: int) -> Ingested:
        """Ingest, as one batch, what the source's `read` gives with event times before `until` (µs UTC).

        Raises:
            ContractError: the source has no `read`, or what it gives does not fit.
        """
        declared = self._declared(source)
        rows = between(read_rows(declared), declared, None, until)
        return self.ingest(source, rows, batch_id=f"history-until-{until}")

    def has_batch(self, source: str, batch_id: str) -> bool:
        """Whether the batch was taken in."""
        return self._lake.has_batch(self._declared(source).name, batch_id)

    def set_aside(self, source: str, what: Sequence[tuple[str, str]], *, batch_id: str) -> None:
        """Quarantine, once, what never became a row: an entry or a file, as JSON, with the reason.

        Raises:
            StoreError: the lake can not be written; doing it again is safe.
        """
        rejected = pa.table([list(column) for column in zip(*what, strict=True)], schema=REJECTED_SCHEMA)
        with self._turn(self._declared(source).name):
            self._held.put(source, batch_id, rejected, {}, None)

    def quarantine(
        self,
        ids: Sequence[str] | None = None,
        *,
        source: str | None = None,
        reason: str | None = None,
        state: State | None = None,
    ) -> list[Entry]:
        """The refused rows as they now stand; arguments and errors as in `Quarantine.quarantine`."""
        return self._held.quarantine(ids, source=source, reason=reason, state=state)

    def fix(self, changes: dict[str, dict[str, Any]]) -> list[Entry]:
        """Change columns of refused rows; errors as in `Quarantine.fix`."""
        return self._held.fix(changes, {name: s.schema.keys() for name, s in self._sources.items()})

    def discard(self, ids: Sequence[str], why: str) -> int:
        """Close refused rows for good; errors as in `Quarantine.discard`."""
        return self._held.discard(ids, why)

    def reingest(self, ids: Sequence[str]) -> list[Ingested]:
        """Hold refused rows against the contract again and append, once, those that pass; the others stay, open.

        What an earlier call began and did not end comes first, whatever is asked for; rows that are closed already
        are passed over. What comes back is to be taken in by the features, and then told to `settle`: a call that is
        made again before that gives the same batches again.

        Raises:
            UnknownRow: an id is of no quarantined row.
            ContractError: a row is of a source that this pipeline does not have.
            StoreError: the lake can not be written; calling again is safe.
        """
        with self._held.turn():
            chosen = [e for e in self._held.quarantine(ids) if e.state is State.OPEN]
            for name in {e.source for e in chosen}:
                self._declared(name)
            self._held.begin(chosen)
            return _until_alone(self._land_all)

    def settle(self, batch_id: str) -> int:
        """Close the rows of a reingest whose batch is in the lake; how many."""
        with self._held.turn():
            landed = self._held.landing(batch_id)
            if landed and self._lake.batch_rows(landed[0].source, batch_id) is None:
                raise Conflict(f"reingest {batch_id!r} is not in the lake yet: call reingest again, then settle")
            self._held.tell([next_step(e, Step.LANDED) for e in landed])
        return len(landed)

    def tally(self) -> dict[str, Any]:
        """Counts for summary and status, from the lake alone.

        `ingested {source: n}`, `without_label {source: n}` (rows whose `known_at` is null, where one is declared),
        `quarantined {reason: n}` and `seeded_bad {reason: n}` (those of batches named `seeded-…`): rows that were
        refused and have not been reingested since.
        """
        held = {n: s for n, s in self._sources.items() if self._lake.version(n) is not None}
        bad = [e for e in self._held.quarantine() if e.state is not State.REINGESTED]
        return {
            "ingested": {n: self._lake.count(n) for n in held},
            "without_label": {
                n: self._lake.read(n, columns=[s.known_at])[s.known_at].null_count
                for n, s in held.items()
                if s.known_at
            },
            "quarantined": _counted([e.reason for e in bad if not e.batch_id.startswith(SEEDED)]),
            "seeded_bad": _counted([e.reason for e in bad if e.batch_id.startswith(SEEDED)]),
        }

    def _declared(self, source: str) -> Source:
        if source not in self._sources:
            raise ContractError(f"source {source!r} is not declared; this pipeline has {sorted(self._sources)}")
        return self._sources[source]

    def _take(self, source: Source, rows: pa.Table, batch_id: str, at: int | None) -> Ingested:
        """One try of a batch; raises `_Overtaken` where another host appended to the table meanwhile."""
        appended = self._lake.batch_rows(source.name, batch_id)
        before = self._held.refused_before(source.name, batch_id, rows)
        if appended is None:
            checked = check(rows, source, self._known.look_up(source), at=at, before=before)
            self._held.put(source.name, batch_id, checked.rejected, checked.blobs, at)
            version = self._append(source, checked.accepted, batch_id)
        else:  # the lake holds the batch's own keys now: the verdict is the one that was given then
            checked = check(rows, source, before=before)
            _refuse_other_rows(source.name, batch_id, checked, appended)
            version = self._lake.version(source.name) or 0
        done = _ingested(source.name, batch_id, checked, version, duplicate=appended is not None)
        if done.duplicate and before is not None:
            return replace(done, rows_ref=shared(self._with_mended(source, batch_id, checked.accepted)))
        return done

    def _land_all(self) -> list[Ingested]:
        batches = self._held.begun(self._sources.keys())
        return [self._land(batch_id, entries) for batch_id, entries in batches.items()]

    def _land(self, batch_id: str, entries: Sequence[Entry]) -> Ingested:
        """Append the rows of a reingest that pass; the others are told first, so that the batch holds all the rest."""
        declared = self._declared(entries[0].source)
        rows, strange = self._read_back(declared, entries)
        with self._turn(declared.name):
            appended = self._lake.batch_rows(declared.name, batch_id)
            lake = self._known.look_up(declared) if appended is None else None
            checked = check(rows, declared, lake, before=strange, whole=False)
            version = self._lake.version(declared.name) or 0
            if appended is not None:
                _refuse_other_rows(declared.name, batch_id, checked, appended)
            else:
                pairs = zip(entries, checked.reasons, strict=True)
                self._held.tell([next_step(e, Step.REFUSED, batch_id=batch_id, reason=why) for e, why in pairs if why])
                if checked.accepted.num_rows:
                    version = self._append(declared, checked.accepted, batch_id)
            done = _ingested(declared.name, batch_id, checked, version, duplicate=appended is not None)
            self._tell(done, None)
        return done

    def _read_back(self, source: Source, entries: Sequence[Entry]) -> tuple[pa.Table, np.ndarray]:
        texts = [e.row for e in entries]
        return rows_of(texts, source, self._held.blobs(checksums_in(texts, source)))

    def _with_mended(self, source: Source, batch_id: str, accepted: pa.Table) -> pa.Table:
        """The batch's accepted rows and those that were refused then and reingested since: all that the lake has."""
        landed = self._held.quarantine(source=source.name, state=State.REINGESTED)
        rows, strange = self._read_back(source, [e for e in landed if e.batch_id == batch_id])
        return pa.concat_tables([accepted, check(rows, source, before=strange, whole=False).accepted])

    def _append(self, source: Source, accepted: pa.Table, batch_id: str) -> int:
        after = self._known.version(source)
        try:
            version = self._lake.append(source.name, accepted, batch_id=batch_id, after=after, by=source.time)
        except Conflict as err:
            raise _Overtaken from err
        self._known.appended(source, accepted, version)
        return version

    @contextmanager
    def _turn(self, source: str) -> Iterator[None]:
        """Alone with the source, also among processes: another pipeline may read the same one."""
        with self._lock, turn(self._locks / source):
            yield

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


def _until_alone(work: Callable[[], T]) -> T:
    """What `work` gives, tried again where another host's writer came between its look at the lake and its append."""
    for _ in range(ATTEMPTS):
        try:
            return work()
        except _Overtaken as err:
            last = err
    raise StoreError(f"{ATTEMPTS} times another writer was first ({last.__cause__}): send the batch again") from last


def _ingested(source: str, batch_id: str, checked: Checked, version: int, *, duplicate: bool) -> Ingested:
    return Ingested(
        source=source,
        batch_id=batch_id,
        lake_version=version,
        accepted=checked.accepted.num_rows,
        quarantined=_counted(checked.rejected["reason"].to_pylist()),
        duplicate=duplicate,
        rows_ref=shared(checked.accepted),
    )


def _refuse_other_rows(source: str, batch_id: str, checked: Checked, appended: int) -> None:
    if checked.accepted.num_rows != appended:
        raise Conflict(
            f"batch {batch_id!r} of source {source!r} appended {appended} rows before, but these make "
            f"{checked.accepted.num_rows}: give other rows an id of their own"
        )


def _counted(reasons: list[str]) -> dict[str, int]:
    return dict(sorted(Counter(reasons).items()))
