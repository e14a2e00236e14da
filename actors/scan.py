"""The kernels of newest values offline: which event is the newest for a row, and its values as one row of float32.

The events lie in the order of their time and each is known at its time (others go the way of `merge.py`). They are
read where they are stored, block by block: hence arrays that lie on no 8-byte boundary (`aligned=False`), codes as they
come (a number less `low`, or a cached code), and state that is carried from one block to the next. One pass keeps the
newest event of every entity. Several threads take a stretch of time each; `carry` joins the stretches.

Key hashes, which decide between events of an entity with the same event time and known-at, are made only for those:
`scan` marks them in `tied` and counts them; the caller makes the hashes and runs again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import boolean, float32, float64, int32, int64, njit, types, uint8, uint32, uint64, void
from numba.extending import intrinsic

from raymill.actors.evaluate import Floats, Ints
from raymill.actors.windows import NEVER

_INTS = types.Array(int64, 1, "C", readonly=True)
_STORED = types.Array(int64, 1, "C", readonly=True, aligned=False)
_CODES = types.Array(uint32, 1, "C", readonly=True, aligned=False)
_FLOATS = types.Array(float64, 1, "C", readonly=True, aligned=False)
_BYTES = types.Array(uint8, 1, "C", readonly=True)
_NAN = np.float32(np.nan)

OUT_OF_ORDER = -1
"""`scan` met an event before the one in front of it, or one that is known only later."""
BEFORE, RUN, ROW, TIES = range(4)
"""Words of `scan`'s state: time of the event before; number of the first event of that time; rows done; ties."""


def _scan_types(codes: types.Array) -> object:
    last, found = int32[::1], int64[::1]
    words = (codes, int64, _STORED, _STORED, _INTS, int64, _INTS, _INTS, _INTS)
    return int64(*words, last, int64[::1], found, boolean[::1], int64[::1])


@njit([_scan_types(_STORED), _scan_types(_CODES)], cache=True, nogil=True)
def scan(
    codes: Ints | npt.NDArray[np.uint32],
    low: int,
    time: Ints,
    known: Ints,
    key_hash: Ints,
    first: int,
    rows: Ints,
    row_codes: Ints,
    at: Ints,
    last: npt.NDArray[np.int32],
    last_known: Ints,
    found: Ints,
    tied: npt.NDArray[np.bool_],
    state: Ints,
) -> int:
    """Take one block's events up, and find the newest for the rows whose moment they pass; ties, or OUT_OF_ORDER.

    Args:
        codes: entity of each event, plus `low`; none of 0 … groups − 1: of no entity.
        low: see there.
        time: event times, must not go down.
        known: known-at, not after the event time, or NEVER; empty: the event time.
        key_hash: empty: mark ties in `tied`.
        first: number of the block's first event.
        rows: row numbers in the order of their moments.
        row_codes: entity of each row, −1 for none.
        at: moment of each row.
        last: newest event of each entity so far, −1 for none; carried on.
        last_known: its known-at; empty if `known` is.
        found: filled for rows whose moment is before the block's last event: number of the event, −1 for none.
        tied: by event number: set for events with the same entity, time and known-at.
        state: `BEFORE` …; carried on.
    """
    before, run, p, ties = state[BEFORE], state[RUN], state[ROW], state[TIES]
    groups = len(last)
    for i in range(len(time)):
        t = time[i]
        if t != before:
            if t < before:
                return OUT_OF_ORDER
            if t != NEVER:  # null times are at the end, or the next one is out of order
                while p < len(rows) and at[rows[p]] < t:
                    row = rows[p]
                    found[row] = last[row_codes[row]] if row_codes[row] >= 0 else -1
                    p += 1
            before = t
            run = first + i
        g = int64(codes[i]) - low
        if t == NEVER or g < 0 or g >= groups:
            continue
        if len(known) > 0:
            k = known[i]
            if k == NEVER:
                continue
            if k > t:
                return OUT_OF_ORDER
            if last[g] >= run and last_known[g] > k:
                continue
        else:
            k = t
        if last[g] >= run and (len(known) == 0 or last_known[g] == k):
            if len(key_hash) == 0:
                ties += 1
                tied[first + i] = True
                tied[last[g]] = True
                continue
            if key_hash[first + i] <= key_hash[last[g]]:
                continue
        last[g] = first + i
        if len(known) > 0:
            last_known[g] = k
    state[BEFORE], state[RUN], state[ROW], state[TIES] = before, run, p, ties
    return int64(ties)


@njit(void(_INTS, _INTS, int32[::1], int32[::1], int64, int64[::1]), cache=True, nogil=True)
def carry(
    rows: Ints,
    row_codes: Ints,
    before: npt.NDArray[np.int32],
    last: npt.NDArray[np.int32],
    done: int,
    found: Ints,
) -> None:
    """Join a stretch to those before it.

    Args:
        rows: the stretch's rows.
        row_codes: entity of each row, −1 for none.
        before: newest event of each entity before the stretch; afterwards, before the next one.
        last: newest in the stretch, −1 for none.
        done: how many of `rows` the scan has answered; the others' moments are after all of its events.
        found: what the stretch has found; where it has none, an earlier one may have.
    """
    for p in range(len(rows)):
        row = rows[p]
        g = row_codes[row]
        if g < 0:
            found[row] = -1
            continue
        if p >= done:
            found[row] = last[g]
        if found[row] < 0:
            found[row] = before[g]
    for g in range(len(last)):
        if last[g] >= 0:
            before[g] = last[g]


@njit(void(_STORED, int64, _INTS, _INTS, int64, int64[::1]), cache=True, nogil=True)
def drop_old(time: Ints, first: int, rows: Ints, at: Ints, max_age: int, found: Ints) -> None:
    """−1 for the rows whose event of this block is older than `max_age`; `first` numbers the block's first event."""
    for row in rows:
        if at[row] - time[found[row] - first] > max_age:
            found[row] = -1


@intrinsic
def _double(context, bits):  # type: ignore[no-untyped-def]  # numba's protocol
    """The double of these 64 bits."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.DoubleType())

    return float64(uint64), generate


@njit(void(_BYTES, _INTS, _INTS, int64, _INTS, _INTS, float32[:, ::1]), cache=True, nogil=True)
def gather(
    data: npt.NDArray[np.uint8],
    starts: Ints,
    columns: Ints,
    first: int,
    rows: Ints,
    found: Ints,
    out: npt.NDArray[np.float32],
) -> None:
    """Rows of float32 from doubles in a file: all columns of a row at once, so that its line of `out` is met once.

    Values become what `evaluate` and `to_float32` make of them: +0 for −0, one NaN for all that is not finite.

    Args:
        data: the file's bytes.
        starts: byte at which each column's values begin.
        columns: column of `out` that each goes to.
        first: number of the first event there.
        rows: rows to fill; in the order of their events the file is read forwards.
        found: event of each row.
        out: float32 [rows, features].
    """
    for row in rows:
        offset = 8 * (found[row] - first)
        for j in range(len(starts)):
            at = starts[j] + offset
            bits = uint64(0)
            for k in range(8):  # values in a file lie on no boundary; this becomes one load
                bits |= uint64(data[at + k]) << uint64(8 * k)
            value = float32(_double(bits) + 0.0)
            out[row, columns[j]] = value if np.isfinite(value) else _NAN


@njit(void(_FLOATS, _INTS, float32[:, ::1], int64), cache=True, nogil=True)
def put(values: Floats, rows: Ints, out: npt.NDArray[np.float32], column: int) -> None:
    """`out[rows, column] = values`, as `gather` does it."""
    for i in range(len(rows)):
        value = float32(values[i] + 0.0)
        out[rows[i], column] = value if np.isfinite(value) else _NAN


@njit(void(types.Array(float32, 2, "C", readonly=True), _INTS, _INTS, float32[:, ::1]), cache=True, nogil=True)
def place_rows(values: npt.NDArray[np.float32], rows: Ints, columns: Ints, out: npt.NDArray[np.float32]) -> None:
    """`out[rows[i], columns[j]] = values[i, j]`."""
    for i in range(len(rows)):
        for j in range(len(columns)):
            out[rows[i], columns[j]] = values[i, j]


@njit(int64(_STORED, int64), cache=True, nogil=True)
def first_at_least(values: Ints, value: int) -> int:
    """Number of the first of ascending values that is not smaller; how many there are, if none is."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if values[middle] < value:
            low = middle + 1
        else:
            high = middle
    return int64(low)
