"""The point-in-time join: features of every row as they were known at its moment, from Arrow tables, no cluster.

What "known" and "in the window" mean is said in `windows.py`; its kernels and the last step to float32 are those of the
online store, so that both give the same vector bit for bit.

A source may be a table in any order, or stored parts. Newest values of events in the order of their time, and known
then, are found in one pass over keys and times where they are stored (`offline_newest.py`); windows, late arrivals and
other orders are laid out by entity and swept (`offline_windows.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.aggregates import BEFORE_ALL
from raymill.actors.entities import column_of, key_hashes
from raymill.actors.evaluate import Floats, Ints, columns_of, moments
from raymill.actors.feature_plan import FeaturePlan, SourcePlan, ViewPlan
from raymill.actors.lookups import looked_up, with_column
from raymill.actors.merge import ascending
from raymill.actors.offline_events import Asked, Events
from raymill.actors.offline_newest import find_newest, take_newest
from raymill.actors.offline_windows import sweep_newest, sweep_view
from raymill.actors.parts import Parts, threads
from raymill.actors.windows import NEVER, pack
from raymill.runtime.errors import ContractError


def join(
    rows: pa.Table,
    plan: FeaturePlan,
    sources: Mapping[str, pa.Table | Parts],
    *,
    at: str | Ints,
    workers: int | None = None,
) -> npt.NDArray[np.float32]:
    """Feature vectors of `rows`, each as of its own moment.

    Args:
        rows: label rows with the plan's `request_columns`; every one is kept, in order.
        plan: the features.
        sources: name → rows of each source that the views read, in any order: a table, or stored parts.
        at: the moment of each row: name of a timestamp column, or µs UTC.
        workers: threads; absent: as many as there are processors.

    Returns:
        float32 [rows, features], NaN for unknown.

    Raises:
        ContractError: a table, a column or a moment is missing, or has another type than declared.
    """
    moment = moments(rows.column(at), BEFORE_ALL) if isinstance(at, str) else np.ascontiguousarray(at, dtype=np.int64)
    if len(moment) != len(rows):
        raise ContractError(f"{len(moment)} moments for {len(rows)} rows: give one each")
    order = np.arange(len(rows)) if ascending(moment) else np.argsort(moment, kind="stable")
    events: dict[str, Events] = {}
    out = np.empty((len(rows), len(plan.names)), dtype=np.float32)
    workers = workers or threads()
    with ThreadPoolExecutor(workers) as pool:
        for view in plan.kept_views:
            name = view.source.name
            if name not in sources:
                raise ContractError(f"view {view.name!r} reads source {name!r}, which is not among {list(sources)}")
            if name not in events:
                events[name] = Events(sources[name], view.source, pool, workers)
        asked = Asked(rows, moment, order)
        for lookup in plan.lookups:
            values = looked_up(lookup, events[lookup.source.name], asked)
            asked = Asked(with_column(asked.rows, lookup.name, values), moment, order)
        for place, first in plan.places:
            if isinstance(place, ViewPlan):
                _fill(place, events[place.source.name], asked, plan, out, first)
            else:
                request = columns_of(rows, plan.request_view_columns, plan.row.dtypes)
                plan.fill(out, first, place.compute(request, len(rows)))
    return out


def with_lookups(rows: pa.Table, plan: FeaturePlan, sources: Mapping[str, pa.Table | Parts], moment: Ints) -> pa.Table:
    """The rows with the columns that the plan's lookups give them, as of each one's moment (µs UTC)."""
    workers = threads()
    order = np.argsort(moment, kind="stable")
    with ThreadPoolExecutor(workers) as pool:
        for lookup in plan.lookups:
            events = Events(sources[lookup.source.name], lookup.source, pool, workers)
            rows = with_column(rows, lookup.name, looked_up(lookup, events, Asked(rows, moment, order)))
    return rows


def _fill(
    view: ViewPlan, events: Events, asked: Asked, plan: FeaturePlan, out: npt.NDArray[np.float32], first: int
) -> None:
    """The view's columns of `out`, from number `first` on."""
    events.rows.check(view.columns)
    numbered = events.numbered(view, asked.rows)
    if not numbered.groups:
        plan.fill(out, first, view.finish(view.empty(len(asked.at))))
    elif view.newest_leaves is None:
        plan.fill(out, first, view.finish(sweep_view(view, events, numbered, asked)))
    else:
        found = find_newest(events, numbered, asked)
        found = sweep_newest(view, events, numbered, asked) if found is None else found
        take_newest(view, events, found, asked, out, first)


@dataclass(frozen=True)
class History:
    """Times of a source's rows, and the two orders in which the online store's kernel reads them."""

    time: Ints
    """Event time, µs."""
    known: Ints
    """Moment from which it is known; NEVER for never."""
    key_hash: Ints
    """Hash of the row's key."""

    @classmethod
    def of(cls, rows: pa.Table, source: SourcePlan) -> History:
        """Times and key hashes of rows."""
        time = moments(column_of(rows, source.time), NEVER)
        known = moments(column_of(rows, source.known_at), NEVER) if source.known_at else time.copy()
        known[time == NEVER] = NEVER
        return cls(time, known, key_hashes(rows, source.key, source.dtypes))

    def versions(self, until: int) -> tuple[Ints, Ints]:
        """Rows in the order of (event time, key hash), the versions of each as one: its first, its newest known then.

        Where none is known then, the newest is the first, too.
        """
        order = self.by_time
        time, key = self.time[order], self.key_hash[order]
        begins = np.r_[True, (time[1:] != time[:-1]) | (key[1:] != key[:-1])][: len(order)]
        starts = np.flatnonzero(begins)
        known = (self.known[order] <= until) & (self.known[order] != NEVER)
        count = np.add.reduceat(known, starts, dtype=np.int64) if len(starts) else starts
        return order[starts], order[starts + np.maximum(count - 1, 0)]

    def pack(self, codes: Ints, groups: int, operands: Floats) -> tuple[Ints, Ints]:
        """Records of the groups, as `windows.pack` makes them."""
        return pack(codes, groups, self.by_time, self.by_known, self.time, self.known, self.key_hash, operands)

    @cached_property
    def by_time(self) -> Ints:
        """Order by (event time, key hash, known-at)."""
        return np.lexsort((self.known, self.key_hash, self.time))

    @cached_property
    def by_known(self) -> Ints:
        """Order of becoming known."""
        return np.argsort(np.maximum(self.time, self.known), kind="stable")
