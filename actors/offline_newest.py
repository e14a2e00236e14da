"""Newest values offline: one pass over entities and times, and only the values found are taken.

This way is for views of newest values alone, over events that lie in the order of their time and are known at it. Then
what is read is two columns, in place, and of the other columns the lines that hold a value found.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.entities import Numbered
from raymill.actors.evaluate import Ints, columns_of, evaluate
from raymill.actors.feature_plan import ViewPlan
from raymill.actors.offline_events import NONE, Asked, Events
from raymill.actors.parts import Block, Parts
from raymill.actors.scan import OUT_OF_ORDER, ROW, TIES, carry, drop_old, first_at_least, gather, put, scan
from raymill.actors.windows import group
from raymill.runtime.expressions import Column

_LINE_BITS = 3
"""So many of 8-byte values are a line of the processor's cache."""
_BEFORE_ALL = int(np.iinfo(np.int64).min)

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Stretch:
    """Consecutive events, and the rows whose moments fall among them."""

    begin: int
    end: int
    rows: Ints


@dataclass
class _Scanned:
    """What a stretch has left."""

    ties: int
    done: int
    """Rows that are answered."""
    last: npt.NDArray[np.int32]
    """Newest event of each entity, −1 for none."""


def find_newest(events: Events, numbered: Numbered, asked: Asked) -> Ints | None:
    """Number of the newest event at each row's moment, −1 for none; None: the events are not in order."""
    stretches = _stretches(events, asked)
    if stretches is None:
        return None
    found = np.full(len(asked.at), -1, dtype=np.int64)
    tied = np.zeros(len(events), dtype=np.bool_)
    scanned = events.at_once(lambda s: _scan(events, numbered, asked, s, NONE, tied, found), stretches)
    if any(s.ties == OUT_OF_ORDER for s in scanned):
        return None
    if any(s.ties for s in scanned):
        hashes = events.hashes_of(tied)
        scanned = events.at_once(lambda s: _scan(events, numbered, asked, s, hashes, tied, found), stretches)
    before = np.full(numbered.groups, -1, dtype=np.int32)
    for stretch, left in zip(stretches, scanned, strict=True):
        carry(stretch.rows, numbered.asked, before, left.last, left.done, found)
    return found


def _stretches(events: Events, asked: Asked) -> list[_Stretch] | None:
    """One for each thread; None: the events are not in order.

    A stretch begins where the time changes, so that ties stay together; `scan` finds out if there is no order.
    """
    cuts, row_cuts = [0], [0]
    for part in range(1, events.threads):
        number = len(events) * part // events.threads
        block = bisect_right(events.firsts, number) - 1
        time = events.time[block]
        moment = int(time[number - events.firsts[block]])
        place = first_at_least(time, moment)
        if place == len(time) or int(time[place]) != moment or (place and time[place - 1] >= moment):
            return None
        if place == 0 and block and events.time[block - 1][-1] >= moment:
            continue  # one time over the end of a block: the stretch goes on
        cut = events.firsts[block] + place
        if cut > cuts[-1]:
            cuts.append(cut)
            row_cuts.append(int(np.searchsorted(asked.at, moment, sorter=asked.order)))
    cuts, row_cuts = [*cuts, len(events)], [*row_cuts, len(asked.at)]
    if row_cuts != sorted(row_cuts):
        return None
    places = zip(cuts, cuts[1:], row_cuts, row_cuts[1:], strict=False)
    return [_Stretch(a, b, asked.order[r:s]) for a, b, r, s in places]


def _scan(
    events: Events,
    numbered: Numbered,
    asked: Asked,
    stretch: _Stretch,
    hashes: Ints,
    tied: npt.NDArray[np.bool_],
    found: Ints,
) -> _Scanned:
    last = np.full(numbered.groups, -1, dtype=np.int32)
    late = events.source.known_at is not None
    last_known = np.empty(numbered.groups if late else 0, dtype=np.int64)
    state = np.array([_BEFORE_ALL, 0, 0, 0], dtype=np.int64)
    for b, block in enumerate(events.blocks):
        a, z = max(stretch.begin - block.first, 0), min(stretch.end - block.first, block.rows)
        if a >= z:
            continue
        ties = scan(
            numbered.events[b][a:z],
            numbered.low,
            events.time[b][a:z],
            events.known[b][a:z] if late else NONE,
            hashes,
            block.first + a,
            stretch.rows,
            numbered.asked,
            asked.at,
            last,
            last_known,
            found,
            tied,
            state,
        )
        if ties == OUT_OF_ORDER:
            return _Scanned(OUT_OF_ORDER, 0, last)
    return _Scanned(int(state[TIES]), int(state[ROW]), last)


def take_newest(view: ViewPlan, events: Events, found: Ints, asked: Asked, out: Matrix, first: int) -> None:
    """Fill the view's columns of `out`, from number `first` on, with the values of the events found, NaN for none.

    Only the events found are read, and only their operands evaluated.
    """
    width = view.max_age_us
    by_block = np.searchsorted(events.firsts[:-1], found, side="right") - 1 if len(events.blocks) > 1 else None
    place = np.minimum(found, 0) if by_block is None else by_block
    ordered, starts = group(place, max(len(events.blocks), 1), asked.order)

    def take(number: int) -> None:
        block, rows = events.blocks[number], ordered[starts[number] : starts[number + 1]]
        if width is not None:
            drop_old(events.time[number], block.first, rows, asked.at, width, found)
            rows = rows[found[rows] >= 0]
        if len(rows):
            # Line by line: rows in the order of their moments jump back and forth over all of the block.
            lines = (found[rows] - block.first) >> _LINE_BITS
            rows = rows[group(lines, (block.rows >> _LINE_BITS) + 1, np.arange(len(rows)))[0]]
            _take(view, events, block, rows, found, out, first)

    events.at_once(take, range(len(events.blocks)))
    none = found < 0
    if none.any():
        out[none, first : first + len(view.features)] = np.nan


def _take(view: ViewPlan, events: Events, block: Block, rows: Ints, found: Ints, out: Matrix, first: int) -> None:
    assert view.newest_leaves is not None
    operands = [view.operands[view.leaves[leaf, 1]] for leaf in view.newest_leaves]
    plain, others = [], []
    for column, expr in enumerate(operands, first):
        place = _doubles(events, block, expr.name) if isinstance(expr, Column) else None
        if place is None:
            others.append((column, expr))
        else:
            plain.append((column, *place))
    if plain:
        columns, data, starts = zip(*plain, strict=True)
        gather(data[0], np.array(starts), np.array(columns), block.first, rows, found, out)
    names = list(dict.fromkeys(c for _, expr in others for c in expr.columns()))
    if not others:
        return
    some = columns_of(events.rows.take(block, names, found[rows]), names, view.source.dtypes)
    for column, expr in others:
        value = some[expr.name] if isinstance(expr, Column) else None
        put(value if isinstance(value, np.ndarray) else evaluate(expr, some, len(rows)), rows, out, column)


def _doubles(events: Events, block: Block, name: str) -> tuple[npt.NDArray[np.uint8], int] | None:
    """Where a column's doubles lie as they are, if they do."""
    if not isinstance(events.rows, Parts) or not pa.types.is_float64(events.rows.kind(name)):
        return None
    return events.rows.place(block, name)
