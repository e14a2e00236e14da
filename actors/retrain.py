"""When to retrain and what becomes of the candidate: a pure state machine, facts in, instructions out.

    WATCHING ─ verdict or request ─▶ RETRAINING ─ trained ─▶ JUDGING ─ accepted ─▶ CANARY ─ good ─▶ promoted ─▶ WATCHING
                                         │ failed              │ refused            └─ bad ──▶ rolled back ─▶ WATCHING
                                         └────────▶ WATCHING ◀─┘ (candidate rejected)

Invariants: a state that is saved as JSON before its instructions are carried out loses none of them, since the
instructions that are due are part of it; each is safe to carry out twice. A fact that does not fit the phase (a
late or repeated one) changes nothing. No retrain beyond `max_retrains`, none before the cooldown is over.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from raymill.actors.detectors import Regret
from raymill.actors.gate import Decision
from raymill.runtime.expressions import duration_us
from raymill.runtime.messages import Verdict
from raymill.runtime.spec import Monitor

MIN_CANARY_LABELS = 200
"""Labelled rows without which a canary is neither promoted nor blamed for its cost."""

LONGEST_CANARY = 3
"""Times its period that a canary is watched while the evidence leaves it open; then the point estimate decides."""

MUCH_DRIFT = 0.25
"""PSI that is called much, by custom."""


class Phase(StrEnum):
    """Where the loop of correction stands."""

    WATCHING = "watching"
    RETRAINING = "retraining"
    JUDGING = "judging"
    CANARY = "canary"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainRules:
    """Limits of the loop."""

    max_retrains: int
    """Retrains that may be begun."""
    cooldown_us: int
    """Event time after an outcome in which none is begun."""
    canary_us: int
    """Event time that a canary is watched."""
    tolerance: float
    """Money per row that a canary may cost more than live."""

    @classmethod
    def of(cls, monitor: Monitor) -> RetrainRules:
        """The rules that a pipeline's monitor states."""
        canary_us = duration_us(monitor.canary_for)
        return cls(
            max_retrains=monitor.max_retrains,
            cooldown_us=canary_us,
            canary_us=canary_us,
            tolerance=monitor.tolerance,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """What is to be done now."""

    do: Literal["train_candidate", "judge_candidate", "start_canary", "promote", "roll_back", "reject"]
    """`roll_back` ends a canary (it becomes rejected, live takes all traffic); `reject` refuses a candidate."""
    training_id: str
    """Training it belongs to; also the idempotency key of what is done."""
    version: int | None = None
    """Registry version it concerns; null before there is one."""
    at: int
    """Event time at which it was decided, µs UTC."""
    reason: str
    """Why, in words with figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryEvidence:
    """A canary and the live version on the same labelled rows."""

    version: int
    """The canary."""
    live_version: int
    """What it is compared with."""
    start_at: int
    """First moment of the rows, µs UTC."""
    end_at: int
    """End of the rows (exclusive) and moment of the look, µs UTC."""
    answered: int
    """Predictions that the canary itself answered."""
    not_finite: int
    """Rows on which the canary's answer is no probability."""
    labelled: int
    """Rows with known label, on which both were run."""
    canary_cost: float
    """Money per row of the canary."""
    live_cost: float
    """Money per row of the live version."""
    difference: float
    """Canary minus live, per row: positive is worse."""
    low: float
    """Lower bound of it, corrected for looking several times."""
    high: float
    """Upper bound of it."""
    broken: str = ""
    """Why the canary can not be run at all; empty: it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """Fact: the drift monitor's verdict on a period."""

    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Fact: a person or a plan asks for a retrain; costs no evidence, counts as a retrain."""

    at: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Fact: the candidate is trained and registered."""

    training_id: str
    version: int
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFailed:
    """Fact: the training failed for good."""

    training_id: str
    at: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Fact: the gate's decision on the candidate."""

    version: int
    decision: Decision
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """Fact: how the canary does up to now."""

    evidence: CanaryEvidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn:
    """Fact: a canary that was to be promoted had just been taken out of the replicas (it erred, it was slow)."""

    version: int
    at: int
    reason: str


Fact = Watched | Asked | Trained | TrainingFailed | Judged | Looked | Withdrawn
Outcome = Literal["promoted", "rolled_back", "rejected", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything the loop of correction must not forget."""

    model: str
    """Model that is watched."""
    phase: Phase = Phase.WATCHING
    """Where it stands."""
    retrains: int = 0
    """Retrains begun."""
    quiet_until: int | None = None
    """End of the cooldown, µs UTC."""
    training_id: str = ""
    """Training under way."""
    version: int | None = None
    """Candidate or canary under way."""
    canary_from: int | None = None
    """When the canary began, µs UTC."""
    due: tuple[Instruction, ...] = ()
    """Decided and not known to be done."""
    history: tuple[dict[str, Any], ...] = ()
    """Finished retrains: `{at, reason, training_id, version, outcome, outcome_at, why}`."""
    begun: dict[str, Any] | None = None
    """The retrain under way: `{at, reason}`."""

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> State:
        """The state that `to_json` wrote."""
        due = tuple(Instruction(**i) for i in value["due"])
        return cls(**{**value, "phase": Phase(value["phase"]), "due": due, "history": tuple(value["history"])})


def worth_it(found: Regret, labelled: int, drift: dict[str, float], monitor: Monitor) -> tuple[bool, str]:
    """Whether a retrain is worth it, and why: proven regret above what is tolerated, on enough labels."""
    drifted = sorted((n for n, psi in drift.items() if psi > MUCH_DRIFT), key=lambda n: -drift[n])
    diagnosis = f"; {len(drifted)} of {len(drift)} inputs drifted, most of all {drifted[0]}" if drifted else ""
    if labelled < monitor.min_labels:
        return False, f"too few labels: {labelled} of {monitor.min_labels}{diagnosis}"
    if not found.alternative:
        return False, f"there is no alternative to compare with{diagnosis}"
    figures = (
        f"{found.regret:+.2f} {monitor.unit} a prediction against {found.alternative}, at least {found.low:+.2f} "
        f"at {monitor.confidence:.0%}, on {labelled} labels"
    )
    if found.low <= 0:
        return False, f"no regret is proven: {figures}{diagnosis}"
    if found.regret <= monitor.tolerance:
        return False, f"regret is within the tolerance of {monitor.tolerance:g}: {figures}{diagnosis}"
    return True, f"regret: {figures}{diagnosis}"


def step(state: State, fact: Fact, rules: RetrainRules) -> State:
    """The state after a fact; what is to be done now is in its `due`."""
    match fact:
        case Watched(verdict=v) if state.phase is Phase.WATCHING and v.retrain:
            return _begun(state, v.end_at, v.reason, rules)
        case Asked() if state.phase is Phase.WATCHING:
            return _begun(state, fact.at, fact.reason, rules)
        case Trained() if state.phase is Phase.RETRAINING and fact.training_id == state.training_id:
            judging = replace(state, phase=Phase.JUDGING, version=fact.version)
            return _with_due(judging, "judge_candidate", fact.at, "trained")
        case TrainingFailed() if state.phase is Phase.RETRAINING and fact.training_id == state.training_id:
            return _ended(state, "failed", fact.at, fact.reason, rules)
        case Judged() if state.phase is Phase.JUDGING and fact.version == state.version:
            if not fact.decision.accept:
                return _ended(state, "rejected", fact.at, fact.decision.reason, rules)
            canary = replace(state, phase=Phase.CANARY, canary_from=fact.at)
            return _with_due(canary, "start_canary", fact.at, fact.decision.reason)
        case Looked(evidence=e) if state.phase is Phase.CANARY and e.version == state.version:
            outcome, why = judge_canary(e, state.canary_from or e.start_at, rules)
            return state if outcome == "wait" else _ended(state, outcome, e.end_at, why, rules)
        case Withdrawn() if state.history and state.history[-1]["version"] == fact.version:
            entry = {**state.history[-1], "outcome": "rolled_back", "outcome_at": fact.at, "why": fact.reason}
            return replace(state, history=(*state.history[:-1], entry))
        case _:
            return state


def done(state: State) -> State:
    """The state once everything due was carried out."""
    return replace(state, due=())


def why_not(state: State, at: int, rules: RetrainRules) -> str:
    """Why no retrain may begin at `at`, in words; empty: it may."""
    if state.phase is not Phase.WATCHING:
        return f"one is under way ({state.phase})"
    if state.retrains >= rules.max_retrains:
        return f"{state.retrains} of {rules.max_retrains} retrains are spent"
    if state.quiet_until is not None and at < state.quiet_until:
        return f"the last one ended less than {rules.cooldown_us / 86_400e6:g} days ago"
    return ""


def judge_canary(
    e: CanaryEvidence, since: int, rules: RetrainRules
) -> tuple[Literal["promoted", "rolled_back", "wait"], str]:
    """Whether a canary that began at `since` is promoted, rolled back or watched on, and why.

    Proven harm ends it at once. Promotion waits for the end of its period; if it looks dearer then, but by no more
    than chance may explain, it is watched on: a few days resolve a difference of the tolerance's size rarely.
    """
    if e.broken:
        return "rolled_back", f"it can not be run: {e.broken}"
    if e.not_finite:
        return "rolled_back", f"{e.not_finite} of its answers are no probability"
    figures = f"{e.difference:+.2f} a row against version {e.live_version} on {e.labelled} labelled rows"
    enough = e.labelled >= MIN_CANARY_LABELS
    if enough and e.low > 0:
        return "rolled_back", f"it costs more: {figures}, at least {e.low:+.2f}"
    if e.end_at < since + rules.canary_us:
        return "wait", f"its period is not over: {figures}"
    if enough and e.difference <= rules.tolerance:
        return "promoted", f"no worse than live: {figures}"
    if e.end_at < since + LONGEST_CANARY * rules.canary_us:
        return "wait", f"still open: {figures}"
    if not enough:
        return "rolled_back", f"no evidence came: {e.labelled} labelled rows, {MIN_CANARY_LABELS} are needed"
    return "rolled_back", f"not shown to be harmless: {figures}, {rules.tolerance:g} is tolerated"


def _begun(state: State, at: int, reason: str, rules: RetrainRules) -> State:
    if why_not(state, at, rules):
        return state
    number = state.retrains + 1
    retraining = replace(
        state,
        phase=Phase.RETRAINING,
        retrains=number,
        training_id=f"{state.model}-retrain-{number}-{at}",
        version=None,
        canary_from=None,
        begun={"at": at, "reason": reason},
    )
    # A verdict says nothing about what is still due from the outcome before; every other fact is its proof.
    return replace(retraining, due=(*state.due, _instruction(retraining, "train_candidate", at, reason)))


_AT_THE_END: dict[Outcome, Literal["promote", "roll_back", "reject"]] = {
    "promoted": "promote",
    "rolled_back": "roll_back",
    "rejected": "reject",
}


def _ended(state: State, outcome: Outcome, at: int, why: str, rules: RetrainRules) -> State:
    entry = {
        **(state.begun or {}),
        "training_id": state.training_id,
        "version": state.version,
        "outcome": outcome,
        "outcome_at": at,
        "why": why,
    }
    last = _with_due(state, _AT_THE_END[outcome], at, why) if outcome in _AT_THE_END else replace(state, due=())
    return replace(
        last,
        phase=Phase.WATCHING,
        quiet_until=at + rules.cooldown_us,
        training_id="",
        version=None,
        canary_from=None,
        begun=None,
        history=(*state.history, entry),
    )


def _with_due(state: State, do: Any, at: int, reason: str) -> State:
    return replace(state, due=(_instruction(state, do, at, reason),))


def _instruction(state: State, do: Any, at: int, reason: str) -> Instruction:
    return Instruction(do=do, training_id=state.training_id, version=state.version, at=at, reason=reason)
