"""Which version answers which row: the values in Serve's `user_config`, and the pure choice by id.

Invariants: the same id gets the same version as long as the routes stay; a canary whose weight grows keeps the ids
it had; a shadow never answers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from raymill.runtime.errors import SpecError
from raymill.runtime.expressions import digest, duration_us
from raymill.runtime.messages import ModelVersion, Stage
from raymill.runtime.spec import DType, Pipeline
from raymill.runtime.stores import Stores, declared


class Role(StrEnum):
    """What a version does inside the replica."""

    LIVE = "live"
    CANARY = "canary"
    SHADOW = "shadow"
    """Computes every row too; its answers are logged and thrown away."""

    @property
    def answers(self) -> bool:
        """Whether its answers reach a caller."""
        return self is not Role.SHADOW


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A version and its part of the traffic."""

    version: int
    """Number in the registry."""
    digest: str
    """SHA-256 of the program, by which the records actor hands it out."""
    role: Role
    """What it does."""
    weight: float = 1.0
    """Share of the ids it answers, relative to the other answering versions."""
    threshold: float = 0.5
    """Probability above which the business acts."""


@dataclass(frozen=True, slots=True)
class ColumnForm:
    """Type of a request column."""

    dtype: DType
    nullable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A served model: its inputs, the rows it takes, and its versions."""

    name: str
    """Name on the wire; a pipeline's model has the pipeline's name."""
    label: str
    """Name of the probability in an answer."""
    inputs: tuple[str, ...]
    """Names of the model's inputs, in order."""
    routes: tuple[Route, ...]
    """Versions beside each other."""
    plan: Any = None
    """`FeaturePlan` as JSON; null: the model takes ready vectors only."""
    stores: Stores = field(default_factory=Stores)
    """Where its features are read and its predictions go."""
    columns: Mapping[str, ColumnForm] = field(default_factory=dict)
    """Columns a request row may have (those of the label's source)."""
    required: tuple[str, ...] = ()
    """Columns it must have."""
    key: tuple[str, ...] = ()
    """Columns that identify the row, by which a label finds its prediction."""
    max_batch_rows: int = 1024
    """Rows of the largest batch."""
    max_queue_rows: int = 65536
    """Rows that may wait."""
    canary_weight: float = 0.2
    """Weight that a canary gets."""
    memory_mib: int = 2048
    """What the programs of all models of a replica may take in memory; where models differ, the largest counts."""
    p99_ms: float = 50.0
    """Latency wanted of 99 of 100 requests."""
    outputs: int = 1
    """Numbers that it answers a row with; nobody declares it, loaded versions tell."""


def spec_of(
    pipeline: Pipeline, plan: Any, versions: Iterable[ModelVersion], *, shadows: Sequence[int] = ()
) -> ModelSpec:
    """The served model of a pipeline: its live version, its canary if there is one, and the shadows named.

    Args:
        pipeline: what was declared.
        plan: `FeaturePlan.of(pipeline).to_json()`.
        versions: the model's versions in the registry; only live, canary and shadow ones are taken.
        shadows: numbers of versions that compute along without answering.
    """
    schema = pipeline.label.source.schema
    return ModelSpec(
        name=pipeline.name,
        label=pipeline.label.name,
        inputs=pipeline.feature_names,
        routes=_routes(versions, pipeline.serve.canary_weight, shadows),
        plan=plan,
        stores=pipeline.stores,
        columns={c: ColumnForm(col.dtype, col.nullable) for c, col in schema.items()},
        required=pipeline.request_columns,
        key=tuple(pipeline.label.source.key),
        max_batch_rows=pipeline.serve.max_batch_rows,
        max_queue_rows=pipeline.serve.max_queue_rows,
        canary_weight=pipeline.serve.canary_weight,
        memory_mib=pipeline.serve.memory_mib,
        p99_ms=duration_us(pipeline.serve.p99) / 1000,
    )


def reroute(model: ModelSpec, versions: Iterable[ModelVersion]) -> ModelSpec:
    """The served model, its versions as the registry has them now; what shadowed goes on shadowing."""
    shadows = [r.version for r in model.routes if not r.role.answers]
    return replace(model, routes=_routes(versions, model.canary_weight, shadows))


def without(model: ModelSpec, version: int) -> ModelSpec:
    """The served model without a version; its share goes to those that stay, in proportion."""
    return replace(model, routes=tuple(r for r in model.routes if r.version != version))


def _routes(versions: Iterable[ModelVersion], canary_weight: float, shadows: Sequence[int]) -> tuple[Route, ...]:
    versions = list(versions)
    canary = canary_weight if any(v.stage is Stage.CANARY for v in versions) else 0.0
    roles = {Stage.LIVE: (Role.LIVE, 1.0 - canary), Stage.CANARY: (Role.CANARY, canary)}
    found = []
    for v in versions:
        role, weight = roles.get(v.stage, (Role.SHADOW, 0.0))
        if role.answers or (v.version in shadows and not v.stage.is_terminal):
            found.append(Route(version=v.version, digest=v.digest, role=role, weight=weight, threshold=v.threshold))
    return tuple(found)


def to_user_config(models: Iterable[ModelSpec]) -> dict[str, Any]:
    """The JSON value that goes into Serve's `user_config`."""
    return {
        "models": {
            m.name: {
                "label": m.label,
                "inputs": list(m.inputs),
                "versions": {
                    str(r.version): {
                        "digest": r.digest,
                        "role": str(r.role),
                        "weight": r.weight,
                        "threshold": r.threshold,
                    }
                    for r in m.routes
                },
                "plan": m.plan,
                "stores": declared(m.stores),
                "columns": {c: f.dtype + ("?" if f.nullable else "") for c, f in m.columns.items()},
                "required": list(m.required),
                "key": list(m.key),
                "max_batch_rows": m.max_batch_rows,
                "max_queue_rows": m.max_queue_rows,
                "canary_weight": m.canary_weight,
                "memory_mib": m.memory_mib,
                "p99_ms": m.p99_ms,
            }
            for m in models
        }
    }


def from_user_config(config: Mapping[str, Any]) -> dict[str, ModelSpec]:
    """Model name → what `to_user_config` was given.

    Raises:
        SpecError: the value lacks a part or has a wrong one.
    """
    try:
        return {name: _model_of(name, m) for name, m in config["models"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise SpecError(
            f"user_config of the endpoint does not fit ({type(err).__name__}: {err}): write it with `to_user_config`"
        ) from err


def _model_of(name: str, m: Mapping[str, Any]) -> ModelSpec:
    routes = [
        Route(
            version=int(number),
            digest=r["digest"],
            role=Role(r["role"]),
            weight=float(r.get("weight", 1.0)),
            threshold=float(r.get("threshold", 0.5)),
        )
        for number, r in m["versions"].items()
    ]
    return ModelSpec(
        name=name,
        label=m["label"],
        inputs=tuple(m["inputs"]),
        routes=tuple(routes),
        plan=m.get("plan"),
        stores=Stores(**m.get("stores", {})),
        columns={c: ColumnForm(t.removesuffix("?"), t.endswith("?")) for c, t in m.get("columns", {}).items()},
        required=tuple(m.get("required", ())),
        key=tuple(m.get("key", ())),
        max_batch_rows=int(m.get("max_batch_rows", 1024)),
        max_queue_rows=int(m.get("max_queue_rows", 65536)),
        canary_weight=float(m.get("canary_weight", 0.2)),
        memory_mib=int(m.get("memory_mib", 2048)),
        p99_ms=float(m.get("p99_ms", 50.0)),
    )


def answer_shape(rows: int, outputs: int) -> tuple[int, ...]:
    """What the answer to so many rows has: [rows], or [rows, k] of a model with k > 1 numbers a row."""
    return (rows,) if outputs == 1 else (rows, outputs)


def odd_ones(spec: ModelSpec, outputs: Mapping[int, int]) -> tuple[int, dict[int, str]]:
    """Numbers a row that the model answers with, and the versions that answer with another number, with the reason.

    The live version is right (the one with the largest share); where none is loaded, the first that is.

    Args:
        spec: the model.
        outputs: version → numbers a row, of those that are loaded.
    """
    loaded = [r for r in spec.routes if r.version in outputs]
    first = max(loaded, key=lambda r: (r.role is Role.LIVE, r.weight), default=None)
    if first is None:
        return 1, {}
    wanted = outputs[first.version]
    beside = (
        f"version {first.version} beside it with {wanted}, and callers may meet either: serve it by another name, or "
        "promote it at once"
    )
    odd = {v: f"it answers with {k} numbers a row, {beside}" for v, k in outputs.items() if k != wanted}
    return wanted, odd


def generation(config: Mapping[str, Any]) -> str:
    """Name of a `user_config` by its content: what a replica acknowledges."""
    return digest(config)


def choose(ids: Sequence[str], routes: Sequence[Route]) -> npt.NDArray[np.int64]:
    """Index into `routes` of the version that answers each id.

    Canaries come first on the line from 0 to 1, so that one whose weight grows keeps the ids it has.

    Raises:
        ValueError: no route answers.
    """
    order = sorted(
        (i for i, r in enumerate(routes) if r.role.answers and r.weight > 0),
        key=lambda i: (routes[i].role is not Role.CANARY, routes[i].version),
    )
    if not order:
        raise ValueError("no version answers")
    places = np.asarray(order, dtype=np.int64)
    if len(order) == 1:
        return np.full(len(ids), places[0], dtype=np.int64)
    weights = np.array([routes[i].weight for i in order])
    edges = np.cumsum(weights / weights.sum())[:-1]
    points = np.fromiter((zlib.crc32(i.encode()) for i in ids), dtype=np.float64, count=len(ids)) / 2**32
    return places[np.searchsorted(edges, points, side="right")]
