"""What a user declares of features and of what is predicted."""

from __future__ import annotations

from dataclasses import replace

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from raymill.runtime.column_spec import VALUE
from raymill.runtime.expressions import Column, Expr, digest
from raymill.runtime.source_spec import Duration, Name, Source


@dataclass(frozen=True, config=VALUE)
class Feature:
    """An expression, and what people should know of it; `expr` alone decides its value and its version."""

    expr: Expr
    """How it is computed."""
    description: str = ""
    """What it says, in a sentence."""
    unit: str = ""
    """Unit of its values, e.g. `min`, `km`, `1`."""
    owner: str = ""
    """Who answers for it; absent: the view's owner."""
    tags: tuple[str, ...] | list[str] = ()
    """Words to find it by, beside the view's."""
    sensitive: bool = False
    """Whether its values are personal or otherwise to be guarded; so is every feature of a sensitive view."""


@dataclass(frozen=True, config=VALUE)
class Lookup:
    """A column that the label or request row lacks: its newest value known at the row's moment, from a source."""

    source: Source
    """Where its rows come from."""
    entity: str | tuple[str, ...] | list[str]
    """Columns of the source that stand in the label or request row, too, or that a lookup before this one gives."""
    column: str
    """Column of the source that is given to the row, a string or int64; the row gets it under this name."""
    max_age: Duration | None = None
    """A newest row older than this, in event time, gives null (inclusive)."""

    @property
    def entity_columns(self) -> tuple[str, ...]:
        """The entity's columns, in order."""
        return (self.entity,) if isinstance(self.entity, str) else tuple(self.entity)

    @model_validator(mode="after")
    def _columns_exist(self) -> Lookup:
        schema = self.source.schema
        lost = [c for c in (*self.entity_columns, self.column) if c not in schema]
        if lost:
            raise ValueError(f"lookup of {self.column!r}: columns {lost} are not in source {self.source.name!r}")
        if schema[self.column].dtype not in ("string", "int64"):
            raise ValueError(
                f"lookup of {self.column!r}: an entity is a string or int64, not {schema[self.column].dtype}"
            )
        return self


@dataclass(frozen=True, config=VALUE)
class FeatureView:
    """Features of an entity, from the rows of one source."""

    name: Name
    """Name of the view; its features are called `<view>.<feature>`."""
    source: Source
    """Where the rows come from."""
    entity: str | tuple[str, ...] | list[str]
    """Columns that say whose feature it is; they stand in the source and in the label or request row."""
    features: dict[str, Expr | Feature] | list[str]
    """Name → expression, or just columns of which the newest known value is wanted."""
    max_age: Duration | None = None
    """Newest values older than this, in event time, count as unknown (inclusive)."""
    through: Lookup | list[Lookup] | tuple[Lookup, ...] = ()
    """Lookups, in order, that give the row those of the entity's columns that it lacks: from the order in the row to
    its customer, and then features of the customer."""
    required: bool = False
    """Whether an entity that was never seen is refused instead of giving nulls."""
    description: str = ""
    """What it is about, in a sentence."""
    owner: str = ""
    """Who answers for its features."""
    tags: tuple[str, ...] | list[str] = ()
    """Words to find its features by."""
    sensitive: bool = False
    """Whether the values of all its features are personal or otherwise to be guarded."""

    @property
    def entity_columns(self) -> tuple[str, ...]:
        """The entity's columns, in order."""
        return (self.entity,) if isinstance(self.entity, str) else tuple(self.entity)

    @property
    def definitions(self) -> dict[str, Expr]:
        """Feature name → expression."""
        return {n: f.expr for n, f in described(self).items()}

    @property
    def lookups(self) -> tuple[Lookup, ...]:
        """What it looks up, in order."""
        return (self.through,) if isinstance(self.through, Lookup) else tuple(self.through)

    @property
    def row_columns(self) -> tuple[str, ...]:
        """Columns that the label or request row must have: the entity's, or those that lookups begin with."""
        given: set[str] = set()
        needed: dict[str, None] = {}
        for lookup in self.lookups:
            needed |= dict.fromkeys(c for c in lookup.entity_columns if c not in given)
            given.add(lookup.column)
        return tuple(needed | dict.fromkeys(c for c in self.entity_columns if c not in given))

    @model_validator(mode="after")
    def _columns_exist(self) -> FeatureView:
        for name, expr in self.definitions.items():
            lost = [c for c in expr.columns() if c not in self.source.schema]
            if lost:
                raise ValueError(f"feature {self.name}.{name} reads {lost}, which source {self.source.name!r} lacks")
        media = [c for e in self.definitions.values() for c in e.columns() if self.source.schema[c].dtype == "media"]
        if media:
            raise ValueError(f"view {self.name!r} reads {media}, which are media: train on them by Train(media=…)")
        lost = [c for c in self.entity_columns if c not in self.source.schema]
        if lost:
            raise ValueError(f"view {self.name!r}: entity columns {lost} are not in source {self.source.name!r}")
        for lookup in self.lookups:
            if lookup.column not in {*self.entity_columns, *(c for o in self.lookups for c in o.entity_columns)}:
                raise ValueError(f"view {self.name!r}: it looks {lookup.column!r} up, which is no column of an entity")
        return self


@dataclass(frozen=True, config=VALUE)
class OnDemand:
    """Features computed from the request or label row alone."""

    name: Name
    """Name of the view."""
    features: dict[str, Expr | Feature]
    """Name → row expression over the label source's columns; no windows."""
    description: str = ""
    """What it is about, in a sentence."""
    owner: str = ""
    """Who answers for its features."""
    tags: tuple[str, ...] | list[str] = ()
    """Words to find its features by."""
    sensitive: bool = False
    """Whether the values of all its features are personal or otherwise to be guarded."""

    @model_validator(mode="after")
    def _rows_only(self) -> OnDemand:
        for name, expr in definitions(self).items():
            if expr.windows():
                raise ValueError(f"on-demand feature {self.name}.{name} has a window: put it into a FeatureView")
        return self


@dataclass(frozen=True, config=VALUE)
class Label:
    """What is to be predicted: a truth value of a source row that becomes known later."""

    name: Name
    """Name of the label and of the probability in an answer."""
    source: Source
    """Its rows are the things predicted; their `time` is the moment of the prediction."""
    value: Expr
    """Row expression; null where the label never comes (kept and counted, not trained on)."""


def definitions(view: FeatureView | OnDemand) -> dict[str, Expr]:
    """Feature name → expression of either kind of view."""
    return {n: f.expr for n, f in described(view).items()}


def described(view: FeatureView | OnDemand) -> dict[str, Feature]:
    """Feature name → expression and all that was said of it, the view's owner, tags and sensitivity included."""
    declared = view.features if isinstance(view.features, dict) else {c: Column(c) for c in view.features}
    found = {}
    for name, one in declared.items():
        own = one if isinstance(one, Feature) else Feature(one)
        found[name] = replace(
            own,
            owner=own.owner or view.owner,
            tags=tuple(dict.fromkeys([*view.tags, *own.tags])),
            sensitive=own.sensitive or view.sensitive,
        )
    return found


def feature_hash(view: FeatureView | OnDemand, expr: Expr) -> str:
    """Content hash of a feature's definition: its version."""
    if isinstance(view, OnDemand):
        return digest("on-demand", expr.to_json())
    through = [(_rows(k.source), k.entity_columns, k.column, k.max_age) for k in view.lookups]
    parts = (_rows(view.source), view.entity_columns, view.max_age, expr.to_json())
    return digest(*parts, through) if through else digest(*parts)


def _rows(source: Source) -> tuple[object, ...]:
    return source.name, tuple(source.key), source.time, source.known_at
