"""The kernels of the offline join for any order, late arrivals and windows: events laid out by entity, then swept.

What is computed, and how an entity's events turn into a value, is said and done in `windows`; here is how ten million
of them get there without a sort: `measure` and `scatter` lay the events out entity by entity (a counting sort), each
entity's few are put in order, then `sweep_groups` goes through them. Several threads take a range of entities each.
Newest values alone, from events in the order of their time, go a shorter way: `scan.py`.

Key hashes, which decide between events of an entity with the same event time and known-at, are made only for those:
the sweep marks them in `tied` and returns how many; the caller makes the hashes and runs again.

All kernels take read-only arrays, so that Arrow's own memory and mapped files are read; hence their signatures.
"""

from __future__ import annotations

import numpy as np
from numba import boolean, float64, int64, njit, types, uint32, void

from raymill.actors.aggregates import BEFORE_ALL, LAST, MAX, MIN, NEWEST, extreme, newest, total
from raymill.actors.evaluate import Floats, Ints

_INTS = types.Array(int64, 1, "C", readonly=True)
_STORED = types.Array(int64, 1, "C", readonly=True, aligned=False)
_CODES = types.Array(uint32, 1, "C", readonly=True, aligned=False)
_MARKS = types.Array(boolean, 1, "C", readonly=True)
_TABLE = types.Array(int64, 2, "C", readonly=True)
_MATRIX = types.Array(float64, 2, "C", readonly=True)

HEAD = 3
"""Words of an event in front of its operands: event time, known-at, row."""
_FEW = 64
"""A look at every event for every row is taken up to so many looks for each of both."""
_MOVES = 8
"""An entity's events are put in order by insertion, until that takes this many moves an event."""


def _measure_types(codes: types.Array) -> object:
    return void(codes, int64, _STORED, _STORED, _MARKS, int64, int64, int64[::1])


@njit([_measure_types(_STORED), _measure_types(_CODES)], cache=True, nogil=True)
def measure(
    codes: Ints, low: int, time: Ints, known: Ints, wanted: np.ndarray, after: int, until: int, counts: Ints
) -> None:
    """Count each entity's events: those known at some time, in (after, until], that are wanted."""
    groups = len(counts)
    for i in range(len(time)):
        g = int64(codes[i]) - low
        if 0 <= g < groups and wanted[g] and after < time[i] <= until and known[i] <= until:
            counts[g] += 1


def _scatter_types(codes: types.Array) -> object:
    times, counts = (_STORED, _STORED), (int64[::1], _INTS)
    return void(codes, int64, int64, int64, *times, _MATRIX, int64, int64, int64, *counts, int64[::1])


@njit([_scatter_types(_STORED), _scatter_types(_CODES)], cache=True, nogil=True)
def scatter(
    codes: Ints,
    low: int,
    begin: int,
    end: int,
    time: Ints,
    known: Ints,
    operands: Floats,
    first: int,
    after: int,
    until: int,
    filled: Ints,
    starts: Ints,
    buffer: Ints,
) -> None:
    """Lay the events of entities begin … end − 1 out, `HEAD` + operands words each, in the order in which they come.

    `starts` are where each entity's begin, by what `measure` counted (an entity of no events is not wanted); `filled`
    begins as a copy of them and is carried on from block to block; `first` is the number of the block's first event.
    """
    width = HEAD + operands.shape[0]
    floats = buffer.view(np.float64)
    for i in range(len(time)):
        g = int64(codes[i]) - low
        if begin <= g < end and starts[g] < starts[g + 1] and after < time[i] <= until and known[i] <= until:
            at = filled[g] * width
            filled[g] += 1
            buffer[at] = time[i]
            buffer[at + 1] = known[i]
            buffer[at + 2] = first + i
            for c in range(operands.shape[0]):
                floats[at + HEAD + c] = operands[c, i]


@njit(cache=True, nogil=True)
def _before(buffer: Ints, a: int, b: int, key_hash: Ints) -> bool:
    """Whether the event at word a comes before the one at b; with the same key they keep their order."""
    if buffer[a] != buffer[b]:
        return buffer[a] < buffer[b]
    if len(key_hash) > 0 and key_hash[buffer[a + 2]] != key_hash[buffer[b + 2]]:
        return key_hash[buffer[a + 2]] < key_hash[buffer[b + 2]]
    return buffer[a + 1] < buffer[b + 1]


@njit(cache=True, nogil=True)
def _in_order(buffer: Ints, begin: int, n: int, width: int, key_hash: Ints, places: Ints) -> None:
    """`places[:n]`: words at which the group's events begin, in the order of (time, key hash, known-at)."""
    for i in range(n):
        places[i] = begin + i * width
    moves = 0
    for i in range(1, n):
        moved = places[i]
        j = i
        while j > 0 and _before(buffer, moved, places[j - 1], key_hash):
            places[j] = places[j - 1]
            j -= 1
        places[j] = moved
        moves += i - j
        if moves > _MOVES * n:  # far from it: three stable sorts, by the last part of the order first
            order = np.arange(n)
            parts = np.empty((3, n), np.int64)
            for k in range(n):
                parts[0, k] = buffer[begin + k * width + 1]
                parts[1, k] = key_hash[buffer[begin + k * width + 2]] if len(key_hash) > 0 else 0
                parts[2, k] = buffer[begin + k * width]
            for c in range(3):
                order = order[np.argsort(parts[c][order], kind="mergesort")]
            for k in range(n):
                places[k] = begin + order[k] * width
            return


@njit(cache=True, nogil=True)
def _arrivals(time: Ints, known: Ints, order: Ints) -> None:
    """`order`: the events' numbers in the order in which they become known."""
    moves = 0
    for i in range(len(time)):
        arrive = max(time[i], known[i])
        j = i
        while j > 0 and max(time[order[j - 1]], known[order[j - 1]]) > arrive:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i
        moves += i - j
        if moves > _MOVES * len(time):
            order[:] = np.argsort(np.maximum(time, known), kind="mergesort")
            return


@njit(cache=True, nogil=True)
def _look(
    buffer: Ints,
    begin: int,
    n: int,
    width: int,
    key_hash: Ints,
    tied: np.ndarray,
    rows: Ints,
    at: Ints,
    plan: Ints,
    out: Floats,
) -> int:
    """One leaf of newest values, by a look at every event for every row: for few, cheaper than to put them in order."""
    ties = 0
    for row in rows:
        t = at[row]
        top = BEFORE_ALL
        for i in range(n):  # without a branch that no processor could foresee
            a = begin + i * width
            top = max(top, buffer[a] if max(buffer[a], buffer[a + 1]) <= t else BEFORE_ALL)
        best = -1
        for i in range(n):
            a = begin + i * width
            if buffer[a] != top or buffer[a + 1] > t:
                continue
            if best < 0 or buffer[a + 1] > buffer[best + 1]:
                best = a
            elif buffer[a + 1] == buffer[best + 1]:
                if len(key_hash) == 0:
                    tied[buffer[a + 2]] = True
                    tied[buffer[best + 2]] = True
                    ties += 1
                elif key_hash[buffer[a + 2]] > key_hash[buffer[best + 2]]:
                    best = a
        if best >= 0 and (plan[0, 2] < 0 or t - buffer[best] <= plan[0, 2]):
            out[row, 0] = buffer.view(np.float64)[best + HEAD + plan[0, 1]]
        else:
            out[row, 0] = np.nan
    return ties


@njit(
    int64(_INTS, _INTS, int64, int64, int64, _INTS, boolean[::1], _INTS, _INTS, _INTS, _TABLE, float64[:, ::1]),
    cache=True,
    nogil=True,
)
def sweep_groups(
    buffer: Ints,
    starts: Ints,
    width: int,
    low: int,
    high: int,
    key_hash: Ints,
    tied: np.ndarray,
    rows: Ints,
    row_starts: Ints,
    at: Ints,
    plan: Ints,
    out: Floats,
) -> int:
    """Fill `out` for the rows of entities low … high − 1, as `windows.sweep` does from records; how many ties.

    Args:
        buffer: events as `scatter` lays them out.
        starts: where each entity's begin.
        width: words of an event.
        low: first entity.
        high: one after the last.
        key_hash: of each event's row; empty: mark ties in `tied`, their entities' rows are not filled.
        tied: set for events (by row) with the same entity and time.
        rows: row numbers by entity, in each by moment.
        row_starts: where each entity's rows begin, and the end.
        at: moment of each row.
        plan: leaves, as in `windows.sweep`.
        out: [rows, leaves], as it is for entities without events.
    """
    floats = buffer.view(np.float64)
    ties = 0
    most = np.max(np.diff(starts[low : high + 1]))
    places = np.empty(most, np.int64)
    times = np.empty(most, np.int64)
    knowns = np.empty(most, np.int64)
    hashes = np.zeros(most, np.int64)
    orders = np.empty(most, np.int64)
    values = np.empty((width - HEAD, most), np.float64)
    for g in range(low, high):
        n = starts[g + 1] - starts[g]
        if n == 0 or row_starts[g] == row_starts[g + 1]:
            continue
        mine = rows[row_starts[g] : row_starts[g + 1]]
        if len(plan) == 1 and plan[0, 0] == NEWEST and n * len(mine) <= _FEW * (n + len(mine)):
            ties += _look(buffer, starts[g] * width, n, width, key_hash, tied, mine, at, plan, out)
            continue
        _in_order(buffer, starts[g] * width, n, width, key_hash, places)
        kept = 0
        clash = False
        for i in range(n):
            a = places[i]
            if i > 0 and buffer[a] == buffer[places[i - 1]]:
                if len(key_hash) == 0:
                    clash = True
                    tied[buffer[a + 2]] = True
                    tied[buffer[places[i - 1] + 2]] = True
                    ties += 1
                elif (
                    buffer[a + 1] == buffer[places[i - 1] + 1]
                    and key_hash[buffer[a + 2]] == key_hash[buffer[places[i - 1] + 2]]
                ):
                    continue
            times[kept] = buffer[a]
            knowns[kept] = buffer[a + 1]
            if len(key_hash) > 0:
                hashes[kept] = key_hash[buffer[a + 2]]
            for c in range(width - HEAD):
                values[c, kept] = floats[a + HEAD + c]
            kept += 1
        if clash:
            continue
        time = times[:kept]
        known = knowns[:kept]
        hashed = hashes[:kept]
        order = orders[:kept]
        _arrivals(time, known, order)
        for j in range(plan.shape[0]):
            kind = plan[j, 0]
            operand = values[plan[j, 1], :kept]
            if kind in (NEWEST, LAST):
                newest(time, known, hashed, order, operand, kind, plan[j, 2], mine, at, out[:, j])
            elif kind in (MIN, MAX):
                extreme(time, known, hashed, order, operand, kind, plan[j, 2], mine, at, out[:, j])
            else:
                total(time, known, hashed, order, operand, kind, plan[j, 2], mine, at, out[:, j])
    return ties


@njit(boolean(_INTS), cache=True, nogil=True)
def ascending(values: Ints) -> bool:
    """Whether no value is smaller than the one before it."""
    for i in range(1, len(values)):  # noqa: SIM110 (numba knows no generators)
        if values[i] < values[i - 1]:
            return False
    return True


@njit(cache=True, nogil=True)
def _slot(slots: Ints, names: Ints, value: int, bits: int) -> int:
    h = np.uint64(value) * np.uint64(0x9E3779B97F4A7C15)
    s = np.int64(h >> np.uint64(64 - bits))
    while slots[s] >= 0 and names[slots[s]] != value:
        s = (s + 1) & (len(slots) - 1)
    return int(s)


@njit(int64(int64[::1], int64[::1], int64), cache=True, nogil=True)
def densify(first: Ints, second: Ints, unknown: int) -> int:
    """Put dense codes 0 … n − 1 in place of the distinct values of `first`, in the order in which they come; n.

    `second` gets the same codes, `unknown` for values that `first` does not have. `unknown` itself is kept in both.
    """
    bits = 10
    slots = np.full(1 << bits, -1, np.int64)
    names = np.empty(1 << (bits - 1), np.int64)
    n = 0
    for i in range(len(first)):
        if first[i] == unknown:
            continue
        if 2 * n >= len(slots) - 2:
            bits += 1
            slots = np.full(1 << bits, -1, np.int64)
            grown = np.empty(1 << (bits - 1), np.int64)
            grown[:n] = names[:n]
            names = grown
            for c in range(n):
                slots[_slot(slots, names, names[c], bits)] = c
        s = _slot(slots, names, first[i], bits)
        if slots[s] < 0:
            slots[s] = n
            names[n] = first[i]
            n += 1
        first[i] = slots[s]
    for i in range(len(second)):
        if second[i] != unknown:
            c = slots[_slot(slots, names, second[i], bits)]
            second[i] = c if c >= 0 else unknown
    return n
