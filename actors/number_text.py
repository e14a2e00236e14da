"""Rows of numbers as JSON text, many texts at once, by numba: what it reads is what the JSON reader would have read.

A text is read only where the result is certain: at most 19 digits, a power of ten within ±44, and a float32 that stays
the same if the double before it is a little off. All else (and what is no list of numbers) is marked, and left to the
JSON reader.

Source of the method: W. D. Clinger, How to Read Floating Point Numbers Accurately, PLDI 1990 (its fast path).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import bool_, float32, int64, njit, types, uint8, void

F32 = npt.NDArray[np.float32]

_MOST_DIGITS = 19
"""Without zeros at the front; they fit into 64 bits."""
_EXACT = 22
"""Powers of ten up to it are doubles."""
_POWERS = np.array([10.0**i for i in range(_EXACT + 1)])
_NEAR = 2.0**-50
"""Rounding: of the digits, and of two products or quotients; four units of a double in all."""
_TEXT = types.Array(uint8, 1, "C", readonly=True)
_ZERO, _NINE, _MINUS, _PLUS, _POINT, _COMMA = 48, 57, 45, 43, 46, 44
_SPACES = (32, 9, 10, 13)
_E = (69, 101)


@njit(inline="always")
def _skip_spaces(text: Any, at: int, end: int) -> Any:
    while at < end and text[at] in _SPACES:
        at += 1
    return at


@njit(cache=True, nogil=True)
def _read_row(text: Any, at: int, end: int, out: F32) -> bool:
    """One text into `out`, whose length is how many numbers there must be; whether it was certain."""
    for i in range(len(out)):
        at = _skip_spaces(text, at, end)
        negative = at < end and text[at] == _MINUS
        at += negative
        digits, count, exponent = np.uint64(0), int64(0), int64(0)
        first = at
        while at < end and _ZERO <= text[at] <= _NINE:
            digits = digits * np.uint64(10) + np.uint64(text[at] - _ZERO)
            count += digits > 0
            at += 1
        if at == first or (at - first > 1 and text[first] == _ZERO):
            return False
        is_whole = True
        if at < end and text[at] == _POINT:
            is_whole = False
            at += 1
            first = at
            while at < end and _ZERO <= text[at] <= _NINE:
                digits = digits * np.uint64(10) + np.uint64(text[at] - _ZERO)
                count += digits > 0
                at += 1
            exponent = first - at
            if exponent == 0:
                return False
        if count > _MOST_DIGITS:
            return False
        if at < end and text[at] in _E:
            is_whole = False
            at += 1
            down = at < end and text[at] == _MINUS
            at += at < end and (down or text[at] == _PLUS)
            first, written = at, 0
            while at < end and _ZERO <= text[at] <= _NINE and at - first < 4:
                written = written * 10 + int64(text[at] - _ZERO)
                at += 1
            if at == first or at - first == 4:
                return False
            exponent += -written if down else written
        if abs(exponent) > 2 * _EXACT:
            return False
        value = np.float64(digits)
        rest = abs(exponent)
        while rest > 0:
            step = min(rest, _EXACT)
            value = value * _POWERS[step] if exponent > 0 else value / _POWERS[step]
            rest -= step
        found = float32(value)
        if found != float32(value * (1 - _NEAR)) or found != float32(value * (1 + _NEAR)) or found == np.inf:
            return False
        # A whole −0 is an integer, which has no sign.
        out[i] = -found if negative and not (is_whole and found == 0) else found
        at = _skip_spaces(text, at, end)
        if i + 1 < len(out):
            if at == end or text[at] != _COMMA:
                return False
            at += 1
    return at == end


@njit(void(_TEXT, int64[::1], int64[::1], float32[:, ::1], bool_[::1]), cache=True, nogil=True)
def read_rows(text: Any, starts: Any, ends: Any, out: F32, certain: Any) -> None:
    """Read texts such as `1, 2.5, -3e-2`.

    Args:
        text: bytes that hold all the texts.
        starts: [rows] where each begins.
        ends: [rows] where it ends.
        out: [rows, n] filled; a row that is not certain means nothing.
        certain: [rows] filled: whether the row was read.
    """
    for r in range(len(starts)):
        certain[r] = _read_row(text, starts[r], ends[r], out[r])
