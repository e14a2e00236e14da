"""From a feature's expression to what is kept of each event and what is worked out from that.

*Operands* are row expressions, evaluated once per source row; *leaves* are an aggregate of an operand over a window, or
its newest value; the *finish* is the rest of the tree, over the leaves: in `col("a").mean("6h") - col("a").mean("7d")`
there are one operand, two leaves and a subtraction. An expression without windows is one leaf, the newest value of the
whole of it; but what can turn a null into something (`is_null`, `fill_null`) is left to the finish, since what is not
known is null for whatever reason: no row, an old row, or a null in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raymill.actors.aggregates import KINDS, NEWEST
from raymill.actors.evaluate import kind_of
from raymill.runtime.errors import SpecError
from raymill.runtime.expressions import Call, Column, Constant, Expr, Python, Window


class Lowered:
    """The operands, leaves and finishes of a view's features, each operand and leaf once."""

    def __init__(self, features: Iterable[Expr], max_age_us: int | None) -> None:
        self.operands: dict[Expr, int] = {}
        self.leaves: dict[tuple[int, int, int], int] = {}
        self._age_us = -1 if max_age_us is None else max_age_us
        self.finish: list[Expr] = [self._lower(e) for e in features]

    def _lower(self, expr: Expr) -> Expr:
        if isinstance(expr, Constant):
            return expr
        if isinstance(expr, Window):
            return self._leaf(KINDS[expr.aggregate], expr.operand, expr.width_us)
        if not expr.windows() and not _sees_null(expr):
            return self._leaf(NEWEST, expr, self._age_us)
        return expr.over(tuple(self._lower(e) for e in expr.children()))

    def _leaf(self, kind: int, operand: Expr, width_us: int) -> Expr:
        leaf = (kind, self.operands.setdefault(operand, len(self.operands)), width_us)
        return Column(str(self.leaves.setdefault(leaf, len(self.leaves))))


def _sees_null(expr: Expr) -> bool:
    """Whether a value that is not known, for whatever reason, can become one that is: then it is worked out last."""
    if isinstance(expr, Python) and not expr.windows():
        return False  # it is called with the values of a row, or not at all
    seeing = isinstance(expr, Call) and expr.function in ("is_null", "fill_null")
    return seeing or any(_sees_null(e) for e in expr.children())


def check(view: str, features: Mapping[str, Expr], dtypes: Mapping[str, str]) -> None:
    """See to it that a view's features have a meaning over columns of these types.

    Raises:
        SpecError: one has not; its name and why.
    """
    for name, expr in features.items():
        try:
            kind = kind_of(expr, dtypes)
        except SpecError as err:
            raise SpecError(f"feature {view}.{name}: {err.message}") from err
        if kind == "string":
            raise SpecError(f"feature {view}.{name} is a string: compare it with a constant, e.g. .eq('UA')")
