"""Windows and late arrivals offline, in any order: the events of the entities asked for, laid out by entity, swept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.aggregates import BEFORE_ALL, NEWEST
from raymill.actors.entities import Numbered
from raymill.actors.evaluate import Floats, Ints, columns_of, evaluate
from raymill.actors.feature_plan import ViewPlan
from raymill.actors.merge import HEAD, measure, scatter, sweep_groups
from raymill.actors.offline_events import NONE, Asked, Events
from raymill.actors.parts import Block
from raymill.actors.windows import group

_STEP = 1 << 15
"""Rows for which operands are evaluated at once: their intermediate values stay in the processor's cache."""
_RANGES = 4
"""Ranges of entities for each thread: one with much to do does not keep the others waiting."""
_LOWEST = int(np.iinfo(np.int64).min)


@dataclass(frozen=True)
class _Kept:
    """What is laid out of each event beside its times and number, and what is made of that."""

    width: int
    values: Callable[[Block], Floats]
    leaves: Ints
    kept_us: int


def sweep_view(view: ViewPlan, events: Events, numbered: Numbered, asked: Asked) -> Floats:
    """All leaves of a view [rows, leaves]."""
    names = columns_of_operands(view)
    out = view.empty(len(asked.at))
    values = lambda block: operands_of(view, events.rows.read(block, names))  # noqa: E731
    _sweep(events, numbered, asked, _Kept(len(view.operands), values, view.leaves, view.kept_us), out)
    return out


def sweep_newest(view: ViewPlan, events: Events, numbered: Numbered, asked: Asked) -> Ints:
    """Number of the newest event at each row's moment, −1 for none: a sweep that carries nothing but numbers."""
    out = np.full((len(asked.at), 1), np.nan)
    leaves = np.array([[NEWEST, 0, -1]], dtype=np.int64)
    _sweep(events, numbered, asked, _Kept(1, _numbers, leaves, view.kept_us), out)
    return np.nan_to_num(out[:, 0], nan=-1.0).astype(np.int64)


def _numbers(block: Block) -> Floats:
    return np.arange(block.first, block.first + block.rows, dtype=np.float64)[None, :]


def _sweep(events: Events, numbered: Numbered, asked: Asked, kept: _Kept, out: Floats) -> None:
    """Fill `out` [rows, leaves], which comes as it is for entities without events."""
    if not len(asked.at):
        return
    rows, row_starts = group(numbered.asked, numbered.groups, asked.order)
    until = int(asked.at[asked.order[-1]])
    since = max(int(asked.at[asked.order[0]]), BEFORE_ALL)
    after = _LOWEST if kept.kept_us < 0 else since - kept.kept_us - 1
    starts = _measured(events, numbered, np.diff(row_starts) > 0, after, until)
    ranges = _ranges(starts, _RANGES * events.threads if events.threads > 1 else 1)
    width = HEAD + kept.width
    buffer, filled = np.empty(int(starts[-1]) * width, dtype=np.int64), starts.copy()
    halves = _ranges(starts, events.threads)
    for b, values in enumerate(events.ahead(kept.values)):

        def lay(entities: tuple[int, int], b: int = b, values: Floats = values) -> None:
            codes, first = numbered.events[b], events.blocks[b].first
            times = events.time[b], events.known[b]
            scatter(codes, numbered.low, *entities, *times, values, first, after, until, filled, starts, buffer)

        events.at_once(lay, halves)
    tied = np.zeros(len(events), dtype=np.bool_)

    def sweep(entities: tuple[int, int], key_hash: Ints) -> int:
        leaves = kept.leaves
        return sweep_groups(buffer, starts, width, *entities, key_hash, tied, rows, row_starts, asked.at, leaves, out)

    if sum(events.at_once(lambda r: sweep(r, NONE), ranges)):
        key_hash = events.hashes_of(tied)
        events.at_once(lambda r: sweep(r, key_hash), ranges)


def _measured(events: Events, numbered: Numbered, wanted: npt.NDArray[np.bool_], after: int, until: int) -> Ints:
    """Where each entity's events will begin, and the end."""

    def count(number: int) -> Ints:
        counts = np.zeros(numbered.groups, dtype=np.int64)
        for b in range(number, len(events.blocks), events.threads):
            codes, time, known = numbered.events[b], events.time[b], events.known[b]
            measure(codes, numbered.low, time, known, wanted, after, until, counts)
        return counts

    counts = sum(events.at_once(count, range(events.threads)))
    return np.concatenate([[0], np.cumsum(counts)])


def _ranges(starts: Ints, n: int) -> list[tuple[int, int]]:
    """Up to n ranges of entities, with about as many events each."""
    cuts = np.searchsorted(starts, np.linspace(0, starts[-1], n + 1)[1:-1]).tolist()
    return [(a, b) for a, b in pairwise([0, *cuts, len(starts) - 1]) if a < b]


def columns_of_operands(view: ViewPlan) -> list[str]:
    """Columns that the view's operands are made from."""
    return list(dict.fromkeys(c for e in view.operands for c in e.columns()))


def operands_of(view: ViewPlan, rows: pa.Table) -> Floats:
    """What a view keeps of each row: float64 [operands, rows]."""
    names = columns_of_operands(view)
    columns = columns_of(rows, names, view.source.dtypes)
    values = np.empty((len(view.operands), len(rows)), dtype=np.float64)
    for first in range(0, len(rows), _STEP):
        n = min(_STEP, len(rows) - first)
        some = {name: c[first : first + n] for name, c in columns.items()}
        for j, expr in enumerate(view.operands):
            values[j, first : first + n] = evaluate(expr, some, n)
    return values
