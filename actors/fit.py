"""One training under way: what the driver of a gang does between the chunks of steps that its ranks run.

Invariants:
- a step counts once all ranks agree on it; after a failure the training goes on from the newest state that is left,
  a survivor's before the checkpoint's;
- what a checkpoint holds (state, epochs, changes) belongs to one and the same step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from raymill.actors.checkpoint import CheckpointFolder, decode
from raymill.actors.data_order import Schedule
from raymill.actors.ranks import GangBroken, Patience, Rank, Ranks
from raymill.actors.trainer import Position
from raymill.runtime.errors import StoreError, TrainingError
from raymill.runtime.messages import EpochMetrics, Event, GangChange, TrainingSet, TrainResult
from raymill.runtime.spec import Train

_CHUNK_S = 0.25
"""Time between two looks at the notices; a chunk has as many steps as fit."""
_CHECKPOINT_S = 60.0
"""Longest time between two checkpoints, where an epoch lasts longer."""
_BARREN = 3
"""Failures in a row without a step done, or in one epoch without a rank lost: more are the model's fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be trained, and who hears of it."""

    training_set: TrainingSet
    """The rows."""
    training_id: str
    """Name of the training, its checkpoint and its ledger entries."""
    on_epoch: Callable[[EpochMetrics], None] | None = None
    """Called after each epoch, once its checkpoint is written."""
    on_step: Callable[[int, int], None] | None = None
    """Called after each chunk: steps done, steps of the whole training."""
    record: Callable[[list[Event]], None] | None = None
    """The ledger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loss:
    """Ranks that went, until the first step without them."""

    before: int
    reason: str
    steps_lost: int
    last_s: float
    """Wall time of the last step with them."""


class Fit:
    """One training."""

    def __init__(
        self, asked: Asked, ranks: Ranks, train: Train, patience: Patience, checkpoints: CheckpointFolder
    ) -> None:
        self._asked, self._id = asked, asked.training_id
        self._ranks, self._train, self._patience, self._checkpoints = ranks, train, patience, checkpoints
        self._tables = [_reference(t) for t in (asked.training_set.train_ref, asked.training_set.evaluate_ref)]
        self._loaded: set[str] = set()
        self._schedule = Schedule(rows=0, batch_rows=train.batch_rows, epochs=train.epochs, seed=train.seed)
        self._epochs: list[EpochMetrics] = []
        self._changes: list[GangChange] = []
        self._at = Position(step=0, order="")
        self._state: Any = None
        self._loss: _Loss | None = None
        self._formed = 0
        self._chunk = 1
        self._barren = self._faults = 0
        self._began_s = self._saved_s = self._epoch_began_s = time.monotonic()

    def run(self) -> TrainResult:
        """Until it is done, or can not be."""
        self._restore(self._checkpoints.read(self._id))
        for metrics in self._epochs:  # a kill may have come between an epoch's checkpoint and its ledger entry
            self._tell_epoch(metrics)
        broken: GangBroken | None = None
        while True:
            try:
                if broken is not None:
                    self._recover(broken)
                    broken = None
                if not self._formed:
                    self._form()
                elif self._at.step >= (len(self._epochs) + 1) * self._schedule.epoch_steps:
                    self._close_epoch()
                elif self._at.step < self._schedule.steps:
                    if not self._heed_notices():
                        self._advance()
                else:
                    return self._finish()
            except GangBroken as again:
                broken = again

    def _form(self) -> None:
        """Group, tables and engines, on the ranks that there are."""
        self._refill()
        self._ranks.form()
        self._load()
        positions = self._ranks.begin(self._schedule, self._state)
        self._at = self._agreed(positions)
        self._formed, self._chunk = len(self._ranks), 1

    def _refill(self) -> None:
        lacking = self._train.min_ranks - len(self._ranks)
        if lacking <= 0:
            return
        count = self._train.ranks - len(self._ranks)
        why = self._ranks.recruit(count, lacking, self._patience.replacement_s)
        if len(self._ranks) < self._train.min_ranks:
            raise TrainingError(
                f"training {self._id} stopped at step {self._at.step}: {len(self._ranks)} ranks are left of at least "
                f"{self._train.min_ranks}, and none came within {self._patience.replacement_s:.0f} s ({why}); its "
                "checkpoint is kept: run again when there are nodes, and it goes on from there"
            )

    def _load(self) -> None:
        """Give the tables to the ranks that have not got them."""
        for rank in self._ranks.members:
            if rank.lease.lease_id not in self._loaded:
                rows, _ = self._ranks.ask(rank, "load", *self._tables)
                self._loaded.add(rank.lease.lease_id)
                self._schedule = replace(self._schedule, rows=rows)
        if not self._schedule.rows:
            raise TrainingError(f"training {self._id}: the training set has no rows: choose a longer range")

    def _advance(self) -> None:
        """One chunk of steps, on all ranks."""
        until = min(self._at.step + self._chunk, self._schedule.epoch_end(self._at.step))
        positions: list[Position] = self._ranks.ask_all("advance", lambda _: (until,))
        failed = [p.failed for p in positions if p.failed]
        if failed:
            raise GangBroken(failed[0])
        now = self._agreed(positions)
        if not now.finite:
            raise TrainingError(
                f"training {self._id}: the loss is not finite at step {now.step}: lower learning_rate, or look for "
                "absurd values in the features"
            )
        self._settle(now)
        steps = now.step - self._at.step
        if steps > 1 and now.last_s > now.first_s:
            self._chunk = max(1, int(_CHUNK_S * (steps - 1) / (now.last_s - now.first_s)))
        else:
            self._chunk = 2
        self._at, self._barren = now, 0
        if self._asked.on_step is not None:
            self._asked.on_step(now.step, self._schedule.steps)
        if time.monotonic() - self._saved_s > _CHECKPOINT_S:
            self._save()

    def _heed_notices(self) -> bool:
        """Checkpoint and let go of ranks whose node will be taken away; whether there were any."""
        doomed, reason = self._ranks.doomed()
        if not doomed:
            return False
        self._save()
        self._break_up(f"{reason} notice", steps_lost=0, last_s=self._at.last_s)
        self._ranks.drop(doomed)
        return True

    def _recover(self, broken: GangBroken) -> None:
        """Find the newest state that is left: a survivor's, else the checkpoint's."""
        self._barren += 1
        self._faults += not broken.lost
        if max(self._barren, self._faults) > _BARREN:
            raise TrainingError(f"training {self._id} fails at step {self._at.step} again and again: {broken.why}")
        self._ranks.drop(broken.lost)
        left = self._ranks.positions()
        best = max(left, key=lambda found: found[1].step, default=None)
        reached = max(self._at.step, best[1].step if best else 0)
        if best is not None and best[1].step >= self._at.step and best[0].lease.lease_id in self._loaded:
            self._save(best[0])
            resumed = best[1].step
        else:
            self._restore(self._checkpoints.read(self._id))
            resumed = self._at.step
        last_s = max([self._at.last_s, *(p.last_s for _, p in left)])
        reason = "rank lost" if len(self._ranks) < self._formed else ""
        self._break_up(reason, steps_lost=reached - resumed, last_s=last_s)

    def _break_up(self, reason: str, *, steps_lost: int, last_s: float) -> None:
        """The group is no more; `_settle` tells how it went on (without a reason no rank was lost)."""
        if self._loss is not None:
            self._loss = replace(self._loss, steps_lost=self._loss.steps_lost + steps_lost)
        elif self._formed and reason:
            self._loss = _Loss(before=self._formed, reason=reason, steps_lost=steps_lost, last_s=last_s or time.time())
        self._formed = 0

    def _settle(self, now: Position) -> None:
        """The first chunk after a loss is done: write the change down."""
        if self._loss is None:
            return
        change = GangChange(
            step=self._at.step,
            before=self._loss.before,
            after=self._formed,
            reason=self._loss.reason,
            steps_lost=self._loss.steps_lost,
            seconds=max(0.0, now.first_s - self._loss.last_s),
        )
        self._loss = None
        self._changes.append(change)
        self._tell("gang.changed", f"change/{len(self._changes)}", asdict(change))

    def _close_epoch(self) -> None:
        """Evaluate, checkpoint, tell."""
        loss, evaluate_loss, evaluate_auc = self._ranks.ask(self._ranks.members[0], "evaluate")
        now = time.monotonic()
        metrics = EpochMetrics(
            epoch=len(self._epochs),
            train_loss=loss,
            evaluate_log_loss=evaluate_loss,
            evaluate_auc=evaluate_auc,
            seconds=now - self._epoch_began_s,
            ranks=len(self._ranks),
        )
        self._epochs.append(metrics)
        self._epoch_began_s, self._faults = now, 0
        try:
            self._save()
        except GangBroken:
            self._epochs.pop()
            raise
        self._tell_epoch(metrics)
        if self._asked.on_epoch is not None:
            self._asked.on_epoch(metrics)

    def _tell_epoch(self, metrics: EpochMetrics) -> None:
        self._tell("training.epoch", f"epoch/{metrics.epoch}", _finite(asdict(metrics)))

    def _finish(self) -> TrainResult:
        program = self._ranks.ask(self._ranks.members[0], "program")
        seconds = time.monotonic() - self._began_s
        facts = {"steps": self._at.step, "data_order": self._at.order, "seconds": seconds, "ranks": len(self._ranks)}
        self._tell("training.finished", "finished", facts)
        return TrainResult(
            training_id=self._id,
            program=program,
            epochs=tuple(self._epochs),
            changes=tuple(self._changes),
            steps=self._at.step,
            data_order=self._at.order,
            seconds=seconds,
        )

    def _agreed(self, positions: list[Position]) -> Position:
        """The position of all ranks.

        Raises:
            TrainingError: they differ, which no failure of a node explains.
        """
        if len({(p.step, p.order) for p in positions}) != 1:
            raise TrainingError(f"training {self._id}: the ranks disagree on the rows they trained on: report this")
        return min(positions, key=lambda p: p.finite)

    def _save(self, rank: Rank | None = None) -> None:
        """Write a rank's state (the first's) as the checkpoint, and keep it to go on from."""
        facts = {
            "training": self._fingerprint(),
            "epochs": [asdict(e) for e in self._epochs],
            "changes": [asdict(c) for c in self._changes],
        }
        data = self._ranks.ask(rank or self._ranks.members[0], "state", facts)
        self._checkpoints.write(self._id, data)
        self._state, self._saved_s = ray.put(data), time.monotonic()

    def _restore(self, data: bytes | None) -> None:
        """Take a checkpoint's facts, or those of a beginning."""
        self._at, self._epochs, self._state = Position(step=0, order=""), [], None
        if data is None:
            return
        try:
            _, facts = decode(data)
        except StoreError as err:
            raise StoreError(f"training {self._id}, {self._checkpoints.path(self._id)}: {err}") from err
        driver = facts["driver"]
        if driver["training"] != self._fingerprint():
            raise TrainingError(
                f"training {self._id} has a checkpoint of other rows or of another declaration: give the training an "
                f"id of its own, or delete {self._checkpoints.path(self._id)}"
            )
        self._epochs = [EpochMetrics(**e) for e in driver["epochs"]]
        self._changes = self._changes or [GangChange(**c) for c in driver["changes"]]
        self._at = Position(step=facts["step"], order=facts["order"])
        self._state = ray.put(data)

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to fit, as JSON gives it back."""
        train, manifest = self._train, self._asked.training_set.manifest
        return {
            "declared": [train.seed, train.epochs, train.batch_rows, train.learning_rate],
            "features": [[name, manifest.feature_hashes.get(name, "")] for name in manifest.features],
            "lake_versions": dict(sorted(manifest.lake_versions.items())),
            "range": [manifest.start_at, manifest.end_at, manifest.known_until, manifest.rows],
        }

    def _tell(self, kind: str, key: str, data: dict[str, Any]) -> None:
        if self._asked.record is None:
            return
        self._asked.record(
            [
                Event(
                    kind=kind,
                    subject=self._id,
                    pipeline=self._asked.training_set.manifest.pipeline,
                    wall_s=time.time(),
                    data=data,
                    key=f"training/{self._id}/{key}",
                )
            ]
        )


def _reference(table: Any) -> Any:
    return table if isinstance(table, ray.ObjectRef) else ray.put(table)


def _finite(data: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such figures are left out."""
    return {k: v for k, v in data.items() if not (isinstance(v, float) and not math.isfinite(v))}
