"""The kernels of one leaf over one entity's events: newest value, count, sum, mean, std, min, max, last.

What they mean is said in `windows`; here is how. Every kernel goes through the rows in the order of their moments and
carries its state on, so that each event comes in once and goes out once. Events are given in the order of (event time,
key hash, known-at): the versions of a corrected row stand side by side.

Exactness: an operand is rounded to 2⁻²⁰ (half to even) and added as an integer of two words, its square as one of four
words of 32 bits; every word is a sum of what each event gave to it, so that to take an event out restores the words.
Operands below 2⁴² and up to 2²⁹ events in a window can not overflow them. The result is rounded from these integers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from raymill.actors.evaluate import Floats, Ints

BEFORE_ALL = -(2**62)
"""A moment at which nothing is known."""

NEWEST, COUNT, SUM, MEAN, MIN, MAX, LAST, TIME, STD = range(9)
KINDS = {"newest": NEWEST, "count": COUNT, "sum": SUM, "mean": MEAN, "min": MIN, "max": MAX, "last": LAST, "std": STD}
"""TIME is not a feature's: the event time of the newest known event, from the same sweep."""

FIXED = float(2**20)
LARGEST = float(2**42)
_HALF = np.int64(2**32)
_MASK = _HALF - 1
_DIGITS = 6


@njit(cache=True, nogil=True)
def replaced(time: Ints, known: Ints, key_hash: Ints, i: int, t: int) -> bool:
    """Whether a later version of event i is known at t."""
    j = i + 1
    return j < len(time) and time[j] == time[i] and key_hash[j] == key_hash[i] and known[j] <= t and time[j] <= t


@njit(cache=True, nogil=True)
def _newer(time: Ints, known: Ints, i: int, j: int) -> bool:
    """Whether event i is newer than j, by event time, known-at, key hash."""
    if time[i] != time[j]:
        return time[i] > time[j]
    return known[i] > known[j] or (known[i] == known[j] and i > j)


@njit(cache=True, nogil=True)
def newest(
    time: Ints,
    known: Ints,
    key_hash: Ints,
    order: Ints,
    values: Floats,
    kind: int,
    width: int,
    rows: Ints,
    at: Ints,
    out: Floats,
) -> None:
    """NEWEST, TIME and LAST.

    Args:
        time: event times, sorted by (time, key hash, known-at).
        known: known-at of each.
        key_hash: of each; read only where two event times are the same.
        order: the events' numbers in the order of max(time, known-at).
        values: operand of each, NaN for null.
        kind: which one.
        width: of LAST: of the window, µs; of NEWEST: max age, −1 for none.
        rows: row numbers in the order of their moments.
        at: moment of each row, µs.
        out: filled for `rows`, NaN for null.
    """
    best = -1
    added = 0
    for row in rows:
        t = at[row]
        while added < len(order):
            i = order[added]
            if max(time[i], known[i]) > t:
                break
            if (kind != LAST or values[i] == values[i]) and (best < 0 or _newer(time, known, i, best)):
                best = i
            added += 1
        if kind == LAST and best >= 0 and replaced(time, known, key_hash, best, t):  # by a null: who was before?
            best = -1
            for p in range(added):
                i = order[p]
                if values[i] != values[i] or replaced(time, known, key_hash, i, t):
                    continue
                if best < 0 or _newer(time, known, i, best):
                    best = i
        if best < 0:
            out[row] = np.nan
        elif kind == NEWEST:
            out[row] = values[best] if width < 0 or t - time[best] <= width else np.nan
        elif kind == TIME:
            out[row] = time[best]
        else:
            out[row] = values[best] if time[best] > t - width else np.nan


@njit(cache=True, nogil=True)
def extreme(
    time: Ints,
    known: Ints,
    key_hash: Ints,
    order: Ints,
    values: Floats,
    kind: int,
    width: int,
    rows: Ints,
    at: Ints,
    out: Floats,
) -> None:
    """MIN and MAX: a heap whose top is thrown away while it is too old or replaced (such an event never comes back)."""
    sign = 1.0 if kind == MIN else -1.0
    heap = np.empty(len(time), np.int64)
    size = 0
    added = 0
    for row in rows:
        t = at[row]
        edge = t - width
        while added < len(order):
            i = order[added]
            if max(time[i], known[i]) > t:
                break
            v = values[i]
            if v == v and time[i] > edge:
                place = size
                size += 1
                while place > 0 and sign * values[heap[(place - 1) // 2]] > sign * v:
                    heap[place] = heap[(place - 1) // 2]
                    place = (place - 1) // 2
                heap[place] = i
            added += 1
        while size > 0 and (time[heap[0]] <= edge or replaced(time, known, key_hash, heap[0], t)):
            size -= 1
            _sift(heap, size, values, sign)
        out[row] = values[heap[0]] if size > 0 else np.nan


@njit(cache=True, nogil=True)
def _sift(heap: Ints, size: int, values: Floats, sign: float) -> None:
    """Put the heap's last entry (number `size`) in place of its top."""
    moved = heap[size]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and sign * values[heap[child + 1]] < sign * values[heap[child]]:
            child += 1
        if sign * values[heap[child]] >= sign * values[moved]:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = moved


@njit(cache=True, nogil=True)
def total(
    time: Ints,
    known: Ints,
    key_hash: Ints,
    order: Ints,
    values: Floats,
    kind: int,
    width: int,
    rows: Ints,
    at: Ints,
    out: Floats,
) -> None:
    """COUNT, SUM, MEAN and STD. In the sums at a row are the events known, in the window and not replaced then."""
    state = _NOTHING
    gone = 0
    added = 0
    previous = BEFORE_ALL
    for row in rows:
        t = at[row]
        edge = t - width
        while gone < len(time) and time[gone] <= edge:
            # What was known at the row before is in the sums, unless replaced: it was in the window, or had gone.
            if max(time[gone], known[gone]) <= previous and not replaced(time, known, key_hash, gone, previous):
                state = _moved(state, values[gone], -1, kind)
            gone += 1
        while added < len(order):
            i = order[added]
            if max(time[i], known[i]) > t:
                break
            added += 1
            if time[i] <= edge:
                continue
            p = i - 1
            if p >= 0 and time[p] == time[i] and key_hash[p] == key_hash[i] and max(time[p], known[p]) <= previous:
                state = _moved(state, values[p], -1, kind)  # i corrects it
            if not replaced(time, known, key_hash, i, t):
                state = _moved(state, values[i], 1, kind)
        previous = t
        out[row] = _result(state, kind)


_NOTHING: tuple[Any, ...] = (np.int64(0),) * 8
"""Count, count of values too large, high and low word of the sum, four words of the sum of squares."""


@njit(cache=True, nogil=True)
def _moved(state: tuple[Any, ...], v: float, sign: int, kind: int) -> tuple[Any, ...]:
    """The sums with a value more (sign 1) or less (−1)."""
    count, huge, high, low, a, b, c, d = state
    if v != v:
        return state
    if abs(v) >= LARGEST:
        return count + sign, huge + sign, high, low, a, b, c, d
    fixed = np.int64(np.rint(v * FIXED))
    high += sign * (fixed >> 32)
    low += sign * (fixed & _MASK)
    if kind == STD:
        magnitude = abs(fixed)
        upper, lower = magnitude >> 32, magnitude & _MASK
        square = np.uint64(lower) * np.uint64(lower)
        cross = 2 * upper * lower
        top = upper * upper
        a += sign * np.int64(square & np.uint64(_MASK))
        b += sign * (np.int64(square >> np.uint64(32)) + (cross & _MASK))
        c += sign * ((cross >> 32) + (top & _MASK))
        d += sign * (top >> 32)
    return count + sign, huge, high, low, a, b, c, d


@njit(cache=True, nogil=True)
def _result(state: tuple[Any, ...], kind: int) -> float:
    """The aggregate of the sums."""
    count, huge, high, low = state[:4]
    if kind == COUNT:
        return float(count)
    if huge > 0:
        return np.nan
    if kind == STD:
        if count < 2:
            return np.nan
        return math.sqrt(_spread(state) / float(count * (count - 1))) / FIXED
    summed = (float(high + (low >> 32)) * float(_HALF) + float(low & _MASK)) / FIXED
    if kind == SUM:
        return summed
    return summed / count if count > 0 else np.nan


@njit(cache=True, nogil=True)
def _spread(state: tuple[Any, ...]) -> float:
    """Count · Σx² − (Σx)², worked out in integers, rounded once."""
    count, _, high, low, a, b, c, d = state
    digits = np.zeros(_DIGITS + 1, np.int64)
    carry = np.int64(0)
    for k, word in enumerate((a, b, c, d)):
        carry += word
        digits[k] = carry & _MASK
        carry >>= 32
    digits[4] = carry
    carry = np.int64(0)
    for k in range(_DIGITS):
        carry += digits[k] * count
        digits[k] = carry & _MASK
        carry >>= 32
    high += low >> 32
    low &= _MASK
    if high < 0:  # the magnitude: two's complement over both words
        high = -high if low == 0 else -high - 1
        low = (_HALF - low) & _MASK
    root = (np.uint64(low), np.uint64(high & _MASK), np.uint64(high >> 32))
    square = np.zeros(_DIGITS, np.uint64)
    for i in range(3):
        over = np.uint64(0)
        for j in range(3):
            over += square[i + j] + root[i] * root[j]
            square[i + j] = over & np.uint64(_MASK)
            over >>= np.uint64(32)
        square[i + 2 + 1] = over
    borrow = np.int64(0)
    for k in range(_DIGITS):
        left = digits[k] - np.int64(square[k]) - borrow
        borrow = np.int64(1) if left < 0 else np.int64(0)
        digits[k] = left & _MASK
    return _rounded(digits)


@njit(cache=True, nogil=True)
def _rounded(digits: Ints) -> float:
    """A number of 32-bit digits, the lowest first, as the nearest float64 (half to even)."""
    top = len(digits) - 1
    while top > 0 and digits[top] == 0:
        top -= 1
    if digits[top] == 0:
        return 0.0
    zeros = np.int64(0)
    while digits[top] < 1 << (31 - zeros):
        zeros += 1
    second = digits[top - 1] if top > 0 else np.int64(0)
    third = digits[top - 2] if top > 1 else np.int64(0)
    leading = ((np.uint64(digits[top]) << np.uint64(32)) | np.uint64(second)) << np.uint64(zeros)
    leading |= np.uint64(third >> (32 - zeros))
    rest = third & ((np.int64(1) << (32 - zeros)) - 1)
    for k in range(top - 2):
        rest |= digits[k]
    if rest != 0:
        leading |= np.uint64(1)  # far below the last bit that is kept, but it decides what is half
    return math.ldexp(np.float64(leading), int(32 * (top - 1) - zeros))
