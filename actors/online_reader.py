"""The online store's readers: vectors for rows, and newest values in microseconds, while another process writes.

What the store holds is said in `online.py`, what a vector means in `windows.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.aggregates import TIME
from raymill.actors.divided import DividedPages
from raymill.actors.entities import entity_column
from raymill.actors.environment import (
    as_store_error,
    fetch,
    is_filled,
    open_environment,
    pages_of,
    place_of,
    release,
    store_error,
    told,
)
from raymill.actors.evaluate import Floats, Ints, columns_of, to_float32
from raymill.actors.feature_plan import FeaturePlan, ViewPlan
from raymill.actors.lmdb_pages import Pages
from raymill.actors.lookups import keys_of, with_column
from raymill.actors.newest import NewestReader, as_leaves
from raymill.actors.online_records import entity_key, floor_of, joined, newest_key, record_key, text_key
from raymill.actors.redis_store import RedisTransaction
from raymill.actors.windows import NEVER, group, sweep, warm
from raymill.runtime.errors import RequestError, Unavailable, UnknownEntity
from raymill.runtime.stores import Online


@dataclass(frozen=True, slots=True)
class LookUp:
    """Vectors, and what they rest on."""

    x: npt.NDArray[np.float32]
    """float32 [rows, features], NaN for unknown."""
    ages: Ints
    """int64 [rows, views]: µs from the newest event of each view to the row's moment; −1: the store holds none."""
    views: tuple[str, ...]
    """The views that have events, in the order of `ages`."""

    @property
    def missing(self) -> npt.NDArray[np.bool_]:
        """[rows, features]: whether a feature is unknown."""
        return np.isnan(self.x)


class OnlineReader:
    """Vectors for rows at their moments; works in any process of the host while another one writes."""

    def __init__(self, path: Online, plan: FeaturePlan) -> None:
        self._path = place_of(path, plan.pipeline)
        self._plan = plan
        self._opened: Any = None
        self._pages: Pages | DividedPages | None = None
        self._newest: dict[str, NewestReader] = {}
        self._by_name: dict[str, NewestReader] = {}
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
        return self._look_up(rows, at, None)

    def look_up(self, rows: pa.Table, at: Ints) -> LookUp:
        """As `vectors`, and how old what they rest on is; of one state of the store."""
        views = tuple(v.name for v in self._plan.event_views)
        ages = np.full((len(rows), len(views)), -1, dtype=np.int64)
        return LookUp(self._look_up(rows, at, ages), ages, views)

    def _look_up(self, rows: pa.Table, at: Ints, ages: Ints | None) -> npt.NDArray[np.float32]:
        at = np.ascontiguousarray(at, dtype=np.int64)
        if len(at) != len(rows):
            raise RequestError(f"{len(at)} moments for {len(rows)} rows: give one each")
        request = columns_of(rows, self._plan.request_view_columns, self._plan.row.dtypes)
        by_moment = np.argsort(at, kind="stable")
        for lookup in self._plan.lookups:
            rows = with_column(rows, lookup.name, self._looked_up(lookup, rows, at, by_moment))
        asked = _Asked(self._keys(rows), at, by_moment, ages)
        with as_store_error(self._path):
            try:
                leaves = self._leaves(asked, newest=True)
            except _NotWhole:  # all views anew, so that they are of one state of the store
                leaves = self._leaves(asked, newest=False)
        return self._plan.assemble(request, leaves, len(rows))

    def _looked_up(self, lookup: ViewPlan, rows: pa.Table, at: Ints, by_moment: Ints) -> pa.Array:
        """The looked-up column of the rows, as of their moments."""
        columns = [entity_column(rows, c, lookup.source.dtypes[c]).to_pylist() for c in lookup.entity]
        codes, distinct = _numbered(list(zip(*columns, strict=True)))
        names = [record_key(lookup, entity_key(key)) for key in distinct]
        with as_store_error(self._path), self._environment().begin(buffers=True) as txn:
            fetch(txn, [lookup.progress_name, *names])
            _check_moments(txn, lookup, int(at.min()) if len(at) else NEVER)
            leaves = _from_events(txn, lookup, _Asked({}, at, by_moment, None), 0, codes, names)

            def texts(hashes: list[bytes]) -> list[bytes]:
                wanted = [text_key(lookup, h) for h in hashes]
                fetch(txn, wanted)
                found = [txn.get(name) for name in wanted]
                if None in found:  # Redis: the store was filled anew between the two questions
                    raise Unavailable(f"online store {told(self._path)} is being filled anew: ask again")
                return [bytes(text) for text in found]

            return keys_of(lookup, leaves, texts)

    def _keys(self, rows: pa.Table) -> dict[str, list[tuple[Any, ...]]]:
        """View → entity of each row."""
        columns: dict[tuple[str, str], list[Any]] = {}
        keys = {}
        for view in self._plan.event_views:
            names = [(c, view.source.dtypes[c]) for c in view.entity]
            for name in names:
                if name not in columns:
                    columns[name] = entity_column(rows, *name).to_pylist()
            keys[view.name] = list(zip(*(columns[name] for name in names), strict=True))
        return keys

    def _leaves(self, asked: _Asked, *, newest: bool) -> dict[str, Floats]:
        wanted = []
        for view in self._plan.event_views:
            codes, distinct = _numbered(asked.keys[view.name])
            packed = newest and view.newest_leaves is not None
            name_of = newest_key if packed else record_key
            wanted.append((view, codes, [name_of(view, entity_key(key)) for key in distinct], packed))
        leaves: dict[str, Floats] = {}
        with self._environment().begin(buffers=True) as txn:
            fetch(txn, [n for view, _, names, _ in wanted for n in (view.progress_name, *names)])
            for place, (view, codes, names, packed) in enumerate(wanted):
                _check_moments(txn, view, int(asked.at.min()) if len(asked.at) else NEVER)
                if packed:
                    reader = self._by_name.get(view.name) or NewestReader(view, b"", self._pages)
                    self._by_name[view.name] = reader
                    leaves[view.name] = _from_newest(txn, reader, asked, place, codes, names)
                else:
                    leaves[view.name] = _from_events(txn, view, asked, place, codes, names)
        return leaves

    def latest(self, view: str, keys: Sequence[Any], at: int) -> tuple[npt.NDArray[np.float32], Ints]:
        """Features of a view without windows at one moment, by the shortest way: microseconds for one key.

        Args:
            view: its name.
            keys: entities: values of the key's column, tuples of values where it has several; a null matches nothing.
            at: the moment, µs UTC.

        Returns:
            float32 [keys, features of the view], NaN for unknown, and int64 [keys], the µs that passed since the event
            that they are from, −1 where there is none.

        Raises:
            RequestError: there is no such view, it has windows, or the moment is older than what the store keeps.
            Unavailable: the store, or the view in it, was not filled yet.
        """
        env = self._opened or self._environment()
        reader = self._newest.get(view) or self._newest_of(view)
        try:
            with env.begin() as txn:
                return _latest(txn, reader, keys, at)
        except lmdb.Error as err:
            raise store_error(self._path, err) from err

    def _newest_of(self, name: str) -> NewestReader:
        views = {v.name: v for v in self._plan.event_views}
        if name not in views or views[name].newest_leaves is None:
            fit = [v.name for v in views.values() if v.newest_leaves is not None]
            raise RequestError(f"{name!r} is no view of newest values alone; those are {fit}: ask for vectors")
        self._newest[name] = NewestReader(views[name], newest_key(views[name], b""), self._pages)
        return self._newest[name]

    def close(self) -> None:
        """Close it in this process, unless somebody else here still has it open."""
        with self._lock:
            if self._opened is not None:
                release(self._path)
                self._opened = self._pages = None
                self._newest.clear()
                self._by_name.clear()

    def _environment(self) -> Any:
        if self._opened is None:
            with self._lock:
                if self._opened is None:
                    if not is_filled(self._path):
                        raise Unavailable(f"online store {told(self._path)} is not filled yet: ingest rows first")
                    warm()
                    opened = open_environment(self._path)
                    self._pages = pages_of(self._path)
                    self._opened = opened
        return self._opened


@dataclass(frozen=True, slots=True)
class _Asked:
    """One call's rows."""

    keys: dict[str, list[tuple[Any, ...]]]
    """View → entity of each row."""
    at: Ints
    by_moment: Ints
    """The rows in the order of their moments."""
    ages: Ints | None
    """[rows, views], to be filled; None: nobody asks."""


def _from_newest(txn: Any, reader: NewestReader, asked: _Asked, place: int, codes: Ints, names: list[bytes]) -> Floats:
    """The view's leaves [rows, leaves] from the packed newest values; `_NotWhole`: an event is not known yet."""
    view = reader.view
    nobody = newest_key(view, b"")  # the last record, number −1
    records = reader.of_keys(txn, [*names, nobody])[codes]
    if (records["whole_from"] > asked.at).any():
        raise _NotWhole
    if view.required:
        _refuse_unknown(view, asked.keys[view.name], records["time"] == NEVER)
    if asked.ages is not None:
        asked.ages[:, place] = np.where(records["time"] == NEVER, -1, asked.at - records["time"])
    return as_leaves(reader.values(records, asked.at))


def _from_events(txn: Any, view: ViewPlan, asked: _Asked, place: int, codes: Ints, names: list[bytes]) -> Floats:
    """The view's leaves [rows, leaves] from the events."""
    found = [txn.get(name) for name in names]
    if view.required:
        unknown = np.array([c < 0 or found[c] is None for c in codes], dtype=np.bool_)
        _refuse_unknown(view, asked.keys[view.name], unknown)
    out = view.empty(len(codes))
    if asked.ages is None:
        _sweep(found, codes, asked.at, asked.by_moment, view.leaves, out)
        return out
    wide = np.concatenate([out, np.full((len(codes), 1), np.nan)], axis=1)
    _sweep(found, codes, asked.at, asked.by_moment, _and_time(view), wide)
    asked.ages[:, place] = _ages(wide[:, -1], asked.at)
    return wide[:, :-1]


def _and_time(view: ViewPlan) -> Ints:
    """The view's leaves and, as the last, the event time of the newest event."""
    return np.concatenate([view.leaves, np.array([[TIME, 0, -1]], dtype=np.int64)])


def _ages(time: Floats, at: Ints | int) -> Ints:
    """µs since event times; −1 for NaN."""
    return np.where(np.isnan(time), -1, at - np.nan_to_num(time)).astype(np.int64)


class _NotWhole(Exception):
    """Packed newest values are of a later moment than one asked for."""


def _numbered(keys: Sequence[tuple[Any, ...]]) -> tuple[Ints, list[tuple[Any, ...]]]:
    """The number of each key, −1 where a part of it is null, and the keys in the order of their numbers."""
    codes = np.full(len(keys), -1, dtype=np.int64)
    number: dict[tuple[Any, ...], int] = {}
    for i, key in enumerate(keys):
        if None not in key:
            codes[i] = number.setdefault(key, len(number))
    return codes, list(number)


def _sweep(records: Sequence[Any], codes: Ints, at: Ints, by_moment: Ints, plan: Ints, out: Floats) -> None:
    buffer, starts = joined(records)
    order, row_starts = group(codes, len(records), by_moment)
    sweep(buffer, starts, order, row_starts, at, plan, out)


def _latest(txn: Any, reader: NewestReader, keys: Sequence[Any], at: int) -> tuple[npt.NDArray[np.float32], Ints]:
    if isinstance(txn, RedisTransaction):
        known = [k for k in _tuples(keys) if None not in k]
        fetch(txn, [reader.view.progress_name, *(newest_key(reader.view, entity_key(k)) for k in known)])
    _check_moments(txn, reader.view, at)
    if reader.integer and len(keys) and type(keys[0]) is int and None not in keys:
        if len(keys) == 1:
            one = reader.of_one_integer(txn, keys[0], at)
            return (reader.features_of(one[0]), one[1]) if one else _latest_of_events(txn, reader, _tuples(keys), at)
        records = reader.of_integers(txn, keys)
    else:
        records = reader.of_keys(txn, [b"" if None in k else entity_key(k) for k in _tuples(keys)])
    if len(keys) and records["whole_from"].max() > at:
        return _latest_of_events(txn, reader, _tuples(keys), at)
    time = records["time"]
    ages, nothing = at - time, time == NEVER
    if nothing.any():
        ages[nothing] = -1
    return reader.features_of(reader.values(records, at)), ages


def _tuples(keys: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [k if isinstance(k, tuple) else (k,) for k in keys]


def _latest_of_events(
    txn: Any, reader: NewestReader, keys: list[tuple[Any, ...]], at: int
) -> tuple[npt.NDArray[np.float32], Ints]:
    """`OnlineReader.latest` where an event is in the store that was not known yet."""
    view = reader.view
    codes, distinct = _numbered(keys)
    names = [record_key(view, entity_key(key)) for key in distinct]
    fetch(txn, names)
    found = [txn.get(name) for name in names]
    out = np.full((len(keys), len(view.leaves) + 1), np.nan)
    _sweep(found, codes, np.full(len(keys), at, dtype=np.int64), np.arange(len(keys)), _and_time(view), out)
    return reader.features_of(to_float32(out[:, :-1])), _ages(out[:, -1], at)


def _check_moments(txn: Any, view: ViewPlan, earliest: int) -> None:
    floor = floor_of(txn, view)
    if floor is None:
        raise Unavailable(f"view {view.name!r} of this plan is not in the online store yet: rebuild the features")
    if earliest < floor:
        raise RequestError(
            f"view {view.name!r}: moment {np.datetime64(earliest, 'us')}Z is before "
            f"{np.datetime64(floor, 'us')}Z, the earliest that the online store keeps events for: "
            f"ask for a later moment, or the point-in-time join"
        )


def _refuse_unknown(view: ViewPlan, keys: Sequence[Any], unknown: npt.NDArray[np.bool_]) -> None:
    for i in np.flatnonzero(unknown)[:1].tolist():
        told = ", ".join(f"{c}={v!r}" for c, v in zip(view.entity, keys[i], strict=True))
        raise UnknownEntity(f"row {i}: {told} was never seen by view {view.name!r}, which requires it")
