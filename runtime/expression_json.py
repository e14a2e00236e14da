"""The tree of a feature's definition, read from its JSON form."""

from __future__ import annotations

from typing import Any

from raymill.runtime.errors import SpecError
from raymill.runtime.expressions import (
    AGGREGATES,
    CALENDAR,
    Binary,
    CalendarPart,
    Call,
    Column,
    Constant,
    Expr,
    Python,
    Window,
)

_OPS = ("+", "-", "*", "/", ">", ">=", "<", "<=", "==", "!=", "and", "or")
_CALLS = {"abs": 1, "log1p": 1, "sqrt": 1, "floor": 1, "not": 1, "is_null": 1}
_CALLS |= {"fill_null": 2, "least": 2, "greatest": 2, "when": 3}
"""Function → number of operands."""


def from_json(tree: list[Any]) -> Expr:
    """The expression that `Expr.to_json` wrote.

    Raises:
        SpecError: the nested lists are not such a tree.
    """
    head, *rest = tree
    if head == "col":
        return Column(rest[0])
    if head == "const":
        return Constant(rest[0])
    if head in _OPS:
        return Binary(head, from_json(rest[0]), from_json(rest[1]))
    if head in AGGREGATES:
        return Window(head, from_json(rest[0]), rest[1])
    if head in CALENDAR:
        return CalendarPart(head, from_json(rest[0]))
    if _CALLS.get(head) == len(rest):
        return Call(head, tuple(from_json(e) for e in rest))
    if head == "python":
        return Python(rest[0], rest[1], tuple(from_json(e) for e in rest[2:]))
    known = ", ".join(("col", "const", *_OPS, *_CALLS, *CALENDAR, *AGGREGATES, "python"))
    raise SpecError(f"{head!r} of {len(rest)} operands is no node of a feature expression; known are {known}")
