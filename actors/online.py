"""The online store: the events of every entity in LMDB or Redis, from which a vector is computed for any moment asked.

One record per view and entity, in the form that `windows.sweep` reads; beside it, for views without windows, the newest
values ready to read (`newest.py`). What a vector means is said in `windows.py`.

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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raymill.actors.aggregates import BEFORE_ALL
from raymill.actors.divided import share_of
from raymill.actors.entities import entity_codes, entity_column
from raymill.actors.environment import (
    as_store_error,
    clear,
    fetch,
    open_environment,
    place_of,
    release,
    share_place,
    told,
)
from raymill.actors.evaluate import Floats, Ints
from raymill.actors.feature_plan import FeaturePlan, ViewPlan
from raymill.actors.lookups import key_parts
from raymill.actors.newest import packed
from raymill.actors.offline_windows import operands_of
from raymill.actors.online_reader import OnlineReader
from raymill.actors.online_records import (
    Progress,
    entity_key,
    joined,
    newest_key,
    progress_key,
    progress_of,
    record_key,
    text_key,
)
from raymill.actors.point_in_time import History
from raymill.actors.redis_store import Overtaken
from raymill.actors.windows import NEVER, prune, unpack
from raymill.runtime.errors import StoreError
from raymill.runtime.expressions import duration_us
from raymill.runtime.stores import Divided, Online

__all__ = ["KEEP", "OnlineReader", "OnlineStore", "entity_key"]

Pieces = Callable[[], Iterable[pa.Table]]
"""Rows, piece by piece, so that not all of them are in memory at once."""

KEEP = "3d"
"""How far behind the newest event a moment may lie that is still answered (late requests, retries, a replayed day)."""

ATTEMPTS = 50
"""Rounds of read-then-write when other writers get in between; LMDB lets them wait instead."""

_HORIZON = b"horizon"
"""Key of the event time at which the replay stands."""


class OnlineStore:
    """The writer: takes rows in; any number of processes may have one, one at a time writes."""

    def __init__(self, path: Online, plan: FeaturePlan, *, keep: str = KEEP, share_no: int = 0) -> None:
        """A pipeline's store.

        Args:
            path: a folder of this host, one divided by entities, or a Redis server: `redis://`, `rediss://` (TLS) or
                `unix://` URL.
            plan: what is kept.
            keep: how far behind the newest event a moment may lie.
            share_no: of a folder that is divided by entities: the share that is written.
        """
        place = place_of(path, plan.pipeline)
        self._share = (share_no, place.shares) if isinstance(place, Divided) else (0, 1)
        self._path = share_place(place, share_no) if isinstance(place, Divided) else place
        self._plan = plan
        self._keep_us = duration_us(keep)
        self._opened: Any = None

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
        self._write(lambda txn: self._ingest(txn, source, rows, history, lake_version, whole))

    def replace(self, pieces: Mapping[str, Pieces], versions: Mapping[str, int], *, horizon: int | None = None) -> None:
        """Throw the plan's views away and fill them from the lake, in one transaction.

        Args:
            pieces: source → what gives the rows of the lake table piece by piece, as often as it is called; with a
                horizon those with earlier event times.
            versions: source → version of the lake table.
            horizon: where a replay begins, µs: later rows may be in the lake and are still to come. Absent: no replay.
        """

        def fill(txn: Any) -> None:
            _put_horizon(txn, horizon)
            for view in self._plan.kept_views:
                self._clear(txn, view)
            for source, given in pieces.items():
                for rows in given():
                    self._ingest(txn, source, rows, History.of(rows, self._plan.sources[source]), None, False)
                if horizon is None:
                    self._settle(txn, source, versions[source])

        self._write(fill)

    def lake_version(self, source: str) -> int:
        """Version of the lake table up to which every view has all rows; −1: not known to."""
        with as_store_error(self._path), self._environment().begin() as txn:
            found = [progress_of(txn, v) for v in self._plan.kept_views if v.source.name == source]
        return min((p.lake_version if p else -1 for p in found), default=-1)

    def horizon(self) -> int | None:
        """Event time, µs, to which a replay has come: later rows of the lake are still to come. None: no replay."""
        with as_store_error(self._path), self._environment().begin() as txn:
            return _horizon(txn)

    def set_horizon(self, at: int) -> None:
        """Move the replay on to `at`."""
        self._write(lambda txn: _put_horizon(txn, at))

    def close(self) -> None:
        """Close it in this process, unless a reader here still has it open."""
        if self._opened is not None:
            release(self._path)
            self._opened = None

    def _environment(self) -> Any:
        if self._opened is None:
            if isinstance(self._path, Path):
                self._path.mkdir(parents=True, exist_ok=True)
            self._opened = open_environment(self._path)
            self._write(self._enter)
        return self._opened

    def _enter(self, txn: Any) -> None:
        for view in self._plan.kept_views:
            if progress_of(txn, view) is None:
                txn.put(progress_key(view), Progress().to_bytes())

    def _write(self, work: Callable[[Any], None]) -> None:
        """Do the work in a transaction, again where another writer was first."""
        for _ in range(ATTEMPTS):
            try:
                with as_store_error(self._path), self._environment().begin(write=True) as txn:
                    work(txn)
            except Overtaken:
                continue
            return
        raise StoreError(f"online store {told(self._path)}: {ATTEMPTS} times another writer was first; send it again")

    def _ingest(
        self, txn: Any, source: str, rows: pa.Table, history: History, lake_version: int | None, whole: bool
    ) -> None:
        self._environment().reader_check()  # slots of readers that were killed would keep old pages for ever
        happened = history.time[history.time != NEVER]
        horizon = _horizon(txn)
        if horizon is not None and happened.max(initial=BEFORE_ALL) >= horizon:
            _put_horizon(txn, int(happened.max()) + 1)
        for view in self._plan.kept_views:
            if view.source.name != source:
                continue
            before = progress_of(txn, view) or Progress()
            newest = max(before.newest, int(happened.max(initial=BEFORE_ALL)))
            dropped = self._merge(txn, view, rows, history, newest - self._keep_us)
            after = replace(before, newest=newest)
            if dropped:
                after = replace(after, floor=max(before.floor, newest - self._keep_us))
            if lake_version is not None and (whole or before.lake_version + 1 >= lake_version):
                after = replace(after, lake_version=max(before.lake_version, lake_version))
            txn.put(progress_key(view), after.to_bytes())

    def _merge(self, txn: Any, view: ViewPlan, rows: pa.Table, new: History, cutoff: int) -> int:
        """Write the records of the rows' entities anew; how many events were dropped."""
        codes, keys = _entities(view, rows)
        if self._share[1] > 1:
            mine, codes, keys = _of_share(codes, keys, self._share)
            rows, new = rows.take(mine), History(new.time[mine], new.known[mine], new.key_hash[mine])
        names = [record_key(view, k) for k in keys]
        fetch(txn, names)
        old = unpack(*joined([txn.get(n) for n in names]), len(view.operands))
        codes = np.concatenate([old[0], codes])
        times = (np.concatenate(pair) for pair in zip(old[1:4], (new.time, new.known, new.key_hash), strict=True))
        history = History(*times)
        operands = np.concatenate([old[4], _operands(txn, view, rows)], axis=1)
        dropped = prune(codes, len(keys), history.time, history.known, cutoff, view.kept_us)
        buffer, starts = history.pack(codes, len(keys), operands)
        data = buffer.view(np.uint8).data
        for g, name in enumerate(names):
            txn.put(name, data[8 * starts[g] : 8 * starts[g + 1]])
        if view.newest_leaves is not None:
            for key, record in zip(keys, packed(view, buffer, starts), strict=True):
                if record is None:
                    txn.delete(newest_key(view, key))
                else:
                    txn.put(newest_key(view, key), record)
        return dropped

    def _settle(self, txn: Any, source: str, lake_version: int) -> None:
        """All rows of that version are in."""
        for view in self._plan.kept_views:
            if view.source.name == source:
                before = progress_of(txn, view) or Progress()
                txn.put(progress_key(view), replace(before, lake_version=lake_version).to_bytes())

    def _clear(self, txn: Any, view: ViewPlan) -> None:
        for prefix in (record_key(view, b""), newest_key(view, b""), text_key(view, b"")):
            clear(txn, prefix)
        txn.put(progress_key(view), Progress().to_bytes())


def _operands(txn: Any, view: ViewPlan, rows: pa.Table) -> Floats:
    """What is kept of each row; the texts of a lookup are put beside."""
    if view.gives is None:
        return operands_of(view, rows)
    operands, texts = key_parts(view, rows)
    for code, text in texts.items():
        txn.put(text_key(view, code), text)
    return operands


def _entities(view: ViewPlan, rows: pa.Table) -> tuple[Ints, list[bytes]]:
    """The number of each row's entity, −1 where a key column is null, and each entity's key."""
    codes = entity_codes(view, rows, rows.slice(0, 0))[0].copy()
    has = np.flatnonzero(codes >= 0)
    _, first, numbers = np.unique(codes[has], return_index=True, return_inverse=True)
    codes[has] = numbers
    chosen = rows.select(list(view.entity)).take(has[first])
    columns = [entity_column(chosen, c, view.source.dtypes[c]).to_pylist() for c in view.entity]
    return codes, [entity_key(key) for key in zip(*columns, strict=True)]


def _of_share(codes: Ints, keys: list[bytes], share: tuple[int, int]) -> tuple[Ints, Ints, list[bytes]]:
    """Numbers of the rows whose entity is of a share, the numbers of their entities, and those entities' keys."""
    is_mine = np.array([share_of(key, share[1]) == share[0] for key in keys], dtype=np.bool_)
    number = np.append(np.where(is_mine, np.cumsum(is_mine) - 1, -1), -1)  # the last one for rows of no entity
    mine = np.flatnonzero(number[codes] >= 0)
    return mine, number[codes[mine]], [k for k, is_one in zip(keys, is_mine.tolist(), strict=True) if is_one]


def _horizon(txn: Any) -> int | None:
    found = txn.get(_HORIZON)
    return None if found is None else int(found)


def _put_horizon(txn: Any, at: int | None) -> None:
    if at is None:
        txn.delete(_HORIZON)
    else:
        txn.put(_HORIZON, b"%d" % at)
