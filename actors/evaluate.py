"""One evaluator for row expressions: the same function for one row and for ten million, bit for bit.

Every value is float64, NaN stands for null; a truth value is 0 or 1, a timestamp microseconds. Only `+ - * /` and
comparisons of IEEE doubles are used, element by element, so that a row's value can not depend on its neighbours.

Row semantics
- A null operand gives null, for arithmetic, comparison, `and` and `or` alike.
- Division by zero gives null, and so does every result that is not finite.
- `and`, `or` take every number but 0 for true.
- Strings can be compared with strings (by code point) and counted; nothing else is done with them.
- Calendar parts are those of UTC; Monday is weekday 0.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raymill.runtime.errors import ContractError, SpecError
from raymill.runtime.expressions import AGGREGATES, Binary, CalendarPart, Column, Constant, Expr, Window

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Columns = Mapping[str, Any]
"""Name → float64 array with NaN for null, or an Arrow string array."""

_COMPARISONS = {
    ">": (np.greater, "greater"),
    ">=": (np.greater_equal, "greater_equal"),
    "<": (np.less, "less"),
    "<=": (np.less_equal, "less_equal"),
    "==": (np.equal, "equal"),
    "!=": (np.not_equal, "not_equal"),
}
_OF_STRINGS = {">": "gt", ">=": "ge", "<": "lt", "<=": "le", "==": "eq", "!=": "ne"}
_ARITHMETIC = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}
_HOUR_US = 3600 * 1_000_000
_DAY_US = 24 * _HOUR_US


def kind_of(expr: Expr, dtypes: Mapping[str, str]) -> str:
    """What an expression yields over columns of these types: `number`, `timestamp` or `string`.

    Raises:
        SpecError: a column is missing, or an operation has no meaning for its operands.
    """
    if isinstance(expr, Column):
        if expr.name not in dtypes:
            raise SpecError(f"column {expr.name!r} is not in the source: known are {', '.join(dtypes)}")
        dtype = dtypes[expr.name]
        return dtype if dtype in ("string", "timestamp") else "number"
    if isinstance(expr, Constant):
        return "string" if isinstance(expr.value, str) else "number"
    if isinstance(expr, CalendarPart):
        if kind_of(expr.operand, dtypes) != "timestamp":
            raise SpecError(f"{expr.part}() needs a timestamp column, not {expr.operand.to_json()}")
        return "number"
    if isinstance(expr, Window):
        kind = kind_of(expr.operand, dtypes)
        if kind == "string" and expr.aggregate != "count":
            raise SpecError(f"{expr.aggregate}() of a string has no meaning: compare it with a constant first")
        return kind if expr.aggregate in ("min", "max", "last") else "number"
    if isinstance(expr, Binary):
        return _kind_of_binary(expr, dtypes)
    raise SpecError(f"{expr!r} is no node of a feature expression; known are columns, constants, {AGGREGATES}")


def _kind_of_binary(expr: Binary, dtypes: Mapping[str, str]) -> str:
    left, right = kind_of(expr.left, dtypes), kind_of(expr.right, dtypes)
    if "string" in (left, right):
        if left != right or expr.op not in _COMPARISONS:
            raise SpecError(f"{expr.to_json()}: a string can only be compared with a string")
        return "number"
    timestamps = (left, right).count("timestamp")
    return "timestamp" if timestamps == 1 and expr.op in ("+", "-") else "number"


def columns_of(rows: pa.Table, names: Iterable[str], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Columns in the form that `evaluate` reads.

    Raises:
        ContractError: a column is missing or can not be cast to its declared type.
    """
    found: dict[str, Any] = {}
    for name in names:
        if name not in rows.column_names:
            raise ContractError(f"column {name!r} is missing: the rows have {', '.join(rows.column_names)}")
        column = rows.column(name)
        try:
            found[name] = _strings(column) if dtypes[name] == "string" else numbers(column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as err:
            raise ContractError(f"column {name!r} is {column.type}, which is no {dtypes[name]}: {err}") from err
    return found


def numbers(column: pa.ChunkedArray | pa.Array) -> Floats:
    """A numeric, boolean or timestamp column as float64, NaN for null; a timestamp as µs."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", tz=kind.tz)).cast(pa.int64())
    elif pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def moments(column: pa.ChunkedArray | pa.Array, null: int) -> Ints:
    """A timestamp (or int64 µs) column as int64 µs, with `null` where it is null."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", tz=column.type.tz))
    column = column.cast(pa.int64())
    if column.null_count:
        column = pc.fill_null(column, null)
    return np.array(column.to_numpy(), dtype=np.int64)


def evaluate(expr: Expr, columns: Columns, rows: int) -> Floats:
    """Values of a row expression without windows: float64 [rows], NaN for null.

    A string result gives 1 where it is not null (which is what `count` needs).
    """
    with np.errstate(all="ignore"):
        value = _value(expr, columns)
        if isinstance(value, str):
            value = 1.0
        elif not isinstance(value, (float, np.ndarray)):
            value = _known(value)
        result = np.empty(rows, dtype=np.float64)
        np.add(value, 0.0, out=result)  # + 0.0 turns −0 into 0, which would differ bit for bit
        result[~np.isfinite(result)] = np.nan
    return result


def _value(expr: Expr, columns: Columns) -> Any:
    """A float64 array, a float, an Arrow string array or a string."""
    if isinstance(expr, Column):
        return columns[expr.name]
    if isinstance(expr, Constant):
        return expr.value if isinstance(expr.value, str) else float(expr.value)
    if isinstance(expr, CalendarPart):
        return _calendar(expr.part, _value(expr.operand, columns))
    if isinstance(expr, Binary):
        return _binary(expr.op, _value(expr.left, columns), _value(expr.right, columns))
    raise SpecError(f"{expr.to_json()} is no row expression: windows are computed before it is evaluated")


def _binary(op: str, left: Any, right: Any) -> Any:
    if op in _COMPARISONS:
        numeric, strings = _COMPARISONS[op]
        if isinstance(left, str) and isinstance(right, str):
            return float(getattr(operator, _OF_STRINGS[op])(left, right))
        if not isinstance(left, (float, np.ndarray)):
            return numbers(_as_array(getattr(pc, strings)(left, right)))
        return np.where(np.isnan(left) | np.isnan(right), np.nan, numeric(left, right))
    if op in ("and", "or"):
        joined = np.logical_and if op == "and" else np.logical_or
        return np.where(np.isnan(left) | np.isnan(right), np.nan, joined(left != 0, right != 0))
    result = _ARITHMETIC[op](left, right)
    return np.where(np.isfinite(result), result, np.nan)


def _calendar(part: str, value: Any) -> Any:
    value = np.asarray(value, dtype=np.float64)
    unknown = np.isnan(value)
    us = np.where(unknown, 0.0, value).astype(np.int64)
    if part == "hour":
        result = us // _HOUR_US % 24
    elif part == "weekday":
        result = (us // _DAY_US + 3) % 7  # 1970-01-01 was a Thursday
    else:
        days = (us // _DAY_US).astype("datetime64[D]")
        if part == "month":
            result = days.astype("datetime64[M]").astype(np.int64) % 12 + 1
        else:
            result = (days - days.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64) + 1
    return np.where(unknown, np.nan, result.astype(np.float64))


def to_float32(values: Floats) -> npt.NDArray[np.float32]:
    """The model's form of feature values: float32, one and the same NaN for everything unknown or too large."""
    with np.errstate(over="ignore"):
        result = values.astype(np.float32)
    result[~np.isfinite(result)] = np.float32(np.nan)
    return result


def _strings(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return _as_array(column.cast(pa.large_string()))


def _known(strings: pa.Array) -> Floats:
    return np.where(np.asarray(strings.is_valid()), 1.0, np.nan)


def _as_array(values: Any) -> Any:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
