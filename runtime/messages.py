"""The values that cross actor edges: frozen, keyword-only, a sentence under each field.

`at` is event time, microseconds UTC; `wall_s` is wall time, seconds since 1970. Arrow tables cross as
`ray.ObjectRef`s inside these messages (field names end in `_ref`); where an actor is used without Ray, the
table itself stands there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One entry of the ledger, before it has a place in it."""

    kind: str
    """What happened, `<noun>.<verb in the past>`: `rows.appended`, `lease.granted`, `model.promoted`."""
    subject: str
    """What it happened to: a table, node, lease, run, `model/version`."""
    pipeline: str = ""
    """Pipeline it belongs to; empty: the cluster."""
    run: str = ""
    """Run it belongs to; empty: none."""
    at: int | None = None
    """Event time it concerns, µs UTC."""
    wall_s: float
    """Wall time at which it happened, seconds since 1970."""
    data: dict[str, Any] = field(default_factory=dict)
    """JSON values; which ones, the writer of the kind says."""
    key: str = ""
    """Idempotency key: an event whose key is in the ledger already is not written again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """What became of one batch of rows."""

    source: str
    """Source, and lake table, that it went to."""
    batch_id: str
    """Idempotency key of the batch."""
    lake_version: int
    """Version of the lake table that holds it."""
    accepted: int
    """Rows appended."""
    quarantined: dict[str, int]
    """Reason → rows that went to the quarantine table."""
    duplicate: bool
    """Whether this batch had been appended before (then nothing was written)."""
    rows_ref: Any
    """The accepted rows, Arrow; of a batch that comes again also those that were refused then and reingested since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a training set was made of; enough to make it again."""

    pipeline: str
    """Pipeline whose features these are."""
    lake_versions: dict[str, int]
    """Source → version of its lake table that was read."""
    features: tuple[str, ...]
    """Names of the model's inputs, in order."""
    feature_hashes: dict[str, str]
    """Feature → content hash of its definition."""
    label: str
    """Name of the label."""
    label_rule: list[Any]
    """The label's expression, as JSON."""
    start_at: int
    """First moment (inclusive), µs UTC."""
    end_at: int
    """Last moment (exclusive), µs UTC."""
    known_until: int
    """Labels that became known later than this were left out, µs UTC."""
    rows: int
    """Labelled rows."""
    without_label: int
    """Rows of the range whose label never comes or is not known yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """Rows to train on, as Arrow in the object store."""

    manifest: Manifest
    """What it was made of."""
    train_ref: Any
    """Arrow table: `key` string, `at` timestamp, `x` fixed_size_list<float32>[n] (NaN: unknown), `known`
    fixed_size_list<bool>[n], its mask, `y` float32."""
    evaluate_ref: Any
    """The later slice that is held out, same columns."""


class Purpose(StrEnum):
    """What a lease is for; the cost is split by it."""

    TRAINING = "training"
    SERVING = "serving"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    """Ask the pool for ranks or replicas, all or nothing."""

    owner: str
    """Who asks: a run, gang or application."""
    purpose: Purpose
    """What for."""
    count: int
    """Bundles wanted."""
    min_count: int = 1
    """Fewest bundles that are worth having."""
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    """Resources of one bundle."""
    spot: bool = False
    """Whether bundles beyond the first may lie on spot nodes."""
    tenant: str = "default"
    """Who pays."""
    pipeline: str = ""
    """Pipeline it is for; the cost is split by it."""
    run: str = ""
    """Run it is for."""
    request_id: str = ""
    """Idempotency key: the same id asked again gives the leases that were granted. Empty: one is made."""
    job_id: str = ""
    """Ray job whose end frees the leases, hexadecimal; empty: they stay until they are released."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One granted bundle: a placement group for a rank, a grant in the ledger for a replica."""

    lease_id: str
    """Its name in ledger and cost."""
    owner: str
    """Who holds it."""
    purpose: Purpose
    """What for."""
    node_id: str
    """Ray node id; empty for a replica's grant, whose node Serve chooses."""
    market: str
    """`reserved` or `spot`; empty where the cluster has no markets."""
    placement_group: Any
    """Ray placement group with the single bundle; None for a replica's grant."""
    resources: dict[str, float]
    """What the bundle holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """The pool's answer: here they are (possibly fewer than asked, at least `min_count`)."""

    leases: tuple[Lease, ...]
    """One per bundle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """The pool's answer: not now, and why."""

    reason: str
    """In words, for `raymill status`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A node will be taken away."""

    node_id: str
    """Ray node id."""
    deadline_s: float
    """Wall time at which it goes."""
    reason: str
    """`spot` reclaim, idle, failed hardware …"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """How one epoch of training went."""

    epoch: int
    """Number, from 0."""
    train_loss: float
    """Mean loss over its steps."""
    evaluate_log_loss: float
    """Log-loss on the held-out slice."""
    evaluate_auc: float
    """Area under the ROC curve on the held-out slice."""
    seconds: float
    """Wall time it took."""
    ranks: int
    """Ranks at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GangChange:
    """The gang lost or won ranks in mid-training."""

    step: int
    """Global step at which it went on."""
    before: int
    """Ranks before."""
    after: int
    """Ranks after."""
    reason: str
    """`spot notice`, `rank lost`, `rank joined`."""
    steps_lost: int
    """Steps that had to be done again."""
    seconds: float
    """From the last step before to the first after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """A finished training."""

    training_id: str
    """Its name in the ledger."""
    program: bytes
    """`torch.export` program, [rows, n] float32 → probability [rows] float32; batch dimension dynamic."""
    epochs: tuple[EpochMetrics, ...]
    """One per epoch."""
    changes: tuple[GangChange, ...]
    """Ranks lost and won on the way."""
    steps: int
    """Global steps done."""
    data_order: str
    """Hash over the row order that was trained on: the same whatever the gang went through."""
    seconds: float
    """Wall time, gang formation included."""


class Stage(StrEnum):
    """Life of a model version."""

    CANDIDATE = "candidate"
    CANARY = "canary"
    LIVE = "live"
    RETIRED = "retired"
    REJECTED = "rejected"
    """Failed the gate or its canary; stays out for good."""

    @property
    def is_terminal(self) -> bool:
        """Whether nothing follows (a retired version may come back by a roll back)."""
        return self is Stage.REJECTED


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """A version in the registry."""

    model: str
    """Model it is a version of (the pipeline's name)."""
    version: int
    """1, 2, 3 …"""
    stage: Stage
    """Where in its life it is."""
    kind: str
    """`baseline` or `model`."""
    digest: str
    """SHA-256 of the program; names the file."""
    manifest: Manifest | None
    """What it was trained on; null: registered by hand."""
    training_id: str
    """Training that made it."""
    metrics: dict[str, float]
    """On its evaluation slice."""
    threshold: float
    """Probability above which the business acts."""
    created_s: float
    """Wall time of its registration."""
    history: tuple[dict[str, Any], ...]
    """Every change of stage: `{stage, wall_s, at, reason}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the drift monitor says about one period, in money."""

    model: str
    """Model watched."""
    version: int
    """Live version in the period."""
    start_at: int
    """Period's first moment, µs UTC."""
    end_at: int
    """Period's end, µs UTC."""
    predictions: int
    """Predictions of the period that were looked at."""
    labelled: int
    """Of them, those whose label is known."""
    cost: float
    """Realised cost of the live version over the labelled ones."""
    best_alternative: str
    """Name of the cheapest known alternative."""
    best_alternative_cost: float
    """What it would have cost on the same rows."""
    regret: float
    """Cost minus that, per prediction."""
    regret_low: float
    """Lower confidence bound of it."""
    auc: float
    """Of the live version; NaN if a class is missing."""
    input_drift: dict[str, float]
    """Feature → PSI against the training reference (a diagnosis, never the alarm)."""
    output_drift: float
    """PSI of the predicted probability."""
    retrain: bool
    """Whether a retrain is worth it."""
    reason: str
    """Why, in words with figures."""
