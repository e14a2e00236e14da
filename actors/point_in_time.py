"""The point-in-time join: features of every row as they were known at its moment, from Arrow tables, no cluster.

What "known" and "in the window" mean is said in `windows.py`; its kernels and the last step to float32 are those of the
online store, so that both give the same vector bit for bit. How the events get there is `merge.py`'s.

A source may be a table in any order, or stored parts. Where the parts are in the order of event time, and known then,
newest values cost one pass over keys and times, and only the values found are taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.aggregates import BEFORE_ALL, NEWEST
from raymill.actors.entities import column_of, entity_codes, key_hashes
from raymill.actors.evaluate import Floats, Ints, columns_of, evaluate, moments
from raymill.actors.feature_plan import FeaturePlan, SourcePlan, ViewPlan
from raymill.actors.merge import HEAD, OUT_OF_ORDER, ascending, fill, measure, scan, scatter, sweep_groups
from raymill.actors.parts import Block, Parts, Rows, threads
from raymill.actors.windows import NEVER, group, pack
from raymill.runtime.errors import ContractError
from raymill.runtime.expressions import Column

_STEP = 1 << 15
"""Rows for which operands are evaluated at once: their intermediate values stay in the processor's cache."""
_LARGE = 1 << 18
"""Events from which on several threads pay."""
_PAGE_BITS = 9
"""So many of 8-byte values are a page of memory."""
_NONE = np.empty(0, dtype=np.int64)
_LOWEST = int(np.iinfo(np.int64).min)


def join(
    rows: pa.Table, plan: FeaturePlan, sources: Mapping[str, pa.Table | Parts], *, at: str | Ints
) -> npt.NDArray[np.float32]:
    """Feature vectors of `rows`, each as of its own moment.

    Args:
        rows: label rows with the plan's `request_columns`; every one is kept, in order.
        plan: the features.
        sources: name → rows of each source that the views read, in any order: a table, or stored parts.
        at: the moment of each row: name of a timestamp column, or µs UTC.

    Returns:
        float32 [rows, features], NaN for unknown.

    Raises:
        ContractError: a table, a column or a moment is missing, or has another type than declared.
    """
    moment = moments(rows.column(at), BEFORE_ALL) if isinstance(at, str) else np.ascontiguousarray(at, dtype=np.int64)
    if len(moment) != len(rows):
        raise ContractError(f"{len(moment)} moments for {len(rows)} rows: give one each")
    in_order = ascending(moment)
    asked = _Asked(rows, moment, np.arange(len(rows)) if in_order else np.argsort(moment, kind="stable"))
    events: dict[str, _Events] = {}
    leaves: dict[str, Floats] = {}
    with ThreadPoolExecutor(threads()) as pool:
        for view in plan.event_views:
            name = view.source.name
            if name not in sources:
                raise ContractError(f"view {view.name!r} reads source {name!r}, which is not among {list(sources)}")
            if name not in events:
                events[name] = _Events(sources[name], view.source, pool)
            leaves[view.name] = _leaves(view, events[name], asked)
    request = columns_of(rows, plan.request_view_columns, plan.row.dtypes)
    return plan.assemble(request, leaves, len(rows))


@dataclass(frozen=True)
class _Asked:
    """The rows that want features."""

    rows: pa.Table
    at: Ints
    """Moment of each."""
    order: Ints
    """Their numbers in the order of the moments."""


class _Events:
    """A source's rows: their times, and their values as far as they are needed."""

    def __init__(self, rows: pa.Table | Parts, source: SourcePlan, pool: ThreadPoolExecutor) -> None:
        self.rows: Rows | Parts = Rows(rows) if isinstance(rows, pa.Table) else rows
        self.source = source
        self._pool = pool
        self.keys = self.rows.table([source.time, *([source.known_at] if source.known_at else [])])
        self.time, self.known = self._times()
        self._hashes = _NONE
        self._hashed = np.zeros(0, dtype=np.bool_)

    def _times(self) -> tuple[Ints, Ints]:
        time = _moments(self.keys.column(self.source.time))
        if self.source.known_at is None:
            return time, time
        known = _moments(self.keys.column(self.source.known_at))
        if self.keys.column(self.source.time).null_count:
            known = np.where(time == NEVER, NEVER, known)
        return time, known

    def hashes_of(self, tied: npt.NDArray[np.bool_]) -> Ints:
        """Hashes of the keys of the rows marked, 0 for others that no view asked for."""
        if not len(self._hashes):
            self._hashes = np.zeros(len(self.time), dtype=np.int64)
            self._hashed = np.zeros(len(self.time), dtype=np.bool_)
        chosen = np.flatnonzero(tied & ~self._hashed)
        if len(chosen):
            keys = self.rows.table(self.source.key).take(pa.array(chosen))
            self._hashes[chosen] = key_hashes(keys, self.source.key, self.source.dtypes)
            self._hashed[chosen] = True
        return self._hashes

    def codes(self, view: ViewPlan, rows: pa.Table) -> tuple[Ints, Ints, int]:
        """Entities of the events and of the rows that ask."""
        return entity_codes(view, self.rows.table(view.entity), rows)

    def at_once(self, work: Callable[[Any], Any], parts: Iterable[Any]) -> list[Any]:
        """The work on every part, several at a time."""
        parts = list(parts)
        return [work(p) for p in parts] if len(parts) < 2 else list(self._pool.map(work, parts))

    def ahead(self, work: Callable[[Block], Any]) -> Iterator[Any]:
        """The work on every block, in order, no more ahead of who asks than there are threads."""
        blocks = deque(self.rows.blocks())
        if len(blocks) < 2:
            yield from map(work, blocks)
            return
        waiting: deque[Future[Any]] = deque()
        while blocks or waiting:
            while blocks and len(waiting) <= threads():
                waiting.append(self._pool.submit(work, blocks.popleft()))
            yield waiting.popleft().result()


def _leaves(view: ViewPlan, events: _Events, asked: _Asked) -> Floats:
    """The view's leaves [rows, leaves]."""
    events.rows.check(view.columns)
    codes, row_codes, groups = events.codes(view, asked.rows)
    if not groups:
        return view.empty(len(asked.at))
    if (view.leaves[:, 0] == NEWEST).all():
        found = _found(events, codes, row_codes, groups, asked)
        if found is not None:
            return _taken(view, events, found, asked)
    return _swept(view, events, codes, row_codes, groups, asked)


def _found(events: _Events, codes: Ints, row_codes: Ints, groups: int, asked: _Asked) -> Ints | None:
    """Number of the newest event at each row's moment, −1 for none; None: the events are not in order."""
    time, known = events.time, events.known
    found = np.full(len(asked.at), -1, dtype=np.int64)
    tied = np.zeros(len(time), dtype=np.bool_)
    # A stretch begins where the time changes, so that ties stay together; `scan` finds out if there is no order.
    parts = threads() if len(time) >= _LARGE else 1
    cuts = [int(np.searchsorted(time, time[len(time) * p // parts])) for p in range(1, parts)]
    if cuts != sorted(cuts) or any(c == len(time) or (c and time[c - 1] >= time[c]) for c in cuts):
        return None
    sorted_at = asked.at[asked.order] if cuts else asked.at
    row_cuts = [int(np.searchsorted(sorted_at, time[c])) for c in cuts]
    bounds = list(zip([0, *cuts], [*cuts, len(time)], [0, *row_cuts], [*row_cuts, len(found)], strict=True))

    def stretch(p: int, key_hash: Ints) -> tuple[int, Ints]:
        a, b, r, s = bounds[p]
        last = np.full(groups, -1, dtype=np.int64)
        hashes = key_hash[a:b] if len(key_hash) else key_hash
        order, marks = asked.order[r:s], tied[a:b]
        return scan(codes[a:b], time[a:b], known[a:b], hashes, order, row_codes, asked.at, last, found, marks), last

    done = events.at_once(lambda p: stretch(p, _NONE), range(len(bounds)))
    if any(ties == OUT_OF_ORDER for ties, _ in done):
        return None
    if any(ties for ties, _ in done):
        key_hash = events.hashes_of(tied)
        done = events.at_once(lambda p: stretch(p, key_hash), range(len(bounds)))
    _carry(found, bounds, [last for _, last in done], row_codes, asked.order)
    return found


def _carry(
    found: Ints, bounds: list[tuple[int, int, int, int]], lasts: list[Ints], row_codes: Ints, order: Ints
) -> None:
    """Number events from the first of all, not of the stretch; what a stretch has not seen, an earlier one may have."""
    before = lasts[0]
    for (a, _, r, s), last in zip(bounds[1:], lasts[1:], strict=True):
        rows = order[r:s]
        mine, code = found[rows], row_codes[rows]
        found[rows] = np.where(mine >= 0, mine + a, np.where(code >= 0, before[code], -1))
        before = np.where(last >= 0, last + a, before)


def _taken(view: ViewPlan, events: _Events, found: Ints, asked: _Asked) -> Floats:
    """Newest values: only the events found are read, and only their operands evaluated."""
    out = np.empty((len(found), len(view.leaves)), dtype=np.float64, order="F")
    out[found < 0] = np.nan
    blocks = list(events.rows.blocks())
    firsts = [b.first for b in blocks]
    names = _columns_of_operands(view)
    place = np.searchsorted(firsts, found, side="right") - 1 if len(firsts) > 1 else np.where(found >= 0, 0, -1)
    ordered, starts = group(place, max(len(firsts), 1), asked.order)

    def take(part: int) -> None:
        block, rows = blocks[part], ordered[starts[part] : starts[part + 1]]
        if not len(rows):
            return
        # Page by page: rows in the order of their moments jump back and forth over all of the block.
        pages = (found[rows] - block.first) >> _PAGE_BITS
        rows = rows[group(pages, (block.rows >> _PAGE_BITS) + 1, np.arange(len(rows)))[0]]
        chosen = events.rows.take(block, names, found[rows])
        columns = columns_of(chosen, names, view.source.dtypes)
        for c, expr in enumerate(view.operands):
            for j in np.flatnonzero(view.leaves[:, 1] == c):
                value = columns[expr.name] if isinstance(expr, Column) else None
                value = value if isinstance(value, np.ndarray) else evaluate(expr, columns, len(rows))
                fill(value, rows, out[:, j])

    events.at_once(take, range(len(blocks)))
    has = np.flatnonzero(found >= 0)
    for width in set(view.leaves[:, 2].tolist()) - {-1}:
        old = has[asked.at[has] - events.time[found[has]] > width]
        for j in np.flatnonzero(view.leaves[:, 2] == width):
            out[old, j] = np.nan
    return out


def _swept(view: ViewPlan, events: _Events, codes: Ints, row_codes: Ints, groups: int, asked: _Asked) -> Floats:
    """Windows and late arrivals: the events of the entities asked for, laid out by entity, swept."""
    out = view.empty(len(asked.at))
    if not len(asked.at):
        return out
    rows, row_starts = group(row_codes, groups, asked.order)
    wanted = np.diff(row_starts) > 0
    until = int(asked.at[asked.order[-1]])
    after = _LOWEST if view.kept_us < 0 else max(int(asked.at[asked.order[0]]), BEFORE_ALL) - view.kept_us - 1
    starts = measure(codes, groups, events.time, events.known, wanted, after, until)
    width = HEAD + len(view.operands)
    buffer = np.empty(int(starts[-1]) * width, dtype=np.int64)
    filled = starts.copy()
    names = _columns_of_operands(view)
    for block, operands in events.ahead(lambda b: (b, operands_of(view, events.rows.read(b, names)))):
        span = slice(block.first, block.first + block.rows)
        time, known = events.time[span], events.known[span]
        scatter(codes[span], time, known, operands, block.first, after, until, filled, starts, buffer)
    tied = np.zeros(len(codes), dtype=np.bool_)
    cuts = np.linspace(0, starts[-1], 4 * threads() + 1 if starts[-1] >= _LARGE else 2)[1:-1]
    ends = [0, *np.searchsorted(starts, cuts).tolist(), groups]

    def sweep(part: tuple[int, int], key_hash: Ints) -> int:
        leaves = view.leaves
        return sweep_groups(buffer, starts, width, *part, key_hash, tied, rows, row_starts, asked.at, leaves, out)

    parts = [(a, b) for a, b in pairwise(ends) if a < b]
    if sum(events.at_once(lambda p: sweep(p, _NONE), parts)):
        key_hash = events.hashes_of(tied)
        events.at_once(lambda p: sweep(p, key_hash), parts)
    return out


def _columns_of_operands(view: ViewPlan) -> list[str]:
    return list(dict.fromkeys(c for e in view.operands for c in e.columns()))


def _moments(column: pa.ChunkedArray) -> Ints:
    """As `moments`, without a copy where the column is one piece without nulls."""
    if column.null_count:
        return moments(column, NEVER)
    whole = column.combine_chunks()
    if pa.types.is_timestamp(whole.type):
        whole = whole.cast(pa.timestamp("us", tz=whole.type.tz))
    return whole.cast(pa.int64()).to_numpy()


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


def operands_of(view: ViewPlan, rows: pa.Table) -> Floats:
    """What a view keeps of each row: float64 [operands, rows]."""
    names = _columns_of_operands(view)
    columns = columns_of(rows, names, view.source.dtypes)
    values = np.empty((len(view.operands), len(rows)), dtype=np.float64)
    for first in range(0, len(rows), _STEP):
        n = min(_STEP, len(rows) - first)
        some = {name: c[first : first + n] for name, c in columns.items()}
        for j, expr in enumerate(view.operands):
            values[j, first : first + n] = evaluate(expr, some, n)
    return values
