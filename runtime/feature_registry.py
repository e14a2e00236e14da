"""The feature registry: every feature that a pipeline ran with, its versions, who uses it; a view of the ledger.

A feature is a name (`<view>.<feature>`), a version of it the content hash of its definition: the same name with the
same hash in two pipelines is one version, used by both. Nothing is kept beside the ledger's events:

- `features.registered` (subject: the pipeline): `{digest, features [Registration], label {name, columns}}`, told when
  it differs from what the pipeline registered last.
- `feature.deprecated` (subject: the feature): `{version, reason, replacement}`; an empty version means all of them.
- `feature.restored` (subject: the feature): it may be used again.
- `features.described` (of a training set) and `features.observed` (of served rows): `{feature_hashes, rows, features}`.

`feature_registration.py` writes the first three, `actors/features.py` and `actors/recompute.py` the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from raymill.runtime.errors import UnknownFeature
from raymill.runtime.messages import ModelVersion, Stage
from raymill.runtime.spec import Pipeline

REGISTERED, DEPRECATED, RESTORED = "features.registered", "feature.deprecated", "feature.restored"
DESCRIBED, OBSERVED = "features.described", "features.observed"
JUDGED = "consistency.judged"
"""Kind of the event about a check of served vectors against the lake (`actors/consistency.py`)."""
ANSWERING = (Stage.LIVE, Stage.CANARY)
"""Stages of the versions that break at once when a column goes."""


class Records(Protocol):
    """Ledger and registry, as far as the feature registry reads them."""

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Events of a kind, in order."""

    def models(self) -> list[str]:
        """Names of all models."""

    def versions(self, model: str) -> list[ModelVersion]:
        """All versions of a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deprecation:
    """A feature, or one version of it, that is not to be used any more."""

    version: str
    """Content hash that is meant; empty: every version."""
    reason: str
    """Why."""
    replacement: str
    """Feature to use instead; empty: there is none."""
    wall_s: float
    """Wall time at which it was said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureVersion:
    """One version of a feature."""

    name: str
    """`<view>.<feature>`."""
    version: str
    """Content hash of its definition."""
    dtype: str
    """Type of its values in a vector."""
    expression: str
    """The definition, written out."""
    description: str
    """What it says."""
    unit: str
    """Unit of its values."""
    owner: str
    """Who answers for it."""
    tags: tuple[str, ...]
    """Words to find it by."""
    sensitive: bool
    """Whether its values are to be guarded."""
    source: str
    """Source of its view; of an on-demand feature, that of the request's rows."""
    entity: tuple[str, ...]
    """Columns that say whose feature it is; none: it is of the request row itself."""
    windows: tuple[str, ...]
    """Widths of its windows."""
    max_age: str
    """Greatest age of a newest value; empty: any."""
    columns: tuple[tuple[str, str], ...]
    """(`source.column`, role) of all it stands on; roles: value, entity, time, known_at, key, request."""
    pipelines: tuple[str, ...]
    """Pipelines whose newest registration has it."""
    models: tuple[tuple[str, int, str], ...]
    """(model, version, stage) of the versions that were trained with it."""
    registered_s: float
    """Wall time of its first registration."""
    deprecated: Deprecation | None
    """Why it is not to be used; null: it may be."""

    @property
    def answering(self) -> tuple[str, ...]:
        """`model/version` of the live and canary versions that use it."""
        return tuple(f"{m}/{v}" for m, v, stage in self.models if stage in ANSWERING)

    def to_json(self) -> dict[str, Any]:
        """JSON values, with `answering`."""
        columns = [{"column": c, "role": r} for c, r in self.columns]
        models = [{"model": m, "version": v, "stage": s} for m, v, s in self.models]
        return {**asdict(self), "columns": columns, "models": models, "answering": list(self.answering)}


class Catalogue:
    """All features that were ever registered, as the ledger's events and the model registry tell."""

    def __init__(self, events: Iterable[Mapping[str, Any]], models: Iterable[ModelVersion]) -> None:
        """`events` of the kinds in this module's docstring, in any order; others are passed over."""
        told = sorted(events, key=lambda e: e["seq"])
        registered = [e for e in told if e["kind"] == REGISTERED]
        self._newest = {e["subject"]: e["data"] for e in registered}
        stated = {e["subject"]: e for e in told if e["kind"] in (DEPRECATED, RESTORED)}
        self._stated = {n: _deprecation(e) for n, e in stated.items() if e["kind"] == DEPRECATED}
        self._statistics = [e for e in told if e["kind"] in (DESCRIBED, OBSERVED)]
        self._models = list(models)
        self.versions = self._entries(registered)

    @classmethod
    def of(cls, records: Records) -> Catalogue:
        """The catalogue as ledger and registry are now."""
        kinds = (REGISTERED, DEPRECATED, RESTORED, DESCRIBED, OBSERVED)
        events = [e for kind in kinds for e in records.events(kind)]
        return cls(events, [v for name in records.models() for v in records.versions(name)])

    def find(self, name: str) -> list[FeatureVersion]:
        """Every version of a feature, newest last.

        Raises:
            UnknownFeature: no pipeline ever ran with it.
        """
        found = [v for v in self.versions if v.name == name]
        if not found:
            near = sorted({v.name for v in self.versions if name.rpartition(".")[2] in v.name})[:5]
            raise UnknownFeature(f"there is no feature {name!r}" + (f"; did you mean one of {near}?" if near else ""))
        return found

    def search(
        self, text: str = "", *, tag: str = "", owner: str = "", column: str = "", every_version: bool = False
    ) -> list[FeatureVersion]:
        """Features for which all that is given holds; those that pipelines have now, unless every version is wanted.

        Args:
            text: stands in name, description or tags, in any case.
            tag: one of its tags.
            owner: its owner.
            column: a column that it stands on, as `source.column` or the column alone.
            every_version: also versions that no pipeline has any more.
        """
        return [
            v
            for v in self.versions
            if (every_version or v.pipelines)
            and text.lower() in " ".join((v.name, v.description, *v.tags)).lower()
            and (not tag or tag in v.tags)
            and (not owner or owner == v.owner)
            and (not column or any(_names(c, column) for c, _ in v.columns))
        ]

    def downstream(self, column: str) -> dict[str, Any]:
        """What stands on a source column (`source.column`, or the column alone): features, models, labels.

        Returns:
            `column`, `features` [{name, version, role, pipelines, models, deprecated}], `labels` [{pipeline, label}],
            and `breaks`: the live and canary versions that stop working when the column goes.
        """
        features = []
        for entry in self.versions:
            roles = sorted({role for c, role in entry.columns if _names(c, column)})
            if roles:
                told = entry.to_json()
                kept = ("name", "version", "pipelines", "models", "answering")
                features.append({**{k: told[k] for k in kept}, "roles": roles, "deprecated": bool(entry.deprecated)})
        labels = [
            {"pipeline": pipeline, "label": data["label"]["name"]}
            for pipeline, data in sorted(self._newest.items())
            if any(_names(c, column) for c in data["label"]["columns"])
        ]
        breaks = sorted({m for f in features for m in f["answering"]})
        return {"column": column, "features": features, "labels": labels, "breaks": breaks}

    def upstream(self, model: str, version: int | None = None) -> list[dict[str, Any]]:
        """What the versions of a model stand on: `{model, version, stage, features, columns}` each, newest last."""
        found = []
        for one in self._models:
            if one.model == model and version in (None, one.version):
                hashes = one.manifest.feature_hashes if one.manifest else {}
                mine = [v for v in self.versions if hashes.get(v.name) == v.version]
                columns = sorted({c for v in mine for c, _ in v.columns})
                told = {"model": model, "version": one.version, "stage": str(one.stage)}
                found.append({**told, "features": hashes, "columns": columns})
        return found

    def statistics(self, name: str, version: str) -> dict[str, Any]:
        """Newest statistics of a version: `training` and `online`, each null where there are none yet."""
        found: dict[str, Any] = {"training": None, "online": None}
        for event in self._statistics:
            data = event["data"]
            if data["feature_hashes"].get(name) == version and name in data["features"]:
                own = {**data["features"][name], "rows": data["rows"], "pipeline": event["pipeline"], "at": event["at"]}
                if event["kind"] == OBSERVED:
                    own["unseen_share"] = data["unseen"].get(name.partition(".")[0])
                found["training" if event["kind"] == DESCRIBED else "online"] = own
        return found

    def warnings(self, pipeline: Pipeline) -> list[str]:
        """A sentence for each feature of the pipeline that is deprecated."""
        return [
            f"feature {name} is deprecated: {stated.reason}"
            + (f"; use {stated.replacement} instead" if stated.replacement else "")
            for name, version in pipeline.feature_hashes.items()
            if (stated := self._deprecated(name, version)) is not None
        ]

    def _deprecated(self, name: str, version: str) -> Deprecation | None:
        stated = self._stated.get(name)
        return stated if stated is not None and stated.version in ("", version) else None

    def _entries(self, registered: list[Mapping[str, Any]]) -> list[FeatureVersion]:
        newest: dict[tuple[str, str], dict[str, Any]] = {}
        first_s: dict[tuple[str, str], float] = {}
        for event in registered:
            for told in event["data"]["features"]:
                key = (told["name"], told["version"])
                newest[key] = told
                first_s.setdefault(key, event["wall_s"])
        users: dict[tuple[str, str], list[str]] = {}
        for pipeline, data in self._newest.items():
            for told in data["features"]:
                users.setdefault((told["name"], told["version"]), []).append(pipeline)
        return [
            FeatureVersion(
                **{k: _frozen(v) for k, v in told.items()},
                pipelines=tuple(sorted(users.get(key, []))),
                models=self._trained_with(*key),
                registered_s=first_s[key],
                deprecated=self._deprecated(*key),
            )
            for key, told in newest.items()
        ]

    def _trained_with(self, name: str, version: str) -> tuple[tuple[str, int, str], ...]:
        return tuple(
            (m.model, m.version, str(m.stage))
            for m in self._models
            if m.manifest is not None and m.manifest.feature_hashes.get(name) == version
        )


def _deprecation(event: Mapping[str, Any]) -> Deprecation:
    data = event["data"]
    return Deprecation(
        version=data["version"], reason=data["reason"], replacement=data["replacement"], wall_s=event["wall_s"]
    )


def _names(column: str, wanted: str) -> bool:
    """Whether `source.column` is the column wanted, which may leave the source away."""
    return wanted in (column, column.partition(".")[2])


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
