import json
import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.gate import Decision
from raymill.actors.retrain import (
    MIN_CANARY_LABELS,
    Asked,
    CanaryEvidence,
    Judged,
    Looked,
    Phase,
    RetrainRules,
    State,
    Trained,
    TrainingFailed,
    Watched,
    Withdrawn,
    done,
    step,
    why_not,
)
from raymill.runtime.messages import Verdict
from raymill.runtime.spec import Cost, Monitor

DAY = 86_400_000_000
RULES = RetrainRules(max_retrains=2, cooldown_us=5 * DAY, canary_us=5 * DAY, tolerance=0.25)
START = State(model="m")


def verdict(day: int, retrain: bool = True) -> Verdict:
    return Verdict(
        model="m",
        version=1,
        start_at=(day - 28) * DAY,
        end_at=day * DAY,
        predictions=5000,
        labelled=4000,
        cost=10.0,
        best_alternative="baseline",
        best_alternative_cost=8.0,
        regret=2.0,
        regret_low=1.0,
        auc=math.nan,
        input_drift={},
        output_drift=0.0,
        retrain=retrain,
        reason="regret 2.00",
    )


def look(day: int, **changes) -> Looked:
    evidence = CanaryEvidence(
        version=3,
        live_version=1,
        start_at=29 * DAY,
        end_at=day * DAY,
        answered=900,
        not_finite=0,
        labelled=4000,
        canary_cost=9.0,
        live_cost=9.2,
        difference=-0.2,
        low=-0.6,
        high=0.2,
    )
    return Looked(evidence=replace(evidence, **changes))


def in_canary() -> State:
    state = step(START, Watched(verdict=verdict(28)), RULES)
    state = step(state, Trained(training_id=state.training_id, version=3, at=28 * DAY), RULES)
    return done(step(state, Judged(version=3, decision=Decision(accept=True, reason="better"), at=29 * DAY), RULES))


def todo(state: State) -> list[str]:
    return [i.do for i in state.due]


def test_a_proven_regret_leads_through_training_gate_and_canary_to_promotion():
    state = step(START, Watched(verdict=verdict(28)), RULES)
    assert (state.phase, todo(state)) == (Phase.RETRAINING, ["train_candidate"])
    state = step(done(state), Trained(training_id=state.training_id, version=3, at=28 * DAY), RULES)
    assert (state.phase, todo(state)) == (Phase.JUDGING, ["judge_candidate"])
    state = step(done(state), Judged(version=3, decision=Decision(accept=True, reason="better"), at=29 * DAY), RULES)
    assert (state.phase, todo(state)) == (Phase.CANARY, ["start_canary"])
    state = step(done(state), look(31), RULES)
    assert (state.phase, todo(state)) == (Phase.CANARY, [])
    state = step(state, look(34), RULES)
    assert (state.phase, todo(state), state.due[0].version) == (Phase.WATCHING, ["promote"], 3)
    assert state.history[0]["outcome"] == "promoted" and state.history[0]["reason"] == "regret 2.00"


def test_a_verdict_without_retrain_starts_nothing():
    assert step(START, Watched(verdict=verdict(28, retrain=False)), RULES) == START


def test_a_refused_candidate_is_rejected_and_a_failed_training_ends_the_retrain():
    state = step(START, Asked(at=0, reason="asked"), RULES)
    failed = step(state, TrainingFailed(training_id=state.training_id, at=1, reason="loss not finite"), RULES)
    assert (failed.phase, todo(failed), failed.history[0]["outcome"]) == (Phase.WATCHING, [], "failed")
    judging = step(state, Trained(training_id=state.training_id, version=2, at=1), RULES)
    refused = step(judging, Judged(version=2, decision=Decision(accept=False, reason="worse"), at=2), RULES)
    assert (refused.phase, todo(refused)) == (Phase.WATCHING, ["reject"])
    assert refused.history[0]["why"] == "worse"


def test_a_harmful_canary_is_rolled_back_at_once():
    for harm in ({"low": 0.1, "difference": 0.4}, {"not_finite": 1}, {"broken": "no such file"}):
        state = step(in_canary(), look(30, **harm), RULES)
        assert (state.phase, todo(state)) == (Phase.WATCHING, ["roll_back"]), harm


def test_a_canary_that_looks_dearer_is_watched_on_and_rolled_back_if_it_stays_so():
    assert step(in_canary(), look(34, difference=0.3), RULES).phase is Phase.CANARY
    assert todo(step(in_canary(), look(44, difference=0.3), RULES)) == ["roll_back"]
    for day in (34, 44):
        assert todo(step(in_canary(), look(day, difference=0.2), RULES)) == ["promote"]


def test_a_canary_without_labels_waits_and_then_is_rolled_back():
    few = {"labelled": MIN_CANARY_LABELS - 1, "low": 5.0}
    assert step(in_canary(), look(35, **few), RULES).phase is Phase.CANARY
    assert todo(step(in_canary(), look(44, **few), RULES)) == ["roll_back"]


def test_no_retrain_in_the_cooldown_nor_beyond_the_limit():
    state = done(step(in_canary(), look(34), RULES))
    assert "ended less than 5 days ago" in why_not(state, 38 * DAY, RULES)
    assert step(state, Watched(verdict=verdict(38)), RULES) == state
    second = step(state, Watched(verdict=verdict(39)), RULES)
    assert second.phase is Phase.RETRAINING and second.training_id != in_canary().history
    spent = done(step(second, TrainingFailed(training_id=second.training_id, at=40 * DAY, reason="x"), RULES))
    assert "2 of 2 retrains are spent" in why_not(spent, 90 * DAY, RULES)
    assert step(spent, Watched(verdict=verdict(90)), RULES) == spent


def test_a_promotion_still_due_is_not_lost_when_the_next_retrain_begins():
    promoted = step(in_canary(), look(34), RULES)
    assert todo(step(promoted, Watched(verdict=verdict(60)), RULES)) == ["promote", "train_candidate"]


def test_a_canary_taken_out_just_before_its_promotion_was_rolled_back_and_may_be_told_twice():
    withdrawn = Withdrawn(version=3, at=34 * DAY, reason="automatic: it errs")
    state = step(done(step(in_canary(), look(34), RULES)), withdrawn, RULES)
    assert (state.phase, todo(state)) == (Phase.WATCHING, [])
    assert (state.history[-1]["outcome"], state.history[-1]["why"]) == ("rolled_back", "automatic: it errs")
    assert step(state, withdrawn, RULES) == state
    assert step(state, Withdrawn(version=2, at=35 * DAY, reason="x"), RULES) == state


facts = st.lists(
    st.sampled_from(
        [
            Watched(verdict=verdict(28)),
            Watched(verdict=verdict(60)),
            Asked(at=70 * DAY, reason="asked"),
            Trained(training_id=f"m-retrain-1-{28 * DAY}", version=3, at=28 * DAY),
            TrainingFailed(training_id=f"m-retrain-1-{28 * DAY}", at=28 * DAY, reason="x"),
            Judged(version=3, decision=Decision(accept=True, reason="better"), at=29 * DAY),
            Judged(version=3, decision=Decision(accept=False, reason="worse"), at=29 * DAY),
            look(30),
            look(34),
            look(34, low=1.0),
            Withdrawn(version=3, at=34 * DAY, reason="it errs"),
        ]
    ),
    max_size=12,
)


@given(facts)
@settings(max_examples=150, deadline=None)
def test_a_loop_killed_anywhere_resumes_from_json_and_never_goes_astray(happened):
    state = START
    for fact in happened:
        state = step(State.from_json(json.loads(json.dumps(state.to_json()))), fact, RULES)
        assert state.retrains == len(state.history) + (state.phase is not Phase.WATCHING) <= RULES.max_retrains
        assert (state.begun is None) == (state.phase is Phase.WATCHING)
        assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


@given(facts)
@settings(max_examples=100, deadline=None)
def test_a_fact_that_comes_twice_in_a_row_changes_nothing_the_second_time_while_a_retrain_runs(happened):
    state = START
    for fact in happened:
        once = step(state, fact, RULES)
        if once.phase in (Phase.RETRAINING, Phase.JUDGING, Phase.CANARY):
            assert step(once, fact, RULES) == once
        state = once


def test_the_rules_come_from_the_pipeline_file():
    rules = RetrainRules.of(Monitor(cost=Cost(missed=2, false_alarm=1), canary_for="2d", max_retrains=7, tolerance=0.1))
    assert (rules.canary_us, rules.max_retrains, rules.tolerance) == (2 * DAY, 7, 0.1)
