"""The online store: the events of every entity in LMDB, from which a vector is computed for any moment asked.

One record per view and entity, in the form that `windows.sweep` reads. What a vector means is said in `windows.py`.

Invariants
- A batch is one LMDB transaction over all views of its source: kill -9 leaves all of it or nothing, and a reader in
  another process sees all of it or nothing.
- Rows that came before (same entity, event time, known-at and key) change nothing: to retry, to overlap or to load
  the whole lake again is harmless.
- Kept is what any moment ≥ the newest event time seen − `keep` can need; events beyond that are dropped when
  their entity is written next. A question about an earlier moment than that is refused once something was dropped,
  never answered from half of the events.
- A view's records are named by a hash of everything that decides what they hold: a changed definition has a place of
  its own, so that the plans of several model versions are read side by side. A pipeline has an environment of its own.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.entities import entity_codes, entity_column
from raymill.actors.environment import as_store_error, open_environment, release
from raymill.actors.evaluate import Floats, Ints, columns_of
from raymill.actors.feature_plan import FeaturePlan, ViewPlan
from raymill.actors.point_in_time import History, operands_of
from raymill.actors.windows import BEFORE_ALL, NEVER, group, prune, sweep, unpack, warm
from raymill.runtime.errors import RequestError, Unavailable, UnknownEntity
from raymill.runtime.expressions import duration_us

KEEP = "3d"
"""How far behind the newest event a moment may lie that is still answered (late requests, retries, a replayed day)."""

_HORIZON = b"horizon"
"""Key of the event time at which the replay stands."""
_LONGEST_KEY = 400
"""Entity keys longer than this (LMDB takes 511 bytes) are stored under their hash."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a view has come."""

    newest: int = BEFORE_ALL
    """Largest event time seen, µs."""
    floor: int = BEFORE_ALL
    """Earliest moment that can be answered, µs."""
    lake_version: int = -1
    """Version of the lake table up to which all rows are in; −1: not known to be."""

    def to_bytes(self) -> bytes:
        """Packed."""
        return struct.pack("<qqq", self.newest, self.floor, self.lake_version)

    @classmethod
    def from_bytes(cls, data: bytes) -> Progress:
        """Unpacked."""
        return cls(*struct.unpack("<qqq", data))


class OnlineStore:
    """The writer: takes rows in; any number of processes may have one, LMDB lets one write at a time."""

    def __init__(self, path: str | Path, plan: FeaturePlan, *, keep: str = KEEP) -> None:
        self._path = Path(path) / plan.pipeline
        self._plan = plan
        self._keep_us = duration_us(keep)
        self._opened: lmdb.Environment | None = None

    def ingest(self, source: str, rows: pa.Table, *, lake_version: int | None = None, whole: bool = False) -> None:
        """Take in rows of a source, once however often they come.

        Args:
            source: name of the source; one that no view reads is passed over.
            rows: its rows, at least the columns that the plan reads.
            lake_version: version of the lake table that these rows made; with none missed, `lake_version()` follows.
            whole: the rows are all of that version.

        Raises:
            ContractError: a column is missing or has another type than declared.
            StoreError: the store can not be written.
        """
        if source not in self._plan.sources:
            return
        history = History.of(rows, self._plan.sources[source])
        with as_store_error(self._path), self._environment().begin(write=True) as txn:
            self._ingest(txn, source, rows, history, lake_version, whole)

    def replace(
        self, tables: Mapping[str, pa.Table], versions: Mapping[str, int], *, horizon: int | None = None
    ) -> None:
        """Throw the plan's views away and fill them from the lake, in one transaction.

        Args:
            tables: source → rows of the lake table, with a horizon those with earlier event times.
            versions: source → version of the lake table.
            horizon: where a replay begins, µs: later rows may be in the lake and are still to come. Absent: no replay.
        """
        with as_store_error(self._path), self._environment().begin(write=True) as txn:
            _put_horizon(txn, horizon)
            for view in self._plan.event_views:
                self._clear(txn, view)
            for source, rows in tables.items():
                history = History.of(rows, self._plan.sources[source])
                self._ingest(txn, source, rows, history, versions[source] if horizon is None else None, True)

    def lake_version(self, source: str) -> int:
        """Version of the lake table up to which every view has all rows; −1: not known to."""
        with as_store_error(self._path), self._environment().begin() as txn:
            found = [_progress(txn, v) for v in self._plan.event_views if v.source.name == source]
        return min((p.lake_version if p else -1 for p in found), default=-1)

    def horizon(self) -> int | None:
        """Event time, µs, to which a replay has come: later rows of the lake are still to come. None: no replay."""
        with as_store_error(self._path), self._environment().begin() as txn:
            return _horizon(txn)

    def set_horizon(self, at: int) -> None:
        """Move the replay on to `at`."""
        with as_store_error(self._path), self._environment().begin(write=True) as txn:
            _put_horizon(txn, at)

    def close(self) -> None:
        """Close it in this process, unless a reader here still has it open."""
        if self._opened is not None:
            release(self._path)
            self._opened = None

    def _environment(self) -> lmdb.Environment:
        if self._opened is None:
            self._path.mkdir(parents=True, exist_ok=True)
            self._opened = open_environment(self._path)
            with self._opened.begin(write=True) as txn:
                for view in self._plan.event_views:
                    if _progress(txn, view) is None:
                        txn.put(_progress_key(view), Progress().to_bytes())
        return self._opened

    def _ingest(
        self, txn: Any, source: str, rows: pa.Table, history: History, lake_version: int | None, whole: bool
    ) -> None:
        self._environment().reader_check()  # slots of readers that were killed would keep old pages for ever
        happened = history.time[history.time != NEVER]
        horizon = _horizon(txn)
        if horizon is not None and happened.max(initial=BEFORE_ALL) >= horizon:
            _put_horizon(txn, int(happened.max()) + 1)
        for view in self._plan.event_views:
            if view.source.name != source:
                continue
            before = _progress(txn, view) or Progress()
            newest = max(before.newest, int(happened.max(initial=BEFORE_ALL)))
            dropped = self._merge(txn, view, rows, history, newest - self._keep_us)
            after = replace(before, newest=newest)
            if dropped:
                after = replace(after, floor=max(before.floor, newest - self._keep_us))
            if lake_version is not None and (whole or before.lake_version + 1 >= lake_version):
                after = replace(after, lake_version=max(before.lake_version, lake_version))
            txn.put(_progress_key(view), after.to_bytes())

    def _merge(self, txn: Any, view: ViewPlan, rows: pa.Table, new: History, cutoff: int) -> int:
        """Write the records of the rows' entities anew; how many events were dropped."""
        codes, keys = _entities(view, rows)
        names = [_record_key(view, k) for k in keys]
        old = unpack(*_joined([txn.get(n) for n in names]), len(view.operands))
        codes = np.concatenate([old[0], codes])
        times = (np.concatenate(pair) for pair in zip(old[1:4], (new.time, new.known, new.key_hash), strict=True))
        history = History(*times)
        operands = np.concatenate([old[4], operands_of(view, rows)], axis=1)
        dropped = prune(codes, len(keys), history.by_time, history.time, history.known, cutoff, view.kept_us)
        buffer, starts = history.pack(codes, len(keys), operands)
        data = buffer.view(np.uint8).data
        for g, name in enumerate(names):
            txn.put(name, data[8 * starts[g] : 8 * starts[g + 1]])
        return dropped

    def _clear(self, txn: Any, view: ViewPlan) -> None:
        prefix = _record_key(view, b"")
        with txn.cursor() as cursor:
            found = cursor.set_range(prefix)
            while found and cursor.key().startswith(prefix):
                found = cursor.delete()
        txn.put(_progress_key(view), Progress().to_bytes())


class OnlineReader:
    """Vectors for rows at their moments; works in any process of the host while another one writes."""

    def __init__(self, path: str | Path, plan: FeaturePlan) -> None:
        self._path = Path(path) / plan.pipeline
        self._plan = plan
        self._opened: lmdb.Environment | None = None
        self._lock = threading.Lock()

    def vectors(self, rows: pa.Table, at: Ints) -> npt.NDArray[np.float32]:
        """Feature vectors of request rows, the same bit for bit as `point_in_time.join` gives.

        Args:
            rows: with the plan's `request_columns`.
            at: moment of each row, int64 µs UTC.

        Returns:
            float32 [rows, features], NaN for unknown.

        Raises:
            ContractError: a column is missing or has another type than declared.
            RequestError: a moment is older than what the store keeps.
            UnknownEntity: a view marked `required` has never seen a row's entity.
            Unavailable: the store, or a view of this plan in it, was not filled yet.
        """
        at = np.ascontiguousarray(at, dtype=np.int64)
        if len(at) != len(rows):
            raise RequestError(f"{len(at)} moments for {len(rows)} rows: give one each")
        request = columns_of(rows, self._plan.request_view_columns, self._plan.row.dtypes)
        by_moment = np.argsort(at, kind="stable")
        keys: dict[tuple[str, str], list[Any]] = {}
        leaves: dict[str, Floats] = {}
        with as_store_error(self._path), self._environment().begin(buffers=True) as txn:
            for view in self._plan.event_views:
                for c in view.entity:
                    kind = view.source.dtypes[c]
                    if (c, kind) not in keys:
                        keys[c, kind] = entity_column(rows, c, kind).to_pylist()
                columns = [keys[c, view.source.dtypes[c]] for c in view.entity]
                leaves[view.name] = _leaves(txn, view, list(zip(*columns, strict=True)), at, by_moment)
        return self._plan.assemble(request, leaves, len(rows))

    def close(self) -> None:
        """Close it in this process, unless somebody else here still has it open."""
        with self._lock:
            if self._opened is not None:
                release(self._path)
                self._opened = None

    def _environment(self) -> lmdb.Environment:
        if self._opened is None:
            with self._lock:
                if self._opened is None:
                    if not (self._path / "data.mdb").exists():
                        raise Unavailable(f"online store {self._path} is not filled yet: ingest rows first")
                    warm()
                    self._opened = open_environment(self._path)
        return self._opened


def _leaves(txn: Any, view: ViewPlan, keys: list[tuple[Any, ...]], at: Ints, by_moment: Ints) -> Floats:
    """The view's leaves [rows, leaves] of rows with these entities."""
    progress = _progress(txn, view)
    if progress is None:
        raise Unavailable(f"view {view.name!r} of this plan is not in the online store yet: rebuild the features")
    if len(at) and int(at.min()) < progress.floor:
        raise RequestError(
            f"view {view.name!r}: moment {np.datetime64(int(at.min()), 'us')}Z is before "
            f"{np.datetime64(progress.floor, 'us')}Z, the earliest that the online store keeps events for: "
            f"ask for a later moment, or the point-in-time join"
        )
    codes = np.full(len(keys), -1, dtype=np.int64)
    number: dict[tuple[Any, ...], int] = {}
    for i, key in enumerate(keys):
        if None not in key:
            codes[i] = number.setdefault(key, len(number))
    records = [txn.get(_record_key(view, entity_key(key))) for key in number]
    if view.required:
        _refuse_unknown(view, keys, codes, records)
    out = view.empty(len(keys))
    buffer, starts = _joined(records)
    order, row_starts = group(codes, len(records), by_moment)
    sweep(buffer, starts, order, row_starts, at, view.leaves, out)
    return out


def _refuse_unknown(view: ViewPlan, keys: list[tuple[Any, ...]], codes: Ints, records: Sequence[Any]) -> None:
    for i, key in enumerate(keys):
        if codes[i] < 0 or records[codes[i]] is None:
            told = ", ".join(f"{c}={v!r}" for c, v in zip(view.entity, key, strict=True))
            raise UnknownEntity(f"row {i}: {told} was never seen by view {view.name!r}, which requires it")


def _joined(records: Sequence[Any]) -> tuple[Ints, Ints]:
    """One buffer of all records, and where each begins; −1 for a missing one."""
    starts = np.full(len(records), -1, dtype=np.int64)
    at = 0
    for g, record in enumerate(records):
        if record is not None:
            starts[g] = at
            at += len(record) >> 3
    data = bytearray().join(r for r in records if r is not None)
    return np.frombuffer(data, dtype=np.int64), starts


def _entities(view: ViewPlan, rows: pa.Table) -> tuple[Ints, list[bytes]]:
    """The number of each row's entity, −1 where a key column is null, and each entity's key."""
    codes = entity_codes(view, rows, rows.slice(0, 0))[0].copy()
    has = np.flatnonzero(codes >= 0)
    _, first, numbers = np.unique(codes[has], return_index=True, return_inverse=True)
    codes[has] = numbers
    chosen = rows.select(list(view.entity)).take(has[first])
    columns = [entity_column(chosen, c, view.source.dtypes[c]).to_pylist() for c in view.entity]
    return codes, [entity_key(key) for key in zip(*columns, strict=True)]


def entity_key(values: tuple[Any, ...]) -> bytes:
    """One entity's name in the store: unambiguous, at most 400 bytes."""
    parts = []
    for value in values:
        if isinstance(value, str):
            text = value.encode()
            parts.append(b"%d:%b" % (len(text), text))
        else:
            parts.append(b"i%d;" % value)
    key = b"".join(parts)
    return key if len(key) <= _LONGEST_KEY else b"h" + hashlib.sha256(key).digest()


def _record_key(view: ViewPlan, entity: bytes) -> bytes:
    return b"v" + view.digest.encode() + entity


def _horizon(txn: Any) -> int | None:
    found = txn.get(_HORIZON)
    return None if found is None else int(found)


def _put_horizon(txn: Any, at: int | None) -> None:
    if at is None:
        txn.delete(_HORIZON)
    else:
        txn.put(_HORIZON, b"%d" % at)


def _progress_key(view: ViewPlan) -> bytes:
    return b"p" + view.digest.encode()


def _progress(txn: Any, view: ViewPlan) -> Progress | None:
    found = txn.get(_progress_key(view))
    return None if found is None else Progress.from_bytes(found)
