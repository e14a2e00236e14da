"""The point-in-time join for tables larger than memory: slice by slice in time, what later moments need carried along.

What is held at a time: the events of one slice and the events carried, both once as a table and once as the join lays
them out; and the slice's answer. The carried ones are those in some window, and one event (or some late ones) an entity
for newest values without max age: entities, not events, bound them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.aggregates import BEFORE_ALL
from raymill.actors.entities import entity_codes
from raymill.actors.evaluate import Ints, moments
from raymill.actors.feature_plan import FeaturePlan, SourcePlan, ViewPlan
from raymill.actors.parts import Block, Parts, Rows
from raymill.actors.point_in_time import join
from raymill.actors.slices import Span, cut, keep_needed
from raymill.actors.windows import NEVER
from raymill.runtime.errors import ContractError

MEMORY_BYTES = 1 << 30
"""What a join may take where nothing else is said."""
_OF_EVENTS, _OF_ROWS = 0.25, 0.2
"""Shares of it for a slice's events and for its answer; the rest is for what is carried."""
_STRING_BYTES = 32
"""What a string is taken for."""
_LOWEST = int(np.iinfo(np.int64).min)


def stream(
    rows: pa.Table,
    plan: FeaturePlan,
    sources: Mapping[str, pa.Table | Parts],
    *,
    at: str | Ints,
    memory_bytes: int = MEMORY_BYTES,
    workers: int | None = None,
) -> Iterator[tuple[Ints, npt.NDArray[np.float32]]]:
    """The answer of `join` in pieces: numbers of rows, and their vectors; every row once, by moment.

    Args:
        rows: as in `join`.
        plan: as in `join`.
        sources: as in `join`; parts in the order of time are read once, others' times once a slice.
        at: as in `join`.
        memory_bytes: about what it may take beside `rows`; events of one microsecond are never divided.
        workers: as in `join`.

    Raises:
        ContractError: as `join`.
    """
    moment = moments(rows.column(at), BEFORE_ALL) if isinstance(at, str) else np.ascontiguousarray(at, dtype=np.int64)
    if not len(moment):
        return
    order = np.argsort(moment, kind="stable")
    asked = moment[order]
    held = {}
    for name, source in plan.sources.items():
        if name not in sources:
            raise ContractError(f"a view reads source {name!r}, which is not among {list(sources)}")
        held[name] = _Held(sources[name], source, [v for v in plan.kept_views if v.source.name == name], int(asked[0]))
    most_rows = max(int(memory_bytes * _OF_ROWS / (12 * len(plan.names) + 16 * len(rows.column_names))), 1)
    spans = [span for h in held.values() for span in h.spans]
    since = min((h.until for h in held.values()), default=_LOWEST)
    done = 0
    for end in cut(asked, spans, since, most_rows, memory_bytes * _OF_EVENTS):
        tables = {name: h.advance(end) for name, h in held.items()}
        last = int(np.searchsorted(asked, end, side="right"))
        for first in range(done, last, most_rows):  # many rows of one moment
            some = order[first : min(first + most_rows, last)]
            yield some, join(rows.take(pa.array(some)), plan, tables, at=moment[some], workers=workers)
        done = last
        tables.clear()
        for h in held.values():
            h.drop(end)


def bounded(
    rows: pa.Table,
    plan: FeaturePlan,
    sources: Mapping[str, pa.Table | Parts],
    *,
    at: Ints,
    memory_bytes: int,
    workers: int | None = None,
) -> npt.NDArray[np.float32]:
    """The answer of `join`, at once where it fits the memory, else slice by slice."""
    if _working_bytes(plan, sources) <= memory_bytes:
        return join(rows, plan, sources, at=at, workers=workers)
    out = np.empty((len(rows), len(plan.names)), dtype=np.float32)
    for some, x in stream(rows, plan, sources, at=at, memory_bytes=memory_bytes, workers=workers):
        out[some] = x
    return out


def _working_bytes(plan: FeaturePlan, sources: Mapping[str, pa.Table | Parts]) -> int:
    """About what `join` takes at once beside what it reads in place: windows are laid out, newest values are not."""
    taken = 0
    for view in plan.kept_views:
        if view.newest_leaves is None and view.source.name in sources:
            rows = sources[view.source.name]
            taken = max(taken, len(rows) * 8 * (5 + 2 * len(view.operands)))
    return taken


class _Held:
    """A source as far as it has been read, and what is still needed of that."""

    def __init__(self, rows: pa.Table | Parts, source: SourcePlan, views: list[ViewPlan], first: int) -> None:
        self._rows: Rows | Parts = Rows(rows) if isinstance(rows, pa.Table) else rows
        self._source = source
        self._views = views
        self._columns = list(dict.fromkeys(c for v in views for c in v.columns))
        self._rows.check(self._columns)
        self._blocks = [(b, *_extremes(self._rows, b, source.time)) for b in self._rows.blocks()]
        kept = [v.kept_us for v in views]
        self.until = first - max(kept) - 1 if min(kept) >= 0 else _LOWEST
        """Event time up to which it has been read."""
        self._table: pa.Table | None = None

    @property
    def spans(self) -> list[Span]:
        """Its events, block by block."""
        operands = max(len(v.operands) for v in self._views)
        row = sum(_STRING_BYTES if self._source.dtypes[c] == "string" else 8 for c in self._columns)
        # Twice as a table (as read, and behind what is carried), once as the join lays it out.
        row = 2 * row + 8 * (4 + 2 * operands)
        return [Span(low, high, row * b.rows) for b, low, high in self._blocks if low <= high]

    def advance(self, until: int) -> pa.Table:
        """Read on up to this event time: the events that moments up to then can need."""
        found = [] if self._table is None else [self._table]
        for block, low, high in self._blocks:
            if low <= until and high > self.until:
                time = moments(self._rows.read(block, [self._source.time]).column(0), NEVER)
                chosen = np.flatnonzero((time > self.until) & (time <= until)) + block.first
                if len(chosen):
                    found.append(self._rows.take(block, self._columns, chosen))
        if isinstance(self._rows, Parts):
            self._rows.release()
        self.until = until
        self._table = pa.concat_tables(found) if found else self._rows.table(self._columns).slice(0, 0)
        return self._table

    def drop(self, cutoff: int) -> None:
        """Keep what moments after the cutoff can need."""
        assert self._table is not None
        time = moments(self._table.column(self._source.time), NEVER)
        known = moments(self._table.column(self._source.known_at), NEVER) if self._source.known_at else time
        keep = np.zeros(len(time), dtype=np.bool_)
        by_entity = {view.entity: view for view in self._views}
        for entity, view in by_entity.items():
            codes, _, groups = entity_codes(view, self._table.select(list(entity)), self._table.slice(0, 0))
            codes = np.ascontiguousarray(codes)
            for kept_us in {v.kept_us for v in self._views if v.entity == entity}:
                keep_needed(codes, groups, time, known, cutoff, kept_us, keep)
        chosen = pa.array(np.flatnonzero(keep))
        names, columns, self._table = self._table.column_names, self._table.columns, None
        for i, column in enumerate(columns):  # one by one: what is kept and what it is taken from are never both whole
            columns[i] = column.take(chosen).combine_chunks()
            del column
        self._table = pa.table(dict(zip(names, columns, strict=True)))


def _extremes(rows: Rows | Parts, block: Block, name: str) -> tuple[int, int]:
    """First and last event time of a block; without any, the last is the smaller one."""
    if isinstance(rows, Parts) and (found := rows.extremes(block, name)) is not None:
        return found
    time = rows.numbers(block, name)
    time = time[time != NEVER]
    return (int(time.min()), int(time.max())) if len(time) else (0, -1)
