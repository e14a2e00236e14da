"""A pipeline's features as a value: what is read, what is kept per event, what is computed; JSON both ways, no pickle.

A view's feature is lowered to *operands* (row expressions, evaluated once per source row), *leaves* (an aggregate of an
operand over a window, or its newest value) and a *finish* (the rest of the tree, over the leaves): in
`col("a").mean("6h") - col("a").mean("7d")` there are one operand, two leaves and a subtraction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.aggregates import COUNT, KINDS, NEWEST, SUM
from raymill.actors.evaluate import Columns, Evaluator, Floats, Ints, kind_of, to_float32
from raymill.runtime.errors import SpecError
from raymill.runtime.expression_json import from_json
from raymill.runtime.expressions import Call, Column, Constant, Expr, Python, Window, digest, duration_us
from raymill.runtime.row_functions import resolve
from raymill.runtime.spec import FeatureView, OnDemand, Pipeline, Source, definitions

_LAYOUT = 3
"""Number of the record's layout: another one is another place in the online store."""
_STEP = 1 << 13
"""Rows whose vectors are put together at once."""
_ARROW = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", "UTC"),
}


@dataclass(frozen=True)
class SourcePlan:
    """What must be known of a source to read its rows."""

    name: str
    """Name of the source and of its lake table."""
    key: tuple[str, ...]
    """Columns that identify a row."""
    time: str
    """Column of the event time."""
    known_at: str | None
    """Column of the moment from which it is known; None: its event time."""
    dtypes: dict[str, str]
    """Column → type."""

    @classmethod
    def of(cls, source: Source) -> SourcePlan:
        """The plan of a declared source."""
        dtypes: dict[str, str] = {name: c.dtype for name, c in source.schema.items()}
        return cls(source.name, tuple(source.key), source.time, source.known_at, dtypes)


@dataclass(frozen=True)
class ViewPlan:
    """Features of one entity from the events of one source."""

    name: str
    """Name of the view."""
    source: SourcePlan
    """Where its events come from."""
    entity: tuple[str, ...]
    """Columns that say whose event, and whose feature, it is."""
    max_age_us: int | None
    """Greatest age of a newest value."""
    required: bool
    """Whether an entity that was never seen is refused."""
    features: dict[str, Expr]
    """Name → expression."""

    def __post_init__(self) -> None:
        for column in self.entity:
            if self.source.dtypes[column] == "float64":
                raise SpecError(f"view {self.name!r}: entity column {column!r} is float64, use a string or int64")
        _check(self.name, self.features, self.source.dtypes)

    @cached_property
    def _lowered(self) -> _Lowered:
        return _Lowered(self.features.values(), self.max_age_us)

    @property
    def operands(self) -> tuple[Expr, ...]:
        """Row expressions that are kept of every event, in the record's order."""
        return tuple(self._lowered.operands)

    @cached_property
    def leaves(self) -> Ints:
        """[leaves, 3]: kind, operand, width in µs, as `windows.sweep` reads them."""
        return np.array(list(self._lowered.leaves), dtype=np.int64).reshape(-1, 3)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Source columns that its events need."""
        names = [*self.source.key, self.source.time, *([self.source.known_at] if self.source.known_at else [])]
        names += [*self.entity, *(c for e in self.operands for c in e.columns())]
        return tuple(dict.fromkeys(names))

    @cached_property
    def kept_us(self) -> int:
        """How long before a moment its events matter, as `windows.prune` reads it."""
        newest = self.leaves[:, 0] == NEWEST
        bounded = self.leaves[:, 2] + newest  # max age is inclusive
        kept = int(bounded.max(initial=0))
        return -1 - kept if bool((newest & (self.leaves[:, 2] < 0)).any()) else kept

    @cached_property
    def newest_leaves(self) -> Ints | None:
        """The leaf of each feature, if all of them are newest values; None: there are windows."""
        leaves = [int(e.name) for e in self._lowered.finish if isinstance(e, Column)]
        whole = len(leaves) == len(self.features) and bool((self.leaves[:, 0] == NEWEST).all())
        return np.array(leaves, dtype=np.int64) if whole else None

    @cached_property
    def digest(self) -> str:
        """Names the records of this view: whatever changes what they hold changes it."""
        source = [self.source.name, self.source.key, self.source.time, self.source.known_at]
        operands = [e.to_json() for e in self.operands]
        return digest(_LAYOUT, self.name, source, self.entity, operands, self.kept_us)

    @cached_property
    def progress_name(self) -> bytes:
        """Name of its progress in the online store."""
        return b"p" + self.digest.encode()

    def empty(self, rows: int) -> Floats:
        """Leaves of rows whose entity has no events: 0 for counts and sums, else NaN."""
        out = np.empty((rows, len(self.leaves)), dtype=np.float64)
        out[:] = self._empty
        return out

    @cached_property
    def _empty(self) -> Floats:
        kinds = self.leaves[:, 0]
        return np.where((kinds == COUNT) | (kinds == SUM), 0.0, np.nan)

    def finish(self, leaves: Floats) -> list[Floats]:
        """Feature values [rows] each, from the leaves [rows, leaves]."""
        columns: Columns = {str(j): leaves[:, j] for j in range(leaves.shape[1])}
        made = iter(self._finisher.values(columns, len(leaves)).T if self._finisher else ())
        return [columns[e.name] if isinstance(e, Column) else next(made) for e in self._lowered.finish]

    @cached_property
    def _finisher(self) -> Evaluator | None:
        trees = tuple(e for e in self._lowered.finish if not isinstance(e, Column))
        return Evaluator(trees) if trees else None


@dataclass(frozen=True)
class RequestPlan:
    """Features computed from the request or label row alone."""

    name: str
    """Name of the view."""
    features: dict[str, Expr]
    """Name → row expression over the request's columns."""

    def compute(self, request: Columns, rows: int) -> list[Floats]:
        """Feature values [rows] each, from the request's columns."""
        return list(self._evaluator.values(request, rows).T)

    @cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(tuple(self.features.values()))


@dataclass(frozen=True)
class FeaturePlan:
    """All features of a pipeline, in the order of the model's inputs."""

    pipeline: str
    """Name of the pipeline."""
    row: SourcePlan
    """The label's source: what a request row looks like."""
    views: tuple[ViewPlan | RequestPlan, ...]
    """Its views, in order."""

    def __post_init__(self) -> None:
        for view in self.views:
            if isinstance(view, RequestPlan):
                _check(view.name, view.features, self.row.dtypes)
        for function in self.functions:
            resolve(function.function, function.source)

    @classmethod
    def of(cls, pipeline: Pipeline) -> FeaturePlan:
        """The plan of a declared pipeline.

        Raises:
            SpecError: a feature has no meaning, e.g. adds a number to a string.
        """
        return cls.of_views(pipeline.views, pipeline.label.source, name=pipeline.name)

    @classmethod
    def of_views(cls, views: Sequence[FeatureView | OnDemand], rows: Source, *, name: str = "") -> FeaturePlan:
        """The plan of views for rows of a source, without a pipeline around them."""
        return cls(name, SourcePlan.of(rows), tuple(_view(v) for v in views))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """`<view>.<feature>` of every input, in order."""
        return tuple(f"{v.name}.{n}" for v in self.views for n in v.features)

    @cached_property
    def event_views(self) -> tuple[ViewPlan, ...]:
        """The views that read events."""
        return tuple(v for v in self.views if isinstance(v, ViewPlan))

    @cached_property
    def sources(self) -> dict[str, SourcePlan]:
        """Sources of the views, by name."""
        return {v.source.name: v.source for v in self.event_views}

    @cached_property
    def functions(self) -> tuple[Python, ...]:
        """The Python functions that it calls, once a row each."""
        return tuple(dict.fromkeys(f for v in self.views for e in v.features.values() for f in e.functions()))

    @cached_property
    def request_columns(self) -> tuple[str, ...]:
        """Columns that a request row must carry."""
        found: dict[str, None] = {}
        for view in self.views:
            found |= dict.fromkeys(view.entity if isinstance(view, ViewPlan) else _columns(view.features))
        return tuple(found)

    @property
    def request_schema(self) -> pa.Schema:
        """Those columns with their Arrow types."""
        return pa.schema([(c, _ARROW[self.row.dtypes[c]]) for c in self.request_columns])

    @cached_property
    def request_view_columns(self) -> tuple[str, ...]:
        """Columns that the on-demand views read."""
        return tuple(dict.fromkeys(c for v in self.views if isinstance(v, RequestPlan) for c in _columns(v.features)))

    def source_columns(self, source: str) -> tuple[str, ...]:
        """Columns of a source that the views need."""
        return tuple(dict.fromkeys(c for v in self.event_views if v.source.name == source for c in v.columns))

    @cached_property
    def places(self) -> tuple[tuple[ViewPlan | RequestPlan, int], ...]:
        """Each view, and the number of its first feature."""
        counts = accumulate((len(v.features) for v in self.views), initial=0)
        return tuple(zip(self.views, counts, strict=False))

    @staticmethod
    def fill(out: npt.NDArray[np.float32], first: int, values: Sequence[Floats]) -> None:
        """Values [rows] of consecutive features into `out` [rows, features], from number `first` on."""
        for row in range(0, len(out), _STEP):  # so few rows at once that they stay in the processor's cache
            some = slice(row, row + _STEP)
            if values:
                out[some, first : first + len(values)] = to_float32(np.stack([v[some] for v in values], axis=1))

    def assemble(self, request: Columns, leaves: Mapping[str, Floats], rows: int) -> npt.NDArray[np.float32]:
        """Feature vectors, float32 [rows, features], NaN for unknown: the last step, offline and online.

        Args:
            request: the columns of `request_view_columns`.
            leaves: view → leaves, as `windows.sweep` fills them.
            rows: number of rows.
        """
        out = np.empty((rows, len(self.names)), dtype=np.float32)
        values: list[Floats] = []
        for view in self.views:
            if isinstance(view, ViewPlan):
                values += view.finish(leaves[view.name])
            else:
                values += view.compute(request, rows)
        self.fill(out, 0, values)
        return out

    def to_json(self) -> str:
        """The plan as JSON text."""
        sources = {s.name: s for s in [*self.sources.values(), self.row]}
        return json.dumps(
            {
                "pipeline": self.pipeline,
                "row": self.row.name,
                "sources": {n: [list(s.key), s.time, s.known_at, s.dtypes] for n, s in sources.items()},
                "views": [_view_json(v) for v in self.views],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> FeaturePlan:
        """The plan that `to_json` wrote."""
        tree: dict[str, Any] = json.loads(text)
        sources = {n: SourcePlan(n, tuple(s[0]), s[1], s[2], s[3]) for n, s in tree["sources"].items()}
        views: list[ViewPlan | RequestPlan] = []
        for v in tree["views"]:
            features = {n: from_json(e) for n, e in v["features"]}
            if "source" in v:
                age, required = v["max_age_us"], v["required"]
                views.append(ViewPlan(v["name"], sources[v["source"]], tuple(v["entity"]), age, required, features))
            else:
                views.append(RequestPlan(v["name"], features))
        return cls(tree["pipeline"], sources[tree["row"]], tuple(views))


class _Lowered:
    """The operands, leaves and finishes of a view's features, each operand and leaf once."""

    def __init__(self, features: Any, max_age_us: int | None) -> None:
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
    return any(isinstance(e, Call) and e.function in ("is_null", "fill_null") for e in expr.walk())


def _columns(features: Mapping[str, Expr]) -> list[str]:
    return [c for e in features.values() for c in e.columns()]


def _check(view: str, features: Mapping[str, Expr], dtypes: Mapping[str, str]) -> None:
    for name, expr in features.items():
        try:
            kind = kind_of(expr, dtypes)
        except SpecError as err:
            raise SpecError(f"feature {view}.{name}: {err.message}") from err
        if kind == "string":
            raise SpecError(f"feature {view}.{name} is a string: compare it with a constant, e.g. .eq('UA')")


def _view(view: FeatureView | OnDemand) -> ViewPlan | RequestPlan:
    if isinstance(view, OnDemand):
        return RequestPlan(view.name, dict(definitions(view)))
    age = duration_us(view.max_age) if view.max_age else None
    source = SourcePlan.of(view.source)
    return ViewPlan(view.name, source, view.entity_columns, age, view.required, dict(definitions(view)))


def _view_json(view: ViewPlan | RequestPlan) -> dict[str, Any]:
    tree: dict[str, Any] = {"name": view.name, "features": [[n, e.to_json()] for n, e in view.features.items()]}
    if isinstance(view, ViewPlan):
        tree |= {"source": view.source.name, "entity": list(view.entity)}
        tree |= {"max_age_us": view.max_age_us, "required": view.required}
    return tree
