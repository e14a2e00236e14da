"""The kernel of row expressions: a stack machine over blocks of rows, one for a single row and for ten million.

An expression is lowered to steps (`actors/evaluate.py`): push an input or a constant, replace the top of the stack by a
function of it, give the top away as a result. Every value is float64, NaN stands for null. Each step is done element
by element with `+ − × ÷`, comparisons and square roots of IEEE doubles alone, so that a row's value depends neither on
its neighbours nor on the processor: `log1p` is worked out here for that reason. Compiled once a machine, by numba.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from numba import float32, float64, int64, njit, types, void

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BLOCK = 256
"""Rows done at once: the stack stays in the processor's first cache."""

INPUT, CONSTANT, RESULT = range(3)
UNARY = {n: 10 + i for i, n in enumerate(("abs", "log1p", "sqrt", "floor", "not", "is_null"))}
CALENDAR = {n: 20 + i for i, n in enumerate(("hour", "weekday", "month", "day_of_year"))}
BINARY = {
    n: 30 + i
    for i, n in enumerate(
        ("+", "-", "*", "/", ">", ">=", "<", "<=", "==", "!=", "and", "or", "least", "greatest", "fill_null")
    )
}
WHEN = 50
STEPS = {**UNARY, **CALENDAR, **BINARY, "when": WHEN}
"""Name of a node → number of its step."""

_ABS, _LOG1P, _SQRT, _FLOOR, _NOT, _IS_NULL = UNARY.values()
_HOUR, _WEEKDAY, _MONTH, _DAY_OF_YEAR = CALENDAR.values()
_ADD, _SUB, _MUL, _DIV, _GT, _GE, _LT, _LE, _EQ, _NE, _AND, _OR, _LEAST, _GREATEST, _FILL = BINARY.values()

_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
"""ln 2 in two parts, the first with zeros at its end: k times it is exact."""
_HOUR_US = 3600 * 1_000_000
_DAY_US = 24 * _HOUR_US


@njit(cache=True, nogil=True)
def _log1p(x: float) -> float:
    """ln(1 + x) to about 1 unit in the last place, by arithmetic that is the same on every machine."""
    if not x > -1.0:
        return np.nan
    u = 1.0 + x
    if u == 1.0:
        return x
    mantissa, exponent = math.frexp(u)
    if mantissa < 0.7071067811865476:
        mantissa *= 2.0
        exponent -= 1
    lost = (x - (u - 1.0)) / u if exponent < 54 else 0.0  # what rounding 1 + x took away
    f = mantissa - 1.0
    if exponent == 0:
        f, lost = x, 0.0
    s = f / (2.0 + f)
    z = s * s
    tail = 0.0
    for odd in range(23, 1, -2):
        tail = z * (1.0 / odd + tail)
    half = 0.5 * f * f
    # ln(1 + f) = f − f²/2 + s (f²/2 + 2 (s²/3 + s⁴/5 + …)): the large term first, so that little is lost.
    return exponent * _LN2_HIGH - ((half - (s * (half + 2.0 * tail) + (exponent * _LN2_LOW + lost))) - f)


@njit(cache=True, nogil=True)
def _unary(op: int, a: Floats, n: int) -> None:
    if op == _ABS:
        for i in range(n):
            a[i] = abs(a[i])
    elif op == _LOG1P:
        for i in range(n):
            a[i] = _log1p(a[i])
    elif op == _SQRT:
        for i in range(n):
            a[i] = math.sqrt(a[i]) if a[i] >= 0.0 else np.nan
    elif op == _FLOOR:
        for i in range(n):
            a[i] = np.floor(a[i])
    elif op == _NOT:
        for i in range(n):
            a[i] = np.nan if a[i] != a[i] else (1.0 if a[i] == 0.0 else 0.0)
    else:
        for i in range(n):
            a[i] = 1.0 if a[i] != a[i] else 0.0


@njit(cache=True, nogil=True)
def _calendar(op: int, a: Floats, n: int) -> None:
    """Parts of UTC moments in µs; month and day by the calendar of years that begin in March."""
    for i in range(n):
        if not abs(a[i]) < 2.0**62:
            a[i] = np.nan
            continue
        us = np.int64(a[i])
        days = us // _DAY_US
        if op == _HOUR:
            a[i] = us // _HOUR_US % 24
        elif op == _WEEKDAY:
            a[i] = (days + 3) % 7  # 1970-01-01 was a Thursday
        else:
            shifted = days + 719_468  # since 0000-03-01
            era = shifted // 146_097
            of_era = shifted - era * 146_097
            year = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
            of_year = of_era - (365 * year + year // 4 - year // 100)
            month = (5 * of_year + 2) // 153
            month += 3 if month < 10 else -9
            if op == _MONTH:
                a[i] = month
                continue
            year += era * 400
            if of_year >= 306:  # January and February belong to the next year
                a[i] = of_year - 305
            else:
                leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
                a[i] = of_year + (61 if leap else 60)


@njit(cache=True, nogil=True)
def _arithmetic(op: int, a: Floats, b: Floats, n: int) -> None:
    if op == _ADD:
        for i in range(n):
            a[i] += b[i]
    elif op == _SUB:
        for i in range(n):
            a[i] -= b[i]
    elif op == _MUL:
        for i in range(n):
            a[i] *= b[i]
    else:
        for i in range(n):
            a[i] = a[i] / b[i] if b[i] != 0.0 else np.nan
    for i in range(n):
        if not np.isfinite(a[i]):
            a[i] = np.nan


@njit(cache=True, nogil=True)
def _compare(op: int, a: Floats, b: Floats, n: int) -> None:
    for i in range(n):
        x, y = a[i], b[i]
        if x != x or y != y:
            a[i] = np.nan
        elif op == _GT:
            a[i] = 1.0 if x > y else 0.0
        elif op == _GE:
            a[i] = 1.0 if x >= y else 0.0
        elif op == _LT:
            a[i] = 1.0 if x < y else 0.0
        elif op == _LE:
            a[i] = 1.0 if x <= y else 0.0
        elif op == _EQ:
            a[i] = 1.0 if x == y else 0.0
        elif op == _NE:
            a[i] = 1.0 if x != y else 0.0
        elif op == _AND:
            a[i] = 1.0 if x != 0.0 and y != 0.0 else 0.0
        elif op == _OR:
            a[i] = 1.0 if x != 0.0 or y != 0.0 else 0.0
        elif op == _LEAST:
            a[i] = min(x, y)
        else:
            a[i] = max(x, y)


@njit(cache=True, nogil=True)
def _choose(condition: Floats, a: Floats, b: Floats, n: int) -> None:
    for i in range(n):
        c = condition[i]
        condition[i] = np.nan if c != c else (a[i] if c != 0.0 else b[i])


def _types(out: types.Type) -> types.Type:
    steps = types.Array(int64, 2, "C", readonly=True)
    constants = types.Array(float64, 1, "C", readonly=True)
    return void(steps, constants, int64, types.Array(float64, 2, "A", readonly=True), types.Array(out, 2, "A"))


@njit([_types(float64), _types(float32)], cache=True, nogil=True, error_model="numpy")
def run(steps: Ints, constants: Floats, depth: int, inputs: Floats, out: np.ndarray) -> None:
    """Work out a program for all rows.

    Args:
        steps: [steps, 2]: number of the step, and which input, constant or result.
        constants: of the program.
        depth: most values on the stack.
        inputs: [rows, inputs], NaN for null.
        out: [rows, results], float64 or float32, filled: NaN for null and for what is not finite, never −0.
    """
    stack = np.empty((depth, min(BLOCK, len(inputs))), np.float64)
    for first in range(0, len(inputs), BLOCK):
        n = min(BLOCK, len(inputs) - first)
        top = -1
        for s in range(len(steps)):
            op, which = steps[s]
            if op == INPUT:
                top += 1
                for i in range(n):
                    stack[top, i] = inputs[first + i, which]
            elif op == CONSTANT:
                top += 1
                stack[top, :n] = constants[which]
            elif op == RESULT:
                for i in range(n):
                    out[first + i, which] = stack[top, i] + 0.0  # which turns −0 into 0
                    if not np.isfinite(out[first + i, which]):
                        out[first + i, which] = np.nan
                top -= 1
            elif op < _HOUR:
                _unary(op, stack[top], n)
            elif op < _ADD:
                _calendar(op, stack[top], n)
            elif op < _GT:
                top -= 1
                _arithmetic(op, stack[top], stack[top + 1], n)
            elif op < _FILL:
                top -= 1
                _compare(op, stack[top], stack[top + 1], n)
            elif op == _FILL:
                top -= 1
                for i in range(n):
                    if stack[top, i] != stack[top, i]:
                        stack[top, i] = stack[top + 1, i]
            else:
                top -= 2
                _choose(stack[top], stack[top + 1], stack[top + 2], n)
