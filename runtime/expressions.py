"""`col(...)`: the tree of a feature's definition; every engine reads this one.

A tree is a value: frozen, hashable, comparable, JSON both ways, with a content hash that names the feature's
version. Nothing here computes; `actors/evaluate.py` does, the same way for training and for serving.

Row semantics: a null operand gives null (comparison, arithmetic and functions alike); only `is_null`, `fill_null` and
`python` see nulls, and of `when` only the branch taken counts. Division by zero gives null, as does log1p or a root of
what has none. Truth values are 1 and 0.
Window semantics: `x.mean("6h")` at moment t is over the events of the entity with event time in (t − 6 h, t]
AND known at ≤ t whose `x` is not null; an empty `count` or `sum` is 0, every other empty aggregate null.
Without a window a feature is the value of the newest row known at t (`max_age` inclusive).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from raymill.runtime.errors import SpecError

SECOND_US = 1_000_000
_UNIT_US = {"ms": 1_000, "s": SECOND_US, "m": 60 * SECOND_US, "h": 3600 * SECOND_US, "d": 86400 * SECOND_US}
_DURATION = re.compile(r"^(\d+(?:\.\d+)?)(ms|s|m|h|d)$")

Aggregate = Literal["count", "sum", "mean", "std", "min", "max", "last"]
AGGREGATES: tuple[Aggregate, ...] = ("count", "sum", "mean", "std", "min", "max", "last")
Calendar = Literal["hour", "weekday", "month", "day_of_year"]
CALENDAR: tuple[Calendar, ...] = ("hour", "weekday", "month", "day_of_year")


def duration_us(text: str) -> int:
    """Microseconds of a duration such as `"50ms"`, `"3h"` or `"7d"`.

    Raises:
        SpecError: the text is not a number followed by ms, s, m, h or d.
    """
    match = _DURATION.match(text.strip())
    if match is None:
        raise SpecError(f"{text!r} is not a duration: write a number and a unit of ms, s, m, h, d, e.g. '3h'")
    return round(float(match[1]) * _UNIT_US[match[2]])


class Expr:
    """A node of the tree; the operators build larger trees."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __add__(self, other: Any) -> Expr:
        return Binary("+", self, lift(other))

    def __radd__(self, other: Any) -> Expr:
        return Binary("+", lift(other), self)

    def __sub__(self, other: Any) -> Expr:
        return Binary("-", self, lift(other))

    def __rsub__(self, other: Any) -> Expr:
        return Binary("-", lift(other), self)

    def __mul__(self, other: Any) -> Expr:
        return Binary("*", self, lift(other))

    def __rmul__(self, other: Any) -> Expr:
        return Binary("*", lift(other), self)

    def __truediv__(self, other: Any) -> Expr:
        return Binary("/", self, lift(other))

    def __rtruediv__(self, other: Any) -> Expr:
        return Binary("/", lift(other), self)

    def __gt__(self, other: Any) -> Expr:
        return Binary(">", self, lift(other))

    def __ge__(self, other: Any) -> Expr:
        return Binary(">=", self, lift(other))

    def __lt__(self, other: Any) -> Expr:
        return Binary("<", self, lift(other))

    def __le__(self, other: Any) -> Expr:
        return Binary("<=", self, lift(other))

    def __and__(self, other: Any) -> Expr:
        return Binary("and", self, lift(other))

    def __or__(self, other: Any) -> Expr:
        return Binary("or", self, lift(other))

    def __neg__(self) -> Expr:
        return Binary("-", Constant(0), self)

    def __invert__(self) -> Expr:
        return Call("not", (self,))

    def __bool__(self) -> bool:
        raise SpecError(f"{self} has no truth value: write & | ~ for and, or, not, and when(…) for a choice")

    def eq(self, other: Any) -> Expr:
        """`self == other` (the operator itself compares trees, as for any value)."""
        return Binary("==", self, lift(other))

    def ne(self, other: Any) -> Expr:
        """`self != other`."""
        return Binary("!=", self, lift(other))

    def one_of(self, *values: Any) -> Expr:
        """Whether it equals one of the values."""
        if not values:
            raise SpecError("one_of() of no values is never true: give at least one")
        first, *others = (self.eq(v) for v in values)
        for other in others:
            first = first | other
        return first

    def abs(self) -> Expr:
        """Magnitude."""
        return Call("abs", (self,))

    def log1p(self) -> Expr:
        """ln(1 + x); null for x ≤ −1."""
        return Call("log1p", (self,))

    def sqrt(self) -> Expr:
        """Square root; null for x < 0."""
        return Call("sqrt", (self,))

    def floor(self) -> Expr:
        """Largest whole number that is not larger."""
        return Call("floor", (self,))

    def clip(self, low: Any, high: Any) -> Expr:
        """The value, or the nearer bound if it is outside."""
        return greatest(least(self, high), low)

    def is_null(self) -> Expr:
        """1 where it is not known, else 0."""
        return Call("is_null", (self,))

    def fill_null(self, value: Any) -> Expr:
        """The value, or another where it is not known."""
        return Call("fill_null", (self, lift(value)))

    def count(self, window: str) -> Expr:
        """Number of known, non-null values in the window."""
        return Window("count", self, duration_us(window))

    def sum(self, window: str) -> Expr:
        """Exact sum of the values in the window, each rounded to 2⁻²⁰."""
        return Window("sum", self, duration_us(window))

    def mean(self, window: str) -> Expr:
        """Mean of the values in the window."""
        return Window("mean", self, duration_us(window))

    def std(self, window: str) -> Expr:
        """Standard deviation of the values in the window, as of a sample (n − 1); null for fewer than two."""
        return Window("std", self, duration_us(window))

    def min(self, window: str) -> Expr:
        """Smallest value in the window."""
        return Window("min", self, duration_us(window))

    def max(self, window: str) -> Expr:
        """Largest value in the window."""
        return Window("max", self, duration_us(window))

    def last(self, window: str) -> Expr:
        """The value of the newest event in the window that has one."""
        return Window("last", self, duration_us(window))

    def hour(self) -> Expr:
        """Hour of day, 0–23, UTC, of a timestamp column."""
        return CalendarPart("hour", self)

    def weekday(self) -> Expr:
        """Day of week, Monday = 0, UTC."""
        return CalendarPart("weekday", self)

    def month(self) -> Expr:
        """Month, 1–12, UTC."""
        return CalendarPart("month", self)

    def day_of_year(self) -> Expr:
        """Day of year, 1–366, UTC."""
        return CalendarPart("day_of_year", self)

    def children(self) -> tuple[Expr, ...]:
        """The nodes right below."""
        return ()

    def over(self, children: tuple[Expr, ...]) -> Expr:
        """The same node over other nodes."""
        return self

    def walk(self) -> Iterator[Expr]:
        """Every node, this one first."""
        yield self
        for child in self.children():
            yield from child.walk()

    def columns(self) -> tuple[str, ...]:
        """The source columns it reads, each once, in order of first use."""
        return tuple(dict.fromkeys(n.name for n in self.walk() if isinstance(n, Column)))

    def functions(self) -> tuple[Python, ...]:
        """The Python functions in it, each once, in order of first use: they make it slow."""
        return tuple(dict.fromkeys(n for n in self.walk() if isinstance(n, Python)))

    def windows(self) -> tuple[Window, ...]:
        """The windows in it, each once, in order of first use."""
        return tuple(dict.fromkeys(n for n in self.walk() if isinstance(n, Window)))

    def to_json(self) -> list[Any]:
        """The tree as nested lists, the form that `expression_json.from_json` reads and `digest` hashes."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Column(Expr):
    """A column of the source row (or of the request, in an on-demand view)."""

    name: str

    def to_json(self) -> list[Any]:
        return ["col", self.name]


@dataclass(frozen=True, slots=True)
class Constant(Expr):
    """A number, string or truth value."""

    value: float | int | bool | str

    def to_json(self) -> list[Any]:
        return ["const", self.value]


@dataclass(frozen=True, slots=True)
class Binary(Expr):
    """Two operands and one of + - * / > >= < <= == != and or."""

    op: str
    left: Expr
    right: Expr

    def children(self) -> tuple[Expr, ...]:
        return (self.left, self.right)

    def over(self, children: tuple[Expr, ...]) -> Expr:
        return Binary(self.op, *children)

    def to_json(self) -> list[Any]:
        return [self.op, self.left.to_json(), self.right.to_json()]


@dataclass(frozen=True, slots=True)
class CalendarPart(Expr):
    """One part of a UTC timestamp."""

    part: Calendar
    operand: Expr

    def children(self) -> tuple[Expr, ...]:
        return (self.operand,)

    def over(self, children: tuple[Expr, ...]) -> Expr:
        return CalendarPart(self.part, *children)

    def to_json(self) -> list[Any]:
        return [self.part, self.operand.to_json()]


@dataclass(frozen=True, slots=True)
class Call(Expr):
    """A function of one to three operands: abs, log1p, sqrt, floor, not, is_null, fill_null, least, greatest, when."""

    function: str
    operands: tuple[Expr, ...]

    def children(self) -> tuple[Expr, ...]:
        return self.operands

    def over(self, children: tuple[Expr, ...]) -> Expr:
        return Call(self.function, children)

    def to_json(self) -> list[Any]:
        return [self.function, *(e.to_json() for e in self.operands)]


@dataclass(frozen=True, slots=True)
class Python(Expr):
    """A Python function of row values, called once a row: slow; `row_functions.python` makes it."""

    function: str
    """Where it is imported from: `module:name`."""
    source: str
    """Hash of its source text."""
    operands: tuple[Expr, ...]

    def children(self) -> tuple[Expr, ...]:
        return self.operands

    def over(self, children: tuple[Expr, ...]) -> Expr:
        return Python(self.function, self.source, children)

    def to_json(self) -> list[Any]:
        return ["python", self.function, self.source, *(e.to_json() for e in self.operands)]


@dataclass(frozen=True, slots=True)
class Window(Expr):
    """An aggregate of a row expression over the events of the last `width_us` microseconds."""

    aggregate: Aggregate
    operand: Expr
    width_us: int

    def __post_init__(self) -> None:
        if self.width_us <= 0:
            raise SpecError(f"a window of {self.width_us} µs is empty: give it a positive width, e.g. '6h'")
        if self.operand.windows():
            raise SpecError("a window inside a window has no meaning here: aggregate a row expression")

    def children(self) -> tuple[Expr, ...]:
        return (self.operand,)

    def to_json(self) -> list[Any]:
        return [self.aggregate, self.operand.to_json(), self.width_us]


def col(name: str) -> Expr:
    """A column of the view's source, to build a feature from: `(col("arr_delay") > 15).mean("7d")`."""
    return Column(name)


def least(left: Any, right: Any) -> Expr:
    """The smaller of two; null if either is."""
    return Call("least", (lift(left), lift(right)))


def greatest(left: Any, right: Any) -> Expr:
    """The larger of two; null if either is."""
    return Call("greatest", (lift(left), lift(right)))


def when(condition: Expr, then: Any, otherwise: Any) -> Expr:
    """`then` where the condition is true, `otherwise` where it is not, null where that is unknown."""
    return Call("when", (condition, lift(then), lift(otherwise)))


def digest(*parts: Any) -> str:
    """Content hash (16 hex digits of SHA-256) of JSON values: the version of a definition."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lift(value: Any) -> Expr:
    """An expression, or a constant as one."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, bool | int | float | str):
        return Constant(value)
    raise SpecError(f"{value!r} can not stand in a feature expression: use a column, number, string or truth value")
