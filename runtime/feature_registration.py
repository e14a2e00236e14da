"""Writes the feature registry's events: what a pipeline declares of its features, and which ones are not to be used.

Invariant: nothing is written that the ledger says already, so a run that is taken up again, or the same word said
twice, leaves one event. `feature_registry.py` reads them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from raymill.runtime.errors import Conflict
from raymill.runtime.expressions import SECOND_US, Expr, digest
from raymill.runtime.feature_registry import DEPRECATED, REGISTERED, RESTORED, Catalogue, FeatureVersion
from raymill.runtime.messages import Event, ModelVersion
from raymill.runtime.spec import Pipeline
from raymill.runtime.view_spec import Feature, FeatureView, OnDemand, described, feature_hash

_INFIX = ("+", "-", "*", "/", ">", ">=", "<", "<=", "==", "!=", "and", "or")
_UNITS = ((86_400 * SECOND_US, "d"), (3_600 * SECOND_US, "h"), (60 * SECOND_US, "m"), (SECOND_US, "s"))


class Records(Protocol):
    """Ledger and registry, as far as registrations need them."""

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Events of a kind, in order."""

    def append(self, events: Sequence[Event]) -> None:
        """Write events."""

    def models(self) -> list[str]:
        """Names of all models."""

    def versions(self, model: str) -> list[ModelVersion]:
        """All versions of a model."""


def register(records: Records, pipeline: Pipeline) -> list[str]:
    """Register every feature of the pipeline, if it declares other ones than it registered last.

    Returns:
        A sentence for each of its features that is deprecated.
    """
    data = declaration(pipeline)
    before = [e for e in records.events(REGISTERED) if e["subject"] == pipeline.name]
    if not before or before[-1]["data"]["digest"] != data["digest"]:
        key = f"{REGISTERED}/{pipeline.name}/{len(before)}/{data['digest']}"
        records.append([_event(REGISTERED, pipeline.name, data, pipeline=pipeline.name, key=key)])
    return Catalogue.of(records).warnings(pipeline)


def deprecate(
    records: Records, feature: str, *, reason: str, replacement: str = "", version: str = ""
) -> list[FeatureVersion]:
    """Say that a feature is not to be used any more; the versions that are meant come back, with who uses them.

    Args:
        records: ledger and registry.
        feature: `<view>.<feature>`.
        reason: why.
        replacement: feature to use instead.
        version: content hash of the only version that is meant; empty: all.

    Raises:
        UnknownFeature: feature or replacement was never registered.
        Conflict: it has no such version, or is to be replaced by itself.
    """
    catalogue = Catalogue.of(records)
    known = catalogue.find(feature)
    if version and version not in {v.version for v in known}:
        raise Conflict(f"feature {feature!r} has no version {version!r}: it has {[v.version for v in known]}")
    if replacement:
        catalogue.find(replacement)
    if replacement == feature:
        raise Conflict(f"feature {feature!r} can not replace itself: name another one, or none")
    data = {"version": version, "reason": reason, "replacement": replacement}
    _say(records, DEPRECATED, feature, data)
    return [v for v in Catalogue.of(records).find(feature) if version in ("", v.version)]


def restore(records: Records, feature: str) -> list[FeatureVersion]:
    """Take a deprecation back; every version comes back.

    Raises:
        UnknownFeature: it was never registered.
    """
    Catalogue.of(records).find(feature)
    _say(records, RESTORED, feature, {})
    return Catalogue.of(records).find(feature)


def declaration(pipeline: Pipeline) -> dict[str, Any]:
    """What a registration says: `{digest, features, label}`, JSON values."""
    rows = pipeline.label.source.name
    features = [_feature(view, name, one, rows) for view in pipeline.views for name, one in described(view).items()]
    label = {"name": pipeline.label.name, "columns": [f"{rows}.{c}" for c in pipeline.label.value.columns()]}
    return {"digest": digest(features, label), "features": features, "label": label}


def written(expr: Expr) -> str:
    """A definition as a person would write it: `mean(arr_delay, 6h) - mean(arr_delay, 7d)`."""
    text = _written(expr.to_json())
    return text[1:-1] if text.startswith("(") else text


def _feature(view: FeatureView | OnDemand, name: str, one: Feature, rows: str) -> dict[str, Any]:
    source = view.source.name if isinstance(view, FeatureView) else rows
    return {
        "name": f"{view.name}.{name}",
        "version": feature_hash(view, one.expr),
        "dtype": "float32",
        "expression": written(one.expr),
        "description": one.description or view.description,
        "unit": one.unit,
        "owner": one.owner,
        "tags": list(one.tags),
        "sensitive": one.sensitive,
        "source": source,
        "entity": list(view.entity_columns) if isinstance(view, FeatureView) else [],
        "windows": [_duration(w.width_us) for w in one.expr.windows()],
        "max_age": (view.max_age or "") if isinstance(view, FeatureView) else "",
        "columns": [list(c) for c in _columns(view, one.expr, rows)],
    }


def _columns(view: FeatureView | OnDemand, expr: Expr, rows: str) -> list[tuple[str, str]]:
    """(`source.column`, role) of all that a feature stands on."""
    if isinstance(view, OnDemand):
        return [(f"{rows}.{c}", "request") for c in expr.columns()]
    source = view.source
    found = [(c, "value") for c in expr.columns()]
    found += [(c, "entity") for c in view.entity_columns]
    found += [(source.time, "time"), *([(source.known_at, "known_at")] if source.known_at else [])]
    found += [(c, "key") for c in source.key]
    named = [(f"{source.name}.{c}", role) for c, role in found]
    for lookup in view.lookups:
        of = lookup.source
        times = [of.time, *([of.known_at] if of.known_at else [])]
        named += [(f"{of.name}.{c}", "lookup") for c in dict.fromkeys([*lookup.entity_columns, lookup.column, *times])]
    return named + [(f"{rows}.{c}", "request") for c in view.row_columns]


def _written(tree: Any) -> str:
    head, *rest = tree
    if head == "col":
        return str(rest[0])
    if head == "const":
        return repr(rest[0])
    if head == "python":
        head, _source, *rest = rest
    parts = [_written(r) if isinstance(r, list) else _duration(r) if isinstance(r, int) else str(r) for r in rest]
    return f"({parts[0]} {head} {parts[1]})" if head in _INFIX else f"{head}({', '.join(parts)})"


def _duration(us: int) -> str:
    """The shortest form of a width: `6h`, `7d`."""
    size, unit = next(((s, u) for s, u in _UNITS if us % s == 0), (1_000, "ms"))
    return f"{us / size:g}{unit}"


def _say(records: Records, kind: str, feature: str, data: dict[str, Any]) -> None:
    """Append what is said of a feature, unless it was the last thing that was said of it."""
    said = [e for k in (DEPRECATED, RESTORED) for e in records.events(k) if e["subject"] == feature]
    last = max(said, key=lambda e: e["seq"], default=None)
    if (last["kind"], last["data"]) != (kind, data) if last else kind == DEPRECATED:
        records.append([_event(kind, feature, data, key=f"{kind}/{feature}/{len(said)}/{digest(data)}")])


def _event(kind: str, subject: str, data: dict[str, Any], *, key: str, pipeline: str = "") -> Event:
    return Event(kind=kind, subject=subject, pipeline=pipeline, wall_s=time.time(), data=data, key=key)
