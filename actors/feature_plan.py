"""A pipeline's features as a value: what is read, what is kept per event, what is computed; JSON both ways, no pickle.

A view's features are lowered to operands, leaves and finishes (`lowering.py`).
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

from raymill.actors.aggregates import COUNT, NEWEST, SUM
from raymill.actors.evaluate import Columns, Evaluator, Floats, Ints, to_float32
from raymill.actors.lowering import Lowered, check
from raymill.runtime.errors import SpecError
from raymill.runtime.expression_json import from_json
from raymill.runtime.expressions import Call, Column, Expr, Python, digest, duration_us
from raymill.runtime.row_functions import resolve
from raymill.runtime.spec import FeatureView, Lookup, OnDemand, Pipeline, Source, definitions

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
    gives: str | None = None
    """Of a lookup: the column whose newest value it gives to the row; then its operands are the value's two parts."""

    def __post_init__(self) -> None:
        for column in self.entity:
            if self.source.dtypes[column] == "float64":
                raise SpecError(f"view {self.name!r}: entity column {column!r} is float64, use a string or int64")
        if self.gives is None:
            check(self.name, self.features, self.source.dtypes)

    @cached_property
    def _lowered(self) -> Lowered:
        return Lowered(self.features.values(), self.max_age_us)

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
        """The leaf of each feature, if all of them are newest values; None: there are windows, or it is a lookup."""
        if self.gives is not None:
            return None
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
    lookups: tuple[ViewPlan, ...] = ()
    """What gives the row columns that it lacks, each perhaps from columns that one before it gave."""

    def __post_init__(self) -> None:
        for view in self.views:
            if isinstance(view, RequestPlan):
                check(view.name, view.features, self.row.dtypes)
        given = {v.name: v.source.dtypes[v.name] for v in self.lookups}
        for kept in self.kept_views:
            wrong = [c for c in kept.entity if given.get(c, kept.source.dtypes[c]) != kept.source.dtypes[c]]
            if wrong:
                raise SpecError(f"view {kept.name!r}: source {kept.source.name!r} has {wrong} in another type")
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
        lookups: dict[str, ViewPlan] = {}
        for view in views:
            for one in view.lookups if isinstance(view, FeatureView) else ():
                made = _lookup(one)
                if lookups.setdefault(one.column, made) != made:
                    raise SpecError(f"view {view.name!r}: {one.column!r} is looked up another way by a view before it")
        return cls(name, SourcePlan.of(rows), tuple(_view(v) for v in views), tuple(lookups.values()))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """`<view>.<feature>` of every input, in order."""
        return tuple(f"{v.name}.{n}" for v in self.views for n in v.features)

    @cached_property
    def event_views(self) -> tuple[ViewPlan, ...]:
        """The views that read events."""
        return tuple(v for v in self.views if isinstance(v, ViewPlan))

    @cached_property
    def kept_views(self) -> tuple[ViewPlan, ...]:
        """What reads events: those views, and the lookups."""
        return (*self.lookups, *self.event_views)

    @cached_property
    def sources(self) -> dict[str, SourcePlan]:
        """Sources of the views and lookups, by name."""
        return {v.source.name: v.source for v in self.kept_views}

    @cached_property
    def functions(self) -> tuple[Python, ...]:
        """The Python functions that it calls, once a row each."""
        return tuple(dict.fromkeys(f for v in self.views for e in v.features.values() for f in e.functions()))

    @cached_property
    def request_columns(self) -> tuple[str, ...]:
        """Columns that a request row must carry."""
        found: dict[str, None] = {}
        given: set[str] = set()
        for lookup in self.lookups:
            found |= dict.fromkeys(c for c in lookup.entity if c not in given)
            given.add(lookup.name)
        for view in self.views:
            needed = view.entity if isinstance(view, ViewPlan) else _columns(view.features)
            found |= dict.fromkeys(c for c in needed if c not in given or not isinstance(view, ViewPlan))
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
        return tuple(dict.fromkeys(c for v in self.kept_views if v.source.name == source for c in v.columns))

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
                "lookups": [[v.name, v.source.name, list(v.entity), v.max_age_us] for v in self.lookups],
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
        lookups = (
            _looking_up(sources[of], tuple(entity), name, age) for name, of, entity, age in tree.get("lookups", ())
        )
        return cls(tree["pipeline"], sources[tree["row"]], tuple(views), tuple(lookups))


def _columns(features: Mapping[str, Expr]) -> list[str]:
    return [c for e in features.values() for c in e.columns()]


def _view(view: FeatureView | OnDemand) -> ViewPlan | RequestPlan:
    if isinstance(view, OnDemand):
        return RequestPlan(view.name, dict(definitions(view)))
    age = duration_us(view.max_age) if view.max_age else None
    source = SourcePlan.of(view.source)
    return ViewPlan(view.name, source, view.entity_columns, age, view.required, dict(definitions(view)))


def _lookup(lookup: Lookup) -> ViewPlan:
    age = duration_us(lookup.max_age) if lookup.max_age else None
    return _looking_up(SourcePlan.of(lookup.source), lookup.entity_columns, lookup.column, age)


def _looking_up(source: SourcePlan, entity: tuple[str, ...], column: str, age_us: int | None) -> ViewPlan:
    kind = source.dtypes[column]
    parts: dict[str, Expr] = {part: Call(f"{part}_{kind}", (Column(column),)) for part in ("high", "low")}
    return ViewPlan(column, source, entity, age_us, False, parts, gives=column)


def _view_json(view: ViewPlan | RequestPlan) -> dict[str, Any]:
    tree: dict[str, Any] = {"name": view.name, "features": [[n, e.to_json()] for n, e in view.features.items()]}
    if isinstance(view, ViewPlan):
        tree |= {"source": view.source.name, "entity": list(view.entity)}
        tree |= {"max_age_us": view.max_age_us, "required": view.required}
    return tree
