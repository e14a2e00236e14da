"""The kernel of windows and newest values: one sweep over an entity's events, for training and serving alike.

Semantics (t is the moment of the request or label row; an event is a row of the view's source)
- An event is *known* at t when its event time ≤ t and its known-at ≤ t. A null known-at: never. A source without
  a known-at column: known at its event time. A null event time: never.
- A window of width w at t holds the known events with event time in (t − w, t] whose operand is not null.
- An empty `count` or `sum` is 0, every other empty aggregate null.
- `sum`, `mean` and `std` are exact and do not depend on order: each operand is rounded to 2⁻²⁰ (half to even), sums of
  it and of its square are integers, and the result is rounded from those. An operand of 2⁴² or more in magnitude makes
  them null while in the window. `std` is that of a sample (n − 1); of fewer than two values it is null.
- Newest means: largest (event time, known-at, hash of the row's key); the hash makes ties independent of the order of
  arrival. `last` is the operand of the newest event in the window whose operand is not null; a feature without a
  window is the value of the newest known event even if that is null, if t − event time ≤ max age (inclusive).
- Two rows of an entity with the same event time, known-at and key count once: reading a batch again changes nothing.
- A *corrected* row has entity, event time and key of an earlier one and a later known-at: from then on it stands in the
  earlier one's place, before then the earlier one stands. With another event time or entity it is another event.
- A null in the entity's key matches nothing, and a label row is always kept.

Form: all events of one entity are a *record* of 64-bit words: `n, event time[n], known-at[n], key hash[n], order of
becoming known[n], operand 0[n] (float64), operand 1[n] …`, sorted by (event time, key hash, known-at). The online store
holds these records, the offline join builds the same ones, `sweep` reads either.

Compiled by numba at the first call, once a machine: the compiled code lies in `__pycache__` beside this file, or in
numba's cache folder of the user where that can not be written.
"""

from __future__ import annotations

import numpy as np
from numba import int64, njit, types

from raymill.actors.aggregates import BEFORE_ALL, KINDS, LAST, MAX, MIN, NEWEST, TIME, extreme, newest, total
from raymill.actors.evaluate import Floats, Ints

NEVER = np.iinfo(np.int64).max
"""Known-at of an event that is never known."""
_READ = types.Array(int64, 1, "C", readonly=True)


@njit(cache=True, nogil=True)
def hash_numbers(state: Ints, values: Ints) -> None:
    """Mix one int64 column of the key into each row's hash, in place."""
    for i in range(len(state)):
        z = np.uint64(state[i]) ^ np.uint64(values[i])
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state[i] = np.int64(z ^ (z >> np.uint64(31)))


@njit(cache=True, nogil=True)
def hash_bytes(out: Ints, starts: Ints, data: np.ndarray) -> None:
    """FNV-1a of each row's bytes, `data[starts[i]:starts[i + 1]]`."""
    for i in range(len(out)):
        h = np.uint64(0xCBF29CE484222325)
        for j in range(starts[i], starts[i + 1]):
            h = (h ^ np.uint64(data[j])) * np.uint64(0x100000001B3)
        out[i] = np.int64(h)


@njit(cache=True, nogil=True)
def prune(codes: Ints, groups: int, time: Ints, known: Ints, cutoff: int, kept_us: int) -> int:
    """Take the events that no moment ≥ `cutoff` can need out of their groups (code −1); how many.

    Kept are those with event time > cutoff − `kept_us`. A negative `kept_us` means −1 − it, and that those not older
    than the group's newest known at `cutoff` are kept too (a newest value without max age).
    """
    dropped = 0
    latest = np.full(groups, BEFORE_ALL, np.int64)
    if kept_us < 0:
        kept_us = -kept_us - 1
        for i in range(len(codes)):
            if codes[i] >= 0 and max(time[i], known[i]) <= cutoff:
                latest[codes[i]] = max(latest[codes[i]], time[i])
    else:
        latest[:] = NEVER
    for i in range(len(codes)):
        if codes[i] >= 0 and time[i] <= cutoff - kept_us and time[i] < latest[codes[i]]:
            codes[i] = -1
            dropped += known[i] != NEVER
    return dropped


@njit(cache=True, nogil=True)
def pack(
    codes: Ints,
    groups: int,
    by_time: Ints,
    by_known: Ints,
    time: Ints,
    known: Ints,
    key_hash: Ints,
    operands: Floats,
) -> tuple[Ints, Ints]:
    """Records of all groups in one buffer, and where each begins (one more entry: the end).

    `by_time` sorts the events by (time, key hash, known), `by_known` by max(time, known); `codes` is each event's
    group, −1 for none; `operands` is [operands, events]. Events that are never known are left out, repeated ones too.
    """
    width = 4 + operands.shape[0]
    size = np.zeros(groups, np.int64)
    last = np.full(groups, -1, np.int64)
    place = np.full(len(codes), -1, np.int64)
    for p in range(len(by_time)):
        i = by_time[p]
        g = codes[i]
        if g < 0 or known[i] == NEVER:
            continue
        j = last[g]
        if j >= 0 and time[j] == time[i] and known[j] == known[i] and key_hash[j] == key_hash[i]:
            continue
        last[g] = i
        place[i] = size[g]
        size[g] += 1
    starts = np.zeros(groups + 1, np.int64)
    for g in range(groups):
        starts[g + 1] = starts[g] + 1 + width * size[g]
    buffer = np.empty(starts[groups], np.int64)
    floats = buffer.view(np.float64)
    for g in range(groups):
        buffer[starts[g]] = size[g]
    ordered = np.zeros(groups, np.int64)
    for p in range(len(by_known)):
        i = by_known[p]
        if place[i] < 0:
            continue
        g = codes[i]
        n = size[g]
        first = starts[g] + 1
        at = first + place[i]
        buffer[at] = time[i]
        buffer[at + n] = known[i]
        buffer[at + 2 * n] = key_hash[i]
        buffer[first + 3 * n + ordered[g]] = place[i]
        ordered[g] += 1
        for c in range(operands.shape[0]):
            floats[at + (4 + c) * n] = operands[c, i]
    return buffer, starts


@njit(cache=True, nogil=True)
def unpack(buffer: Ints, starts: Ints, columns: int) -> tuple[Ints, Ints, Ints, Ints, Floats]:
    """What `pack` was given: codes, time, known, key hash, operands; a start of −1 is a group without a record."""
    floats = buffer.view(np.float64)
    total = 0
    for g in range(len(starts)):
        if starts[g] >= 0:
            total += buffer[starts[g]]
    codes = np.empty(total, np.int64)
    time = np.empty(total, np.int64)
    known = np.empty(total, np.int64)
    key_hash = np.empty(total, np.int64)
    operands = np.empty((columns, total), np.float64)
    at = 0
    for g in range(len(starts)):
        if starts[g] < 0:
            continue
        n = buffer[starts[g]]
        first = starts[g] + 1
        for i in range(n):
            codes[at] = g
            time[at] = buffer[first + i]
            known[at] = buffer[first + n + i]
            key_hash[at] = buffer[first + 2 * n + i]
            for c in range(columns):
                operands[c, at] = floats[first + (4 + c) * n + i]
            at += 1
    return codes, time, known, key_hash, operands


@njit(cache=True, nogil=True)
def newest_events(buffer: Ints, firsts: Ints, sizes: Ints) -> Ints:
    """Place of the newest event in each record: the largest by event time, known-at, key hash.

    `firsts` are the words after each record's first, `sizes` its number of events, at least one.
    """
    found = np.empty(len(firsts), np.int64)
    for g in range(len(firsts)):
        n = sizes[g]
        time = buffer[firsts[g] : firsts[g] + n]
        known = buffer[firsts[g] + n : firsts[g] + 2 * n]
        best = n - 1
        i = n - 2
        while i >= 0 and time[i] == time[best]:
            if known[i] > known[best]:
                best = i
            i -= 1
        found[g] = best
    return found


@njit(
    types.UniTuple(int64[::1], 2)(_READ, int64, _READ),
    cache=True,
    nogil=True,
)
def group(codes: Ints, groups: int, by_time: Ints) -> tuple[Ints, Ints]:
    """Rows in the order of their group, and within it of `by_time`; and where each group begins (and the last ends)."""
    starts = np.zeros(groups + 1, np.int64)
    for i in range(len(codes)):
        if codes[i] >= 0:
            starts[codes[i] + 1] += 1
    for g in range(groups):
        starts[g + 1] += starts[g]
    filled = starts.copy()
    rows = np.empty(starts[groups], np.int64)
    for p in range(len(by_time)):
        i = by_time[p]
        if codes[i] >= 0:
            rows[filled[codes[i]]] = i
            filled[codes[i]] += 1
    return rows, starts


@njit(cache=True, nogil=True)
def sweep(buffer: Ints, starts: Ints, rows: Ints, row_starts: Ints, at: Ints, plan: Ints, out: Floats) -> None:
    """Fill `out` [rows, leaves] from the records.

    Args:
        buffer: records, as `pack` makes them.
        starts: where each group's record begins; −1: no record, its rows keep what `out` holds.
        rows: row numbers by group, in each group by moment, as `group` gives them.
        row_starts: where each group's rows begin in `rows`, and the end.
        at: moment of each row, µs.
        plan: [leaves, 3]: kind, operand, width in µs (of NEWEST: max age, −1 for none).
        out: float64 [rows, leaves], NaN for null.
    """
    floats = buffer.view(np.float64)
    for g in range(len(row_starts) - 1):
        if starts[g] < 0 or row_starts[g] == row_starts[g + 1]:
            continue
        mine = rows[row_starts[g] : row_starts[g + 1]]
        n = buffer[starts[g]]
        first = starts[g] + 1
        time = buffer[first : first + n]
        known = buffer[first + n : first + 2 * n]
        key_hash = buffer[first + 2 * n : first + 3 * n]
        order = buffer[first + 3 * n : first + 4 * n]
        for j in range(plan.shape[0]):
            kind = plan[j, 0]
            begin = first + (4 + plan[j, 1]) * n
            values = floats[begin : begin + n]
            if kind in (NEWEST, LAST, TIME):
                newest(time, known, key_hash, order, values, kind, plan[j, 2], mine, at, out[:, j])
            elif kind in (MIN, MAX):
                extreme(time, known, key_hash, order, values, kind, plan[j, 2], mine, at, out[:, j])
            else:
                total(time, known, key_hash, order, values, kind, plan[j, 2], mine, at, out[:, j])


def warm() -> None:
    """Compile what the online path runs, or load it from its cache, before the first row waits for it."""
    one, none = np.zeros(1, np.int64), np.empty(0, np.int64)
    buffer, starts = pack(one, 1, one, one, one, one, one, np.zeros((1, 1)))
    rows, row_starts = group(one, 1, one)
    plan = np.array([[kind, 0, 1] for kind in KINDS.values()], dtype=np.int64)
    sweep(buffer, starts[:1].copy(), rows, row_starts, one, plan, np.zeros((1, len(plan))))
    unpack(none, none, 1)
    prune(one.copy(), 1, one, one, 0, 1)
