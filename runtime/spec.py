"""What a user declares in a pipeline file: plain frozen values, checked where they are written.

Imports nothing heavy, so that a wrong file fails in milliseconds, before anything starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from raymill.runtime.column_spec import VALUE, Col, DType
from raymill.runtime.expressions import duration_us
from raymill.runtime.migrations import AddColumn, DropColumn, RenameColumn, Widen
from raymill.runtime.source_spec import DeltaTable, Directory, Duration, Name, RedisStream, Source, parents_first
from raymill.runtime.stores import Stores
from raymill.runtime.view_spec import (
    Feature,
    FeatureView,
    Label,
    Lookup,
    OnDemand,
    definitions,
    described,
    feature_hash,
)

__all__ = [
    "AddColumn",
    "Budget",
    "Col",
    "Cost",
    "DType",
    "DeltaTable",
    "Directory",
    "Drills",
    "DropColumn",
    "Feature",
    "FeatureView",
    "Label",
    "Lookup",
    "Monitor",
    "OnDemand",
    "Pipeline",
    "RedisStream",
    "RenameColumn",
    "Replay",
    "Serve",
    "Source",
    "Stores",
    "Train",
    "Widen",
    "definitions",
    "described",
]


@dataclass(frozen=True, config=VALUE)
class Train:
    """How the model is trained."""

    model: Callable[[int], Any]
    """Called with the number of inputs, returns a `torch.nn.Module` from [rows, n] float32 to logits [rows]."""
    engine: Literal["deepspeed"] = "deepspeed"
    """What runs the step."""
    ranks: Annotated[int, Field(ge=1)] = 2
    """Ranks the gang starts with."""
    min_ranks: Annotated[int, Field(ge=1)] = 1
    """Fewest ranks it goes on with when nodes are lost."""
    gpus_per_rank: Annotated[float, Field(ge=0)] = 0
    """GPUs of a rank's lease (virtual ones on a machine without)."""
    epochs: Annotated[int, Field(ge=1)] = 3
    """Passes over the training set."""
    batch_rows: Annotated[int, Field(ge=1)] = 1024
    """Rows of a global step, over all ranks; it stays when ranks come and go."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the optimizer, unless `config` holds another."""
    config: str | dict[str, Any] | None = None
    """DeepSpeed's own configuration, a dict or a JSON file beside the pipeline file."""
    history: Duration | None = None
    """Length of the past that is trained and evaluated on; absent: all of it."""
    evaluate_on: Duration = "28d"
    """Length of the newest labelled slice that is held out, for evaluation and for the gate."""
    seed: int = 13
    """Seed of weights and of the data order."""
    spot: bool = False
    """Whether ranks beyond the first may run on spot nodes."""
    media: tuple[str, ...] = ()
    """Columns of media of the label's source that the model is trained on beside the features; not served yet."""
    decode: Callable[[Any], Any] | None = None
    """Gets an Arrow table of these columns and returns float32 [rows, k], which the model's inputs end with."""

    @model_validator(mode="after")
    def _ranks_fit(self) -> Train:
        if bool(self.media) != (self.decode is not None):
            raise ValueError("media and decode belong together: name the columns, and the function that reads them")
        if self.min_ranks > self.ranks:
            raise ValueError(f"min_ranks={self.min_ranks} is more than ranks={self.ranks}: lower min_ranks")
        if self.history and duration_us(self.history) <= duration_us(self.evaluate_on):
            raise ValueError(f"history={self.history} leaves nothing to train on beside evaluate_on={self.evaluate_on}")
        return self


@dataclass(frozen=True, config=VALUE)
class Serve:
    """How the model is served."""

    p99: Duration = "50ms"
    """Latency wanted of 99 of 100 requests."""
    min_replicas: Annotated[int, Field(ge=0)] = 1
    """Fewest replicas; 0: none while nobody asks, and whoever asks then is held until the first has started."""
    max_replicas: Annotated[int, Field(ge=1)] = 1
    """Most replicas; those between follow the load, as far as the pool grants them."""
    warm: Annotated[int, Field(ge=0)] = 0
    """Replicas beyond those that the load needs: they take their part of it, and no start has to be waited for."""
    cooldown: Duration = "30s"
    """How long the load must have been low before a replica is taken away."""
    idle: Duration = "5m"
    """With `min_replicas=0`: how long nobody must have asked before the last replica is taken away."""
    anywhere: bool = False
    """Whether replicas may run on other hosts than the head's; lake and online store must then be URLs."""
    max_batch_rows: Annotated[int, Field(ge=1)] = 1024
    """Rows of the largest batch given to the model at once."""
    max_queue_rows: Annotated[int, Field(ge=1)] = 65536
    """Rows that may wait in a replica; above that it answers 429."""
    canary_weight: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of requests that a canary answers."""
    memory_mib: Annotated[int, Field(ge=1)] = 2048
    """What the programs of all models of a replica may take in memory; beyond it those not asked for lately leave it,
    and come back when they are. Where the models of a replica differ in this, the largest counts."""

    @model_validator(mode="after")
    def _replicas_fit(self) -> Serve:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}")
        if self.warm and self.max_replicas < max(self.min_replicas, 1) + self.warm:
            raise ValueError(
                f"max_replicas={self.max_replicas} leaves no room for warm={self.warm} beside the first "
                f"{max(self.min_replicas, 1)}: raise it"
            )
        return self


@dataclass(frozen=True, config=VALUE)
class Cost:
    """What a wrong prediction costs the business."""

    missed: Annotated[float, Field(ge=0)]
    """Money lost by a positive that was not predicted."""
    false_alarm: Annotated[float, Field(ge=0)]
    """Money lost by a predicted positive that did not come."""

    @property
    def threshold(self) -> float:
        """Probability above which to act costs less in expectation than not to."""
        total = self.missed + self.false_alarm
        return self.false_alarm / total if total else 0.5


@dataclass(frozen=True, config=VALUE)
class Monitor:
    """How the live model is watched, and when it is retrained."""

    cost: Cost
    """Costs of wrong predictions."""
    unit: str = "USD"
    """Currency of every amount."""
    sample: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of predictions that the monitor looks at."""
    every: Duration = "28d"
    """Event time between two verdicts."""
    min_labels: Annotated[int, Field(ge=1)] = 2000
    """Labelled predictions that a verdict needs."""
    tolerance: Annotated[float, Field(ge=0)] = 0.25
    """Regret, money per prediction, below which nothing is done however sure it is."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence that a verdict and the gate need."""
    canary_for: Duration = "5d"
    """Event time that a canary is watched before it is promoted or rolled back."""
    max_retrains: Annotated[int, Field(ge=0)] = 4
    """Retrains in one run."""


@dataclass(frozen=True, config=VALUE)
class Budget:
    """What the pipeline may spend."""

    usd_per_day: Annotated[float, Field(gt=0)]
    """What its nodes should cost over a wall-clock day; `raymill plan` says how many hours of running that is."""


@dataclass(frozen=True, config=VALUE)
class Drills:
    """Faults that a run brings about on purpose, to show that it gets over them."""

    reclaim_spot: bool = False
    """Take the gang's spot node away, with notice, in the middle of the first retrain that has one."""
    kill_replica_on: str | None = None
    """Event date (YYYY-MM-DD) on which the serving replica's process gets SIGKILL under load."""
    bad_rows: Callable[[], list[tuple[str, str, Any]]] | None = None
    """Gives (source, event date, Arrow table) of faulty rows to mix in; counted apart from real faults."""


@dataclass(frozen=True, config=VALUE)
class Replay:
    """How recorded rows are played through the loop as if they came now."""

    history_until: str
    """Event date (YYYY-MM-DD): rows before it are history, ingested at once and trained on."""
    until: str | None = None
    """Event date at which the replay ends; absent: when the rows end."""
    rows_per_request: Annotated[int, Field(ge=1)] = 256
    """Rows of one request to the endpoint."""
    drills: Drills = field(default_factory=Drills)
    """Faults brought about on purpose."""


@dataclass(frozen=True, config=VALUE)
class Pipeline:
    """One model, from its rows to its monitored endpoint."""

    name: Name
    """Name of the pipeline and of the served model."""
    views: list[FeatureView | OnDemand]
    """Features, in the order of the model's inputs."""
    label: Label
    """What is predicted."""
    train: Train
    """How it is trained."""
    monitor: Monitor
    """How it is watched."""
    serve: Serve = field(default_factory=Serve)
    """How it is served."""
    stores: Stores = field(default_factory=Stores)
    """Where its rows and online features are kept."""
    budget: Budget | None = None
    """What it may spend."""
    replay: Replay | None = None
    """How its recorded rows are played; absent: rows come by themselves."""

    @model_validator(mode="after")
    def _fits_together(self) -> Pipeline:
        names = [v.name for v in self.views]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"views {twice} are declared twice: give each its own name")
        row = self.label.source.schema
        taken = [c for c in ("id", "at") if c in row]
        if taken:
            raise ValueError(
                f"source {self.label.source.name!r}: a request has fields {taken} of its own: rename yours"
            )
        lost = [c for c in self.label.value.columns() if c not in row]
        if lost:
            raise ValueError(f"label {self.label.name!r} reads {lost}, which source {self.label.source.name!r} lacks")
        for view in self.views:
            needs = (
                view.row_columns
                if isinstance(view, FeatureView)
                else tuple(dict.fromkeys(c for e in definitions(view).values() for c in e.columns()))
            )
            lost = [c for c in needs if c not in row]
            if lost:
                raise ValueError(
                    f"view {view.name!r} needs {lost} of the label's rows, which {self.label.source.name!r} lacks"
                )
        parents_first(self.sources)
        strange = [c for c in self.train.media if c not in row or row[c].dtype != "media"]
        if strange:
            raise ValueError(f"train.media names {strange}, no columns of media of source {self.label.source.name!r}")
        media = [c for c in (*self.label.value.columns(), *self.request_columns) if row[c].dtype == "media"]
        if media:
            raise ValueError(f"columns {media} are media: a feature or label can not be computed from them")
        if not self.feature_names:
            raise ValueError(f"pipeline {self.name!r} has no features: give at least one view")
        return self

    @property
    def feature_names(self) -> tuple[str, ...]:
        """`<view>.<feature>` of every model input, in order."""
        return tuple(f"{v.name}.{n}" for v in self.views for n in definitions(v))

    @property
    def described(self) -> dict[str, Feature]:
        """Feature name → expression, description, unit, owner, tags and whether it is sensitive."""
        return {f"{v.name}.{n}": f for v in self.views for n, f in described(v).items()}

    @property
    def feature_hashes(self) -> dict[str, str]:
        """Feature name → content hash of its definition: the feature's version."""
        return {f"{v.name}.{n}": feature_hash(v, e) for v in self.views for n, e in definitions(v).items()}

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source that is read, each once, the label's first."""
        found = {self.label.source.name: self.label.source}
        for view in self.views:
            if isinstance(view, FeatureView):
                for source in (view.source, *(k.source for k in view.lookups)):
                    found.setdefault(source.name, source)
        return tuple(found.values())

    @property
    def request_columns(self) -> tuple[str, ...]:
        """Columns of the label's row that a request must carry for its features."""
        found: dict[str, None] = {}
        for view in self.views:
            for c in (
                view.row_columns
                if isinstance(view, FeatureView)
                else [c for e in definitions(view).values() for c in e.columns()]
            ):
                found.setdefault(c)
        return tuple(found)
