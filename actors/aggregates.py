"""The kernels of one leaf over one entity's events: newest value, count, sum, mean, std, min, max, last.

What they mean is said in `windows`; here is how. Every kernel goes through the rows in the order of their moments and
carries its state on, so that each event comes in once and goes out once. Events are given in the order of (event time,
key hash, known-at): the versions of a corrected row stand side by side.

Exactness: an operand is rounded to 2⁻²⁰ (half to even) and added as an integer of two words, its square as one of four
words of 32 bits; every word is a sum of what each event gave to it, so that to take an event out restores the words.
Operands below 2⁴² and up to 2²⁹ events in a window can not overflow them. The result is rounded from these integers.

numba keeps the compiled form of `windows.sweep` and `merge.sweep_groups`, which have these inlined, by the date of
their own files: who changes something here touches those two.
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
    versions = kind == LAST and _has_versions(time, key_hash)
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
        if versions and best >= 0 and replaced(time, known, key_hash, best, t):  # by a null: who was before?
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
    versions = _has_versions(time, key_hash)
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
        while size > 0 and (time[heap[0]] <= edge or (versions and replaced(time, known, key_hash, heap[0], t))):
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
    """COUNT, SUM, MEAN and STD. In the sums at a row are the events known, in the window and not replaced then.

    The sums are local numbers, and entities without corrections are not asked for them: else this takes twice as long.
    """
    versions = _has_versions(time, key_hash)
    count = huge = high = low = np.int64(0)  # huge: how many of them are too large
    squares = np.zeros(4 if kind == STD else 0, np.int64)
    gone = 0
    added = 0
    previous = BEFORE_ALL
    for row in rows:
        t = at[row]
        edge = t - width
        while gone < len(time) and time[gone] <= edge:
            v = values[gone]
            # What was known at the row before is in the sums, unless replaced: it was in the window, or had gone.
            there = v == v and max(time[gone], known[gone]) <= previous
            if there and not (versions and replaced(time, known, key_hash, gone, previous)):
                count -= 1
                if abs(v) >= LARGEST:
                    huge -= 1
                else:
                    fixed = np.int64(np.rint(v * FIXED))
                    high -= fixed >> 32
                    low -= fixed & _MASK
                    if kind == STD:
                        _square(squares, abs(fixed), -1)
            gone += 1
        while added < len(order):
            i = order[added]
            if max(time[i], known[i]) > t:
                break
            added += 1
            if time[i] <= edge:
                continue
            if versions:
                if i > 0 and replaced(time, known, key_hash, i - 1, t) and max(time[i - 1], known[i - 1]) <= previous:
                    old = _taken(values[i - 1], squares)
                    count, huge, high, low = count - old[0], huge - old[1], high - old[2], low - old[3]
                if replaced(time, known, key_hash, i, t):
                    continue
            v = values[i]
            if v == v:
                count += 1
                if abs(v) >= LARGEST:
                    huge += 1
                else:
                    fixed = np.int64(np.rint(v * FIXED))
                    high += fixed >> 32
                    low += fixed & _MASK
                    if kind == STD:
                        _square(squares, abs(fixed), 1)
        previous = t
        out[row] = _result((count, huge, high, low), squares, kind)


@njit(cache=True, nogil=True)
def _has_versions(time: Ints, key_hash: Ints) -> bool:
    """Whether any event is a correction of another."""
    for i in range(1, len(time)):  # noqa: SIM110 (numba knows no generators)
        if time[i] == time[i - 1] and key_hash[i] == key_hash[i - 1]:
            return True
    return False


@njit(cache=True, nogil=True)
def _taken(v: float, squares: Ints) -> tuple[Any, ...]:
    """What a value that was replaced gave to the sums; from the squares it is taken."""
    if v != v:
        return np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    if abs(v) >= LARGEST:
        return np.int64(1), np.int64(1), np.int64(0), np.int64(0)
    fixed = np.int64(np.rint(v * FIXED))
    if len(squares) > 0:
        _square(squares, abs(fixed), -1)
    return np.int64(1), np.int64(0), fixed >> 32, fixed & _MASK


@njit(cache=True, nogil=True)
def _square(words: Ints, magnitude: int, sign: int) -> None:
    """Add a number's square to the words, or take it away."""
    upper, lower = magnitude >> 32, magnitude & _MASK
    square = np.uint64(lower) * np.uint64(lower)
    cross = 2 * upper * lower
    top = upper * upper
    words[0] += sign * np.int64(square & np.uint64(_MASK))
    words[1] += sign * (np.int64(square >> np.uint64(32)) + (cross & _MASK))
    words[2] += sign * ((cross >> 32) + (top & _MASK))
    words[3] += sign * (top >> 32)


@njit(cache=True, nogil=True)
def _result(sums: tuple[Any, ...], squares: Ints, kind: int) -> float:
    """The aggregate of the sums."""
    count, huge, high, low = sums
    if kind == COUNT:
        return float(count)
    if huge > 0:
        return np.nan
    if kind == STD:
        if count < 2:
            return np.nan
        return math.sqrt(_spread(sums, squares) / float(count * (count - 1))) / FIXED
    summed = (float(high + (low >> 32)) * float(_HALF) + float(low & _MASK)) / FIXED
    if kind == SUM:
        return summed
    return summed / count if count > 0 else np.nan


@njit(cache=True, nogil=True)
def _spread(sums: tuple[Any, ...], squares: Ints) -> float:
    """Variance times count · (count − 1): count · Σx² − (Σx)², worked out in integers, rounded once."""
    count, _, high, low = sums
    digits = np.zeros(_DIGITS + 1, np.int64)
    carry = np.int64(0)
    for k in range(len(squares)):
        carry += squares[k]
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
        square[i + 3] = over
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
