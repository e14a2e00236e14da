"""From a prediction back to its model version, training, feature definitions, lake versions and source rows.

A view of prediction log, registry, ledger and lake; it writes nothing. Source rows are read at the lake version that
was the newest when the prediction was answered, so they are those that its features were made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import pyarrow as pa

from raymill.runtime.errors import StoreError, UnknownModel, UnknownPrediction, UnknownVersion
from raymill.runtime.expression_json import from_json
from raymill.runtime.messages import Manifest, ModelVersion

PREDICTIONS = "predictions"
"""Lake table of the prediction log."""
MAX_ROWS = 3
"""Source rows that are shown per view, the newest; all are counted."""

Read = Callable[..., pa.Table]
"""`Lake.read`: (table, *, version, columns, where) → rows."""


class Records(Protocol):
    """Registry and ledger, as far as lineage needs them."""

    def get(self, model: str, version: int) -> ModelVersion:
        """One version."""

    def events(self, kind: str | None = None, *, subject: str | None = None) -> list[dict[str, Any]]:
        """Events of a kind and subject, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRows:
    """What one view, or the label, had to go by."""

    view: str
    """View's name; `label` for the row that was predicted."""
    source: str
    """Source and lake table."""
    lake_version: int
    """Version of the table that was read."""
    entity: dict[str, Any]
    """Column → value that picked the rows."""
    rows: int
    """Rows known at the prediction's moment, within the view's reach back."""
    newest: tuple[dict[str, Any], ...]
    """The newest of them by event time, at most MAX_ROWS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """The way back from one prediction."""

    prediction: dict[str, Any]
    """Its row of the log: id, model, version, role, at, key, row, p, wall_s, replica, scores."""
    features: dict[str, dict[str, Any]]
    """Feature → `value` it had (null: unknown) and `hash` of its definition when the model was trained."""
    version: dict[str, Any]
    """Model version: stage, kind, digest, threshold, metrics, history; empty: the registry does not have it."""
    training: dict[str, Any]
    """Training: id and what the ledger says of it, kind → data of the newest such event."""
    manifest: dict[str, Any]
    """What it was trained on: lake versions, feature hashes, label rule, range; empty: registered by hand."""
    sources: tuple[SourceRows, ...]
    """Source rows behind the features, one entry per view that reads a source, and the predicted row itself."""
    plan_known: bool
    """Whether the pipeline's plan was at hand; without it source rows can not be found."""

    def to_json(self) -> dict[str, Any]:
        """JSON values, `steps` included."""
        return {**asdict(self), "steps": self.steps()}

    def steps(self) -> list[dict[str, Any]]:
        """The way as `{what, facts}`, from the prediction down."""
        found = [
            {"what": f"prediction {self.prediction['id']}", "facts": _without(self.prediction, "id")},
            {"what": f"model {self.prediction['model']}/{self.prediction['version']}", "facts": self.version},
            {"what": f"training {self.training.get('id') or 'unknown'}", "facts": _without(self.training, "id")},
            {"what": "training set", "facts": _without(self.manifest, "feature_hashes", "features")},
            {"what": "features", "facts": {n: f"{f['value']} ({f['hash'][:12]})" for n, f in self.features.items()}},
        ]
        for each in self.sources:
            facts: dict[str, Any] = {"lake version": each.lake_version, **each.entity, "rows known": each.rows}
            facts |= {f"row {i + 1}": json.dumps(row) for i, row in enumerate(each.newest)}
            found.append({"what": f"{each.view} ← {each.source}", "facts": facts})
        return [step for step in found if step["facts"]]

    def __str__(self) -> str:
        lines = []
        for depth, step in enumerate(self.steps()):
            lines.append(f"{'  ' * min(depth, 5)}{step['what']}")
            lines += [f"{'  ' * min(depth, 5)}    {name}: {_short(value)}" for name, value in step["facts"].items()]
        return "\n".join(lines)


def trace(prediction_id: str, read: Read, records: Records, plan: str | None = None) -> Lineage:
    """The lineage of one prediction.

    Args:
        prediction_id: as in an answer of `/predict`.
        read: `Lake.read`.
        records: registry and ledger.
        plan: the pipeline's `FeaturePlan` as JSON; absent: the one in the ledger (`plan` in the data of the newest
            `training_set.made` of that pipeline), if there is one.

    Raises:
        UnknownPrediction: the log does not have it (yet: predictions are shipped to the lake in batches).
    """
    prediction, x = _prediction(prediction_id, read)
    version = _version(prediction, records)
    manifest = version.manifest if version else None
    known_plan = json.loads(plan) if plan else _plan_of_ledger(prediction["model"], records)
    return Lineage(
        prediction=prediction,
        features=_features(x, manifest, known_plan),
        version={} if version is None else _version_facts(version),
        training={} if version is None else _training(version.training_id, records),
        manifest={} if manifest is None else asdict(manifest),
        sources=() if known_plan is None else _sources(prediction, known_plan, read, records),
        plan_known=known_plan is not None,
    )


def _prediction(prediction_id: str, read: Read) -> tuple[dict[str, Any], list[float]]:
    try:
        found = read(PREDICTIONS, where=[("id", "=", prediction_id)]).to_pylist()
    except StoreError as err:
        raise UnknownPrediction(f"prediction {prediction_id!r} is not in the log: {err.message}") from err
    if not found:
        raise UnknownPrediction(
            f"prediction {prediction_id!r} is not in the log: take the id from an answer of /predict; the newest "
            "ones reach the log within seconds"
        )
    answered = next((p for p in found if p["role"] != "shadow"), found[0])
    x = answered.pop("x") or []
    answered["at"] = _micros(answered["at"])
    answered["key"] = None if answered["key"] is None else json.loads(answered["key"])
    answered["row"] = None if answered["row"] is None else json.loads(answered["row"])
    return answered, x


def _version(prediction: Mapping[str, Any], records: Records) -> ModelVersion | None:
    try:
        return records.get(prediction["model"], prediction["version"])
    except (UnknownModel, UnknownVersion):  # a model file that is served alone, without a registry
        return None


def _version_facts(version: ModelVersion) -> dict[str, Any]:
    return {
        "stage": version.stage.value,
        "kind": version.kind,
        "digest": version.digest,
        "threshold": version.threshold,
        "metrics": version.metrics,
        "created_s": version.created_s,
        "history": list(version.history),
    }


def _training(training_id: str, records: Records) -> dict[str, Any]:
    events = records.events("training.*", subject=training_id) if training_id else []
    return {"id": training_id, **{e["kind"]: e["data"] for e in events}}


def _plan_of_ledger(pipeline: str, records: Records) -> dict[str, Any] | None:
    made = [e for e in records.events("training_set.made") if e["pipeline"] == pipeline and "plan" in e["data"]]
    if not made:
        return None
    plan: dict[str, Any] = made[-1]["data"]["plan"]
    return plan


def _features(x: list[float], manifest: Manifest | None, plan: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    hashes: Mapping[str, str] = {}
    names: list[str] = [f"x{i}" for i in range(len(x))]
    if manifest is not None and len(manifest.features) == len(x):
        names, hashes = list(manifest.features), manifest.feature_hashes
    elif plan is not None:
        planned = [f"{v['name']}.{n}" for v in plan["views"] for n, _ in v["features"]]
        names = planned if len(planned) == len(x) else names
    return {
        n: {"value": None if v is None or v != v else v, "hash": hashes.get(n, "")}
        for n, v in zip(names, x, strict=True)
    }


def _sources(
    prediction: Mapping[str, Any], plan: Mapping[str, Any], read: Read, records: Records
) -> tuple[SourceRows, ...]:
    found = []
    row, sources = prediction["row"] or {}, plan["sources"]
    for view in plan["views"]:
        if "source" in view and all(c in row for c in view["entity"]):
            entity = {c: row[c] for c in view["entity"]}
            reach = _Reach.of(view, prediction)
            version = _lake_version(view["source"], records, prediction["wall_s"])
            found.append(
                _rows_behind(view["name"], (view["source"], sources[view["source"]]), version, entity, reach, read)
            )
    label, key = plan["row"], prediction["key"]
    if key is not None:
        columns = sources[label][0]
        entity = dict(zip(columns, key, strict=True))
        version = _lake_version(label, records, None)  # the row itself may come after its prediction
        found.append(_rows_behind("label", (label, sources[label]), version, entity, None, read))
    return tuple(each for each in found if each is not None)


@dataclass(frozen=True, slots=True)
class _Reach:
    """Which rows a view may look at: known at `at`, and with an event time after `since`."""

    at: int
    since: int | None
    inclusive: bool

    @classmethod
    def of(cls, view: Mapping[str, Any], prediction: Mapping[str, Any]) -> _Reach:
        expressions = [from_json(tree) for _, tree in view["features"]]
        widths = [w.width_us for e in expressions for w in e.windows()]
        newest_only = any(not e.windows() for e in expressions)
        if newest_only:
            widths = [] if view["max_age_us"] is None else [*widths, view["max_age_us"]]
        at = int(prediction["at"])
        return cls(at, at - max(widths) if widths else None, newest_only)


def _rows_behind(
    name: str,
    source: tuple[str, list[Any]],
    version: int | None,
    entity: Mapping[str, Any],
    reach: _Reach | None,
    read: Read,
) -> SourceRows | None:
    table, (_, time, known_at, dtypes) = source
    if version is None:
        return None
    if None in entity.values():  # an unknown entity has no rows
        return SourceRows(view=name, source=table, lake_version=version, entity=dict(entity), rows=0, newest=())
    where = [(c, "=", _moment(v) if dtypes[c] == "timestamp" else v) for c, v in entity.items()]
    if reach is not None:
        where += [(c, "<=", _moment(reach.at)) for c in dict.fromkeys([time, known_at or time])]
        if reach.since is not None:
            where.append((time, ">=" if reach.inclusive else ">", _moment(reach.since)))
    order = [(c, "descending") for c in dict.fromkeys([time, known_at or time])]
    rows = read(table, version=version, where=where, or_later=True).sort_by(order)
    newest = [{c: _plain(v) for c, v in r.items()} for r in rows.slice(0, MAX_ROWS).to_pylist()]
    return SourceRows(
        view=name, source=table, lake_version=version, entity=dict(entity), rows=rows.num_rows, newest=tuple(newest)
    )


def _lake_version(source: str, records: Records, wall_s: float | None) -> int | None:
    """Version of a source's table that was the newest at a moment of wall time; None: it had none."""
    versions = [
        e["data"]["lake_version"]
        for e in records.events("rows.appended", subject=source)
        if wall_s is None or e["wall_s"] <= wall_s
    ]
    return max(versions, default=None)


def _moment(value: Any) -> datetime:
    """µs UTC or ISO text as the datetime that an Arrow filter compares with."""
    if isinstance(value, str):
        return datetime.fromisoformat(value)
    return datetime.fromtimestamp(value // 1_000_000, UTC).replace(microsecond=value % 1_000_000)


def _micros(moment: datetime) -> int:
    whole = int(moment.replace(microsecond=0).timestamp())
    return whole * 1_000_000 + moment.microsecond


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _without(facts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in facts.items() if k not in names}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 400 else f"{text[:400]}…"
