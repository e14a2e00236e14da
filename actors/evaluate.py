"""One evaluator for row expressions: the same kernel for one row and for ten million, bit for bit.

Every value is float64, NaN stands for null; a truth value is 0 or 1, a timestamp microseconds. Expressions are lowered
to a program of `row_kernel`, whose inputs are columns, comparisons of strings (Arrow's) and Python functions.

Row semantics
- A null operand gives null, for arithmetic, comparison, functions, `and` and `or` alike. `is_null` and `fill_null` see
  nulls; `when` is null where its condition is, and else whatever the branch taken is; a Python function gets None.
- Division by zero gives null, and so does every result that is not finite.
- `and`, `or` take every number but 0 for true.
- Strings can be compared with strings (by code point) and counted; nothing else is done with them.
- Calendar parts are those of UTC; Monday is weekday 0.
- A Python function that raises fails the rows it is asked for, with its name: it is to return None for "unknown".
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors.row_kernel import CONSTANT, INPUT, RESULT, STEPS, run
from raymill.runtime.errors import ContractError, SpecError
from raymill.runtime.expressions import AGGREGATES, Binary, CalendarPart, Call, Column, Constant, Expr, Python, Window
from raymill.runtime.row_functions import resolve

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Columns = Mapping[str, Any]
"""Name → float64 array with NaN for null, or an Arrow string array."""

_OF_ARROW = {
    ">": "greater",
    ">=": "greater_equal",
    "<": "less",
    "<=": "less_equal",
    "==": "equal",
    "!=": "not_equal",
}
_OF_STRINGS = {">": "gt", ">=": "ge", "<": "lt", "<=": "le", "==": "eq", "!=": "ne"}


def kind_of(expr: Expr, dtypes: Mapping[str, str]) -> str:
    """What an expression yields over columns of these types: `number`, `timestamp` or `string`.

    Raises:
        SpecError: a column is missing, or an operation has no meaning for its operands.
    """
    if isinstance(expr, Column):
        if expr.name not in dtypes:
            raise SpecError(f"column {expr.name!r} is not in the source: known are {', '.join(dtypes)}")
        dtype = dtypes[expr.name]
        if dtype == "media":
            raise SpecError(f"column {expr.name!r} is media: features are of numbers, strings and timestamps")
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
    if isinstance(expr, Call):
        return _kind_of_call(expr, dtypes)
    if isinstance(expr, Python):
        kinds = {e: kind_of(e, dtypes) for e in expr.operands}
        if expr.windows() and any(k == "string" and not isinstance(e, Constant) for e, k in kinds.items()):
            raise SpecError(
                f"{expr.function} of windows and a string has no meaning: windows are numbers, of many rows"
            )
        return "number"
    raise SpecError(f"{expr!r} is no node of a feature expression; known are columns, constants, {AGGREGATES}")


def _kind_of_binary(expr: Binary, dtypes: Mapping[str, str]) -> str:
    left, right = kind_of(expr.left, dtypes), kind_of(expr.right, dtypes)
    if "string" in (left, right):
        if left != right or expr.op not in _OF_ARROW:
            raise SpecError(f"{expr.to_json()}: a string can only be compared with a string")
        return "number"
    timestamps = (left, right).count("timestamp")
    return "timestamp" if timestamps == 1 and expr.op in ("+", "-") else "number"


def _kind_of_call(expr: Call, dtypes: Mapping[str, str]) -> str:
    kinds = [kind_of(e, dtypes) for e in expr.operands]
    if expr.function == "is_null":
        return "number"
    if "string" in kinds:
        raise SpecError(f"{expr.function}() of a string has no meaning: compare it with a constant first")
    if expr.function in ("fill_null", "least", "greatest", "when"):
        values = kinds[-2:]
        if len(set(values)) == 2 or kinds[0] == "timestamp" != values[0]:
            raise SpecError(f"{expr.function}() of {' and '.join(kinds)}: give it values of one kind")
        return values[0]
    if kinds != ["number"]:
        raise SpecError(f"{expr.function}() needs a number, not a {kinds[0]}")
    return "number"


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

    Raises:
        ContractError: a Python function raised, or returned no number.
        SpecError: a Python function is not to be had here in the version that is meant.
    """
    return _evaluator((expr,)).values(columns, rows)[:, 0]


@lru_cache(maxsize=4096)
def _evaluator(exprs: tuple[Expr, ...]) -> Evaluator:
    return Evaluator(exprs)


@dataclass(frozen=True)
class _Program:
    """What `row_kernel.run` is given."""

    steps: Ints
    constants: Floats
    depth: int
    inputs: tuple[Expr, ...]
    """What its inputs are made of."""


class Evaluator:
    """Several row expressions over the same columns, worked out at once; lowered once."""

    def __init__(self, exprs: tuple[Expr, ...]) -> None:
        self._exprs = exprs
        self._names = tuple(dict.fromkeys(c for e in exprs for c in e.columns()))
        self._programs: dict[tuple[str, ...], _Program] = {}

    def values(self, columns: Columns, rows: int) -> Floats:
        """Float64 [rows, expressions], as `evaluate` gives each."""
        strings = tuple(n for n in self._names if not isinstance(columns[n], np.ndarray))
        program = self._programs.get(strings)
        if program is None:
            program = self._programs[strings] = _Lowering(frozenset(strings)).program(self._exprs)
        inputs = np.empty((len(program.inputs), rows), dtype=np.float64)
        for i, expr in enumerate(program.inputs):
            inputs[i] = _input(expr, columns, rows)
        out = np.empty((rows, len(self._exprs)), dtype=np.float64)
        run(program.steps, program.constants, program.depth, inputs.T, out)
        return out


@dataclass
class _Lowering:
    """Expressions on their way to a program."""

    strings: frozenset[str]
    """Columns that hold strings."""
    steps: list[tuple[int, int]] = field(default_factory=list)
    constants: dict[float, int] = field(default_factory=dict)
    inputs: dict[Expr, int] = field(default_factory=dict)

    def program(self, exprs: tuple[Expr, ...]) -> _Program:
        """The program whose results are the expressions' values."""
        depth = 0
        for number, expr in enumerate(exprs):
            depth = max(depth, self._push(expr))
            self.steps.append((RESULT, number))
        steps = np.array(self.steps, dtype=np.int64).reshape(-1, 2)
        return _Program(steps, np.array(list(self.constants), dtype=np.float64), depth, tuple(self.inputs))

    def _push(self, expr: Expr) -> int:
        """Append the steps that push its value; the most values they have on the stack."""
        if isinstance(expr, Column | Python) or self._is_string(expr):
            self.steps.append((INPUT, self.inputs.setdefault(expr, len(self.inputs))))
            return 1
        if isinstance(expr, Constant):
            self.steps.append((CONSTANT, self.constants.setdefault(float(expr.value), len(self.constants))))
            return 1
        if isinstance(expr, Binary) and (self._is_string(expr.left) or self._is_string(expr.right)):
            self.steps.append((INPUT, self.inputs.setdefault(expr, len(self.inputs))))
            return 1
        name = {Binary: "op", CalendarPart: "part", Call: "function"}.get(type(expr))
        if name is None:
            raise SpecError(f"{expr.to_json()} is no row expression: windows are computed before it is evaluated")
        depth = max(held + self._push(child) for held, child in enumerate(expr.children()))
        self.steps.append((STEPS[getattr(expr, name)], 0))
        return depth

    def _is_string(self, expr: Expr) -> bool:
        if isinstance(expr, Constant):
            return isinstance(expr.value, str)
        return isinstance(expr, Column) and expr.name in self.strings


def _input(expr: Expr, columns: Columns, rows: int) -> Any:
    """What the kernel can not make itself: columns, comparisons of strings, and what Python functions return."""
    if isinstance(expr, Python):
        return _called(expr, columns, rows)
    if isinstance(expr, Binary):
        left, right = _string(expr.left, columns), _string(expr.right, columns)
        if isinstance(left, str) and isinstance(right, str):
            return float(getattr(operator, _OF_STRINGS[expr.op])(left, right))
        return numbers(_as_array(getattr(pc, _OF_ARROW[expr.op])(left, right)))
    value = _string(expr, columns)
    if isinstance(value, str):
        return 1.0
    return value if isinstance(value, np.ndarray) else _known(value)


def _string(expr: Expr, columns: Columns) -> Any:
    """A column, or a constant string."""
    if isinstance(expr, Column):
        return columns[expr.name]
    assert isinstance(expr, Constant)
    return expr.value


def _called(expr: Python, columns: Columns, rows: int) -> Floats:
    """What the function returns for each row, NaN for None."""
    function = resolve(expr.function, expr.source)
    out = np.empty(rows, dtype=np.float64)
    arguments = [_arguments(e, columns, rows) for e in expr.operands]
    for i, values in enumerate(zip(*arguments, strict=True) if arguments else [()] * rows):
        try:
            result = function(*values)
        except Exception as err:  # the user's own function may raise anything
            told = f"{expr.function}{values!r} raised {type(err).__name__}: {err}"
            raise ContractError(f"feature function {told}; it is to return None for what it can not tell") from err
        if result is not None and not isinstance(result, bool | int | float):
            raise ContractError(f"feature function {expr.function}{values!r} gave {result!r}: return a number or None")
        out[i] = np.nan if result is None else result
    return out


def _arguments(expr: Expr, columns: Columns, rows: int) -> list[Any]:
    value = _string(expr, columns) if isinstance(expr, Column | Constant) else None
    if isinstance(value, str):
        return [value] * rows
    if isinstance(value, pa.Array):
        found: list[Any] = value.to_pylist()
        return found
    return [None if v != v else v for v in evaluate(expr, columns, rows).tolist()]


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
