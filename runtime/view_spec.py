"""What a user declares of features and of what is predicted."""

from __future__ import annotations

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from raymill.runtime.expressions import Column, Expr, digest
from raymill.runtime.source_spec import VALUE, Duration, Name, Source


@dataclass(frozen=True, config=VALUE)
class FeatureView:
    """Features of an entity, from the rows of one source."""

    name: Name
    """Name of the view; its features are called `<view>.<feature>`."""
    source: Source
    """Where the rows come from."""
    entity: str | tuple[str, ...] | list[str]
    """Columns that say whose feature it is; they stand in the source and in the label or request row."""
    features: dict[str, Expr] | list[str]
    """Name → expression, or just columns of which the newest known value is wanted."""
    max_age: Duration | None = None
    """Newest values older than this, in event time, count as unknown (inclusive)."""
    required: bool = False
    """Whether an entity that was never seen is refused instead of giving nulls."""

    @property
    def entity_columns(self) -> tuple[str, ...]:
        """The entity's columns, in order."""
        return (self.entity,) if isinstance(self.entity, str) else tuple(self.entity)

    @property
    def definitions(self) -> dict[str, Expr]:
        """Feature name → expression."""
        return self.features if isinstance(self.features, dict) else {c: Column(c) for c in self.features}

    @model_validator(mode="after")
    def _columns_exist(self) -> FeatureView:
        for name, expr in self.definitions.items():
            lost = [c for c in expr.columns() if c not in self.source.schema]
            if lost:
                raise ValueError(f"feature {self.name}.{name} reads {lost}, which source {self.source.name!r} lacks")
        lost = [c for c in self.entity_columns if c not in self.source.schema]
        if lost:
            raise ValueError(f"view {self.name!r}: entity columns {lost} are not in source {self.source.name!r}")
        return self


@dataclass(frozen=True, config=VALUE)
class OnDemand:
    """Features computed from the request or label row alone."""

    name: Name
    """Name of the view."""
    features: dict[str, Expr]
    """Name → row expression over the label source's columns; no windows."""

    @model_validator(mode="after")
    def _rows_only(self) -> OnDemand:
        for name, expr in self.features.items():
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
    return view.definitions if isinstance(view, FeatureView) else view.features


def feature_hash(view: FeatureView | OnDemand, expr: Expr) -> str:
    """Content hash of a feature's definition: its version."""
    if isinstance(view, OnDemand):
        return digest("on-demand", expr.to_json())
    source = view.source
    return digest(source.name, source.time, source.known_at, view.entity_columns, view.max_age, expr.to_json())
