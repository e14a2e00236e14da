"""Carries out what `actors/retrain.py` decides: train, judge, canary, promote, roll back, without a person.

The state machine's state, with its due instructions, is in the run's progress before anything is done; every
instruction is idempotent, so a killed run does the due ones again and goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import ray

from raymill.actors import gate, retrain
from raymill.actors.program import baseline, load_program
from raymill.actors.retrain import (
    CanaryEvidence,
    Fact,
    Instruction,
    Judged,
    Looked,
    Phase,
    RetrainRules,
    State,
    Trained,
    TrainingFailed,
    Watched,
    Withdrawn,
)
from raymill.actors.training_data import columns_of
from raymill.jobs.feature_watch import check_period
from raymill.jobs.run import Run
from raymill.jobs.world import World
from raymill.runtime.errors import Conflict, TrainingError
from raymill.runtime.expressions import duration_us
from raymill.runtime.messages import EpochMetrics, ModelVersion, Stage, TrainingSet, TrainResult

Say = Callable[[str], None]
OnStep = Callable[[str, int, int], None]


class Correction:
    """The loop of correction of one run."""

    def __init__(self, world: World, run: Run, say: Say, on_step: OnStep | None = None) -> None:
        """`say` is told what is decided, `on_step` (training, steps done, steps of all) how a training goes."""
        self._world, self._run, self._say, self._on_step = world, run, say, on_step
        monitor = world.pipeline.monitor
        self._rules = replace(RetrainRules.of(monitor), max_retrains=monitor.max_retrains + 1)  # the first model is one
        saved = run.progress.correction
        self.state = State.from_json(saved) if saved else State(model=world.pipeline.name)
        self._sets: dict[str, TrainingSet] = {}

    def first_live(self, at: int) -> ModelVersion:
        """The logistic baseline on all that is known at `at`, registered and live: something always is."""
        training_id = self._id("baseline")
        training_set = self._training_set(training_id, at)
        version = self._register("baseline", baseline(training_set, training_id=training_id), training_set, at)
        live = self._world.records.live(version.model)
        if live is None or live.version < version.version:
            self._world.records.promote(version.model, version.version, reason="baseline of this run", at=at)
        self._refer(version, training_set)
        return version

    def begin(self, at: int) -> None:
        """Train the first model, unless that was begun before; and carry out what a killed run left due."""
        self._carry_out()
        if self.state.retrains == 0:
            self.tell(retrain.Asked(at=at, reason="first model"))

    def day_passed(self, now: int, replay_start: int) -> None:
        """Look at the canary; when a period ends, a verdict, and whether what was served is what the lake gives.

        Moments are event time, µs UTC.
        """
        if self.state.phase is Phase.CANARY:
            self._look(now)
        every = duration_us(self._world.pipeline.monitor.every)
        if (now - replay_start) % every == 0:
            self._world.flush_predictions()
            verdict = self._world.monitor.verdict(now - every, now)
            self._say(f"verdict: {verdict.reason}")
            self.tell(Watched(verdict=verdict))
            checked = check_period(self._world, self._run, now - every, now)
            if checked is not None and checked.alert:
                self._say(f"alarm: consistency: {checked.reason}")

    def settle(self, now: int) -> None:
        """At the end of a replay no canary stays: it is promoted or rolled back on what is known, at the latest now."""
        while self.state.phase is Phase.CANARY:
            now += self._rules.canary_us
            self._look(now)

    def _look(self, now: int) -> None:
        """How the canary does; one that was taken out of the replicas meanwhile (it erred, it was slow) is broken."""
        self._world.flush_predictions()
        evidence: CanaryEvidence = self._world.monitor.canary(self.state.version, self.state.canary_from, now)
        canary = self._world.records.get(self.state.model, self.state.version)
        if canary.stage is Stage.REJECTED:
            evidence = replace(evidence, broken=str(canary.history[-1]["reason"]))
        self.tell(Looked(evidence=evidence))

    def tell(self, fact: Fact) -> None:
        """Give the machine a fact and carry out what follows from it."""
        self.state = retrain.step(self.state, fact, self._rules)
        self._save()
        self._carry_out()

    def _carry_out(self) -> None:
        while self.state.due:
            found: list[Fact | None] = []
            for instruction in self.state.due:
                self._say(f"{instruction.do.replace('_', ' ')}: {instruction.reason}")
                found.append(getattr(self, f"_{instruction.do}")(instruction))
            self.state = retrain.done(self.state)
            for fact in found:
                self.state = self.state if fact is None else retrain.step(self.state, fact, self._rules)
            self._save()

    def _train_candidate(self, what: Instruction) -> Fact:
        training_id = self._id(what.training_id)
        training_set = self._training_set(training_id, what.at)
        try:
            result = self._world.gang.fit(training_set, training_id=training_id, on_step=self._stepped(training_id))
        except TrainingError as err:
            return TrainingFailed(training_id=what.training_id, at=what.at, reason=err.message)
        version = self._register("model", result, training_set, what.at)
        self._remember(version, result)
        self._refer(version, training_set)
        return Trained(training_id=what.training_id, version=version.version, at=what.at)

    def _judge_candidate(self, what: Instruction) -> Fact:
        """Candidate, live version and a baseline of the same training set on the slice that none of them saw."""
        training_id = self._id(what.training_id)
        training_set = self._training_set(training_id, what.at)
        x, y = columns_of(training_set.evaluate_ref)
        at = ray.get(training_set.evaluate_ref).column("at").to_numpy().astype("datetime64[us]").astype(np.int64)
        live = self._world.records.live(self.state.model)
        candidate = self._world.records.get(self.state.model, what.version)
        decision = gate.judge(
            self._answers(candidate, x),
            None if live is None or live.kind == "baseline" else self._answers(live, x),
            load_program(baseline(training_set, training_id=training_id).program)(x),
            y,
            gate.GateRules.of(self._world.pipeline.monitor),
            at,
        )
        self._say(f"gate: {'accepted' if decision.accept else 'refused'}: {decision.reason}")
        told = {"version": candidate.version, "accept": decision.accept, "reason": decision.reason}
        if told not in self._run.progress.decisions:
            self._run.progress.decisions.append(told)
        return Judged(version=candidate.version, decision=decision, at=what.at)

    def _start_canary(self, what: Instruction) -> None:
        self._world.records.start_canary(self.state.model, what.version, reason=what.reason, at=what.at)
        self._world.serve_present_versions()

    def _promote(self, what: Instruction) -> Fact | None:
        try:
            version = self._world.records.promote(self.state.model, what.version, reason=what.reason, at=what.at)
        except Conflict:
            version = self._world.records.get(self.state.model, what.version)
            if version.stage is not Stage.REJECTED:
                raise
            return Withdrawn(version=version.version, at=what.at, reason=str(version.history[-1]["reason"]))
        self._world.serve_present_versions()
        return None

    def _roll_back(self, what: Instruction) -> None:
        self._world.records.reject(self.state.model, what.version, reason=what.reason, at=what.at)
        self._world.serve_present_versions()

    def _reject(self, what: Instruction) -> None:
        self._world.records.reject(self.state.model, what.version, reason=what.reason, at=what.at)

    def _training_set(self, training_id: str, at: int) -> TrainingSet:
        if training_id not in self._sets:
            train = self._world.pipeline.train
            start = at - duration_us(train.history) if train.history else 0
            held_out = at - duration_us(train.evaluate_on)
            self._sets = {training_id: self._world.features.training_set(start, at, at, held_out)}
        return self._sets[training_id]

    def _refer(self, version: ModelVersion, training_set: TrainingSet) -> None:
        """Let the monitor hold the version's inputs against what it was trained on."""
        x, _ = columns_of(training_set.train_ref)
        self._world.monitor.reference(version.version, x)

    def _register(self, kind: str, result: TrainResult, training_set: TrainingSet, at: int) -> ModelVersion:
        last = result.epochs[-1]
        metrics = {"auc": last.evaluate_auc, "log_loss": last.evaluate_log_loss, "rows": training_set.manifest.rows}
        threshold = self._world.pipeline.monitor.cost.threshold
        version: ModelVersion = self._world.records.register(
            self.state.model, kind, result.program, training_set.manifest, result.training_id, metrics, threshold
        )
        return version

    def _remember(self, version: ModelVersion, result: TrainResult) -> None:
        """Keep for the report what a training went through; a training is named once, however often it is resumed."""
        progress = self._run.progress
        if all(t["training_id"] != result.training_id for t in progress.trainings):
            facts = {"training_id": result.training_id, "version": version.version, "steps": result.steps}
            epochs: list[EpochMetrics] = list(result.epochs)
            progress.trainings.append(facts | {"seconds": result.seconds, "epochs": [asdict(e) for e in epochs]})
            progress.gang_changes += [asdict(c) | {"training_id": result.training_id} for c in result.changes]

    def _stepped(self, training_id: str) -> Callable[[int, int], None] | None:
        on_step = self._on_step
        return None if on_step is None else lambda done, of: on_step(training_id, done, of)

    def _answers(self, version: ModelVersion, x: np.ndarray) -> np.ndarray:
        return load_program(self._world.records.program(version.digest))(x)

    def _id(self, training_id: str) -> str:
        return f"{self._run.id}-{training_id}"

    def _save(self) -> None:
        progress = self._run.progress
        progress.correction = self.state.to_json()
        progress.retrains = [dict(entry) for entry in self.state.history]
        self._run.save()
