"""Quarantine: every refused row under an id of its own, and the log of all that was done to it since.

Invariants
- Append-only lake tables hold everything: `quarantine`, the rows as they came, `quarantine_media`, the bytes that
  their texts name, and `quarantine_log`, the steps of their lives. What a row is now is computed from them; nothing
  is ever overwritten.
- A row that was refused in a batch stays refused in that batch, however often the batch is sent: a later try of it
  may find the row's parent there, and would else bring in a row that quarantine holds as well.
- Only the holder of `turn()` appends to the log, one process at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raymill.actors.lake import Lake
from raymill.actors.quarantine_life import Done, Entry, State, Step, entry_ids, landing_id, lived, next_step, patched
from raymill.actors.row_text import checksum, json_rows
from raymill.runtime.errors import UnknownRow
from raymill.runtime.expressions import digest
from raymill.runtime.turns import turn

TABLE, LOG, MEDIA = "quarantine", "quarantine_log", "quarantine_media"
"""Lake tables of the refused rows, of what was done to them, and of their media."""
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("batch_id", pa.string()),
        ("row", pa.string()),
        ("reason", pa.string()),
        ("wall_s", pa.float64()),
        ("at", pa.timestamp("us", "UTC")),
    ]
)
LOG_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("number", pa.int64()),
        ("step", pa.string()),
        ("row", pa.string()),
        ("batch_id", pa.string()),
        ("reason", pa.string()),
        ("wall_s", pa.float64()),
    ]
)

MEDIA_SCHEMA = pa.schema([("sha256", pa.string()), ("bytes", pa.binary())])
BATCH_ROWS = 16_384
"""Most rows of one batch of a reingest."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Quarantine:
    """The refused rows of one home."""

    def __init__(self, lake: Lake, lock: Path) -> None:
        """Nothing is opened.

        Args:
            lake: where the tables are.
            lock: file by which the processes of this host take turns.
        """
        self._lake = lake
        self._lock = lock
        self._batches: tuple[int | None, set[tuple[str, str]]] = (None, set())

    def refused_before(self, source: str, batch_id: str, rows: pa.Table) -> np.ndarray | None:
        """Reason [n] for which an earlier try of the batch refused a row, empty where it did not; None: none did."""
        held = self._held(source, batch_id)
        if not held:
            return None
        reasons = np.full(rows.num_rows, "", dtype=object)
        texts = json_rows(rows)
        waiting: dict[str, list[str]] = {}
        for text, reason in held.elements():
            waiting.setdefault(text, []).append(reason)
        for i in reversed(range(len(texts))):  # of rows that are alike the first was taken
            if waiting.get(texts[i]):
                reasons[i] = waiting[texts[i]].pop()
        return reasons

    def put(self, source: str, batch_id: str, rejected: pa.Table, blobs: Mapping[str, bytes], at: int | None) -> None:
        """Append those of the refused rows (`row`, `reason`) that an earlier try of the batch did not; media first."""
        if not rejected.num_rows:
            return
        held = self._held(source, batch_id)
        left, missing = held.copy(), []
        for pair in _pairs(rejected):
            if left[pair]:
                left[pair] -= 1
            else:
                missing.append(pair)
        if not missing:
            return
        self._keep(blobs)
        n, ids = len(missing), entry_ids(source, batch_id, missing, held)
        columns = [ids, [source] * n, [batch_id] * n, *zip(*missing, strict=True), [time.time()] * n, [at] * n]
        version = self._lake.append(TABLE, _table(columns, SCHEMA), batch_id=f"{source}/{batch_id}/{digest(ids)}")
        known, batches = self._batches
        batches.add((source, batch_id))
        self._batches = (version if version - 1 == (known or 0) else None, batches)

    def quarantine(
        self,
        ids: Sequence[str] | None = None,
        *,
        source: str | None = None,
        reason: str | None = None,
        state: State | None = None,
    ) -> list[Entry]:
        """The rows as they now stand, oldest first; only those that are named, and only what all filters pass.

        Raises:
            UnknownRow: an id is of no quarantined row.
        """
        if ids is not None and not ids:
            return []
        where = [("id", "in", list(ids))] if ids is not None else []
        came = self._rows(TABLE, SCHEMA, where + ([("source", "=", source)] if source else []))
        lost = sorted(set(ids or ()) - set(came["id"].to_pylist()))
        if lost:
            told = f" of source {source!r}" if source else ""
            raise UnknownRow(f"no quarantined row{told} has the id {lost[0]!r}: `raymill quarantine list` shows them")
        came = came.sort_by([("wall_s", "ascending"), ("batch_id", "ascending"), ("id", "ascending")])
        log = self._rows(LOG, LOG_SCHEMA, where)
        found = lived(map(_entry, came.to_pylist()), map(_done, log.to_pylist()))
        return [e for e in found if reason in (None, e.reason) and state in (None, e.state)]

    def blobs(self, checksums: Sequence[str]) -> dict[str, bytes]:
        """The bytes of media that are kept here, by their SHA-256; those that are not are left out."""
        if not checksums or self._lake.version(MEDIA) is None:
            return {}
        held = self._lake.read(MEDIA, where=[("sha256", "in", list(checksums))])
        return dict(zip(held["sha256"].to_pylist(), held["bytes"].to_pylist(), strict=True))

    def fix(
        self, changes: dict[str, dict[str, Any]], declared: Mapping[str, Collection[str]] | None = None
    ) -> list[Entry]:
        """Change columns of open entries, id → {column: value}; the rows come in again by a reingest.

        Values are JSON, or bytes for a column of media. `declared` holds the present columns of each source; absent:
        a row has those with which it came.

        Raises:
            UnknownRow: an id is of no quarantined row.
            ContractError: a row has no such column.
            Conflict: an entry is reingested or discarded already.
        """
        with self.turn():
            found = self.quarantine(list(changes))
            texts = [
                patched(e, {c: _named(v) for c, v in changes[e.id].items()}, (declared or {}).get(e.source, ()))
                for e in found
            ]
            self._keep({checksum(v): v for told in changes.values() for v in told.values() if isinstance(v, bytes)})
            self.tell([next_step(e, Step.FIXED, row=text) for e, text in zip(found, texts, strict=True)])
        return self.quarantine(list(changes))

    def discard(self, ids: Sequence[str], why: str) -> int:
        """Close open entries for good without their rows coming in; how many. Discarded ones stay as they are.

        Raises:
            UnknownRow: an id is of no quarantined row.
            Conflict: an entry is reingested already.
        """
        with self.turn():
            found = [e for e in self.quarantine(ids) if e.state is not State.DISCARDED]
            self.tell([next_step(e, Step.DISCARDED, reason=why) for e in found])
        return len(found)

    def begin(self, chosen: Sequence[Entry]) -> None:
        """Put open entries into batches to land, each of one source; only within `turn()`."""
        for source in sorted({e.source for e in chosen}):
            rows = [e for e in chosen if e.source == source]
            for part in (rows[i : i + BATCH_ROWS] for i in range(0, len(rows), BATCH_ROWS)):
                batch_id = landing_id(part)
                self.tell([next_step(e, Step.BEGUN, batch_id=batch_id) for e in part])

    def begun(self, sources: Collection[str]) -> dict[str, list[Entry]]:
        """Batch id → entries, of all that was begun for these sources and not ended."""
        batches: dict[str, list[Entry]] = {}
        for entry in self._pending():
            if entry.source in sources:
                batches.setdefault(entry.landing, []).append(entry)
        return batches

    def landing(self, batch_id: str) -> list[Entry]:
        """The entries that a reingest has and has not closed."""
        return [e for e in self._pending() if e.landing == batch_id]

    def tell(self, steps: Sequence[Done]) -> None:
        """Append steps to the log, all or none, once; only within `turn()`."""
        if steps:
            columns = [[getattr(s, f.name) for s in steps] for f in LOG_SCHEMA if f.name != "wall_s"]
            rows = _table([*columns, [time.time()] * len(steps)], LOG_SCHEMA)
            self._lake.append(LOG, rows, batch_id=digest([(s.id, s.number, s.step) for s in steps]))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Alone among the processes of this host; what was read before may be stale inside."""
        with turn(self._lock):
            yield

    def _pending(self) -> list[Entry]:
        """Entries whose last step was the beginning of a reingest; found by the log, which holds few rows."""
        log = self._rows(LOG, LOG_SCHEMA, []).select(["id", "number", "step"]).sort_by("number").to_pylist()
        last = {done["id"]: done["step"] for done in log}
        return self.quarantine([i for i, step in last.items() if step == Step.BEGUN])

    def _keep(self, blobs: Mapping[str, bytes]) -> None:
        """Append the media that are not here yet; bytes that come twice in a race lie here twice and are the same."""
        known = self.blobs(sorted(blobs))
        fresh = sorted(blobs.keys() - known.keys())
        if fresh:
            rows = _table([fresh, [blobs[c] for c in fresh]], MEDIA_SCHEMA)
            self._lake.append(MEDIA, rows, batch_id=digest(fresh))

    def _held(self, source: str, batch_id: str) -> Counter[tuple[str, str]]:
        """(row, reason) of what an earlier try of the batch left here."""
        version = self._lake.version(TABLE)
        if version is None:
            return Counter()
        if self._batches[0] != version:
            read = self._lake.read(TABLE, version=version, columns=["source", "batch_id"])
            self._batches = (version, set(zip(*(c.to_pylist() for c in read.columns), strict=True)))
        if (source, batch_id) not in self._batches[1]:
            return Counter()
        where = [("source", "=", source), ("batch_id", "=", batch_id)]
        held = self._lake.read(TABLE, where=where, columns=["row", "reason"])
        return Counter(_pairs(held))

    def _rows(self, table: str, schema: pa.Schema, where: list[tuple[str, str, Any]]) -> pa.Table:
        if self._lake.version(table) is None:
            return schema.empty_table()
        return self._lake.read(table, where=where or None)


def _pairs(rejected: pa.Table) -> list[tuple[str, str]]:
    return list(zip(rejected["row"].to_pylist(), rejected["reason"].to_pylist(), strict=True))


def _table(columns: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def _named(value: Any) -> Any:
    return {"blob": checksum(value), "size": len(value)} if isinstance(value, bytes) else value


def _entry(row: dict[str, Any]) -> Entry:
    at = row.pop("at")
    return Entry(**row, at=None if at is None else (at - _EPOCH) // timedelta(microseconds=1))


def _done(row: dict[str, Any]) -> Done:
    del row["wall_s"]
    return Done(**row | {"step": Step(row["step"])})
