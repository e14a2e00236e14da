"""The actor that takes ill versions out, on a real registry: once, whatever it is told, and not too far back."""

import pytest

from raymill.actors.rollout_watch import AUTOMATIC, RolloutWatch
from raymill.actors.version_health import Report, Tally, withdrawals
from raymill.runtime.messages import Stage
from raymill.runtime.records import RecordsActor

GOOD, BAD = Tally(calls=100), Tally(calls=10, failed=10, why="no such column")


class Replicas:
    """The endpoint: what is still served, and what was asked of it."""

    def __init__(self):
        self.asked = []

    def withdraw(self, records, model, version):
        self.asked.append((model, version))
        return True


@pytest.fixture
def records(tmp_path):
    actor = RecordsActor(tmp_path)
    actor.start()
    for number in (1, 2, 3):
        actor.register("taxi", "model", f"program {number}".encode(), None, f"t{number}", {}, 0.5)
    actor.promote("taxi", 1, reason="first")
    yield actor
    actor.stop()


@pytest.fixture
def watch(tmp_path, records):
    return RolloutWatch(tmp_path, {}, records=records, endpoint=Replicas())


def report(roles, tallies, replica="a", benched=None, failures=None):
    return Report(
        replica=replica,
        generation="g",
        failures={"taxi": failures or {}},
        roles={"taxi": roles},
        tallies={"taxi": tallies},
        benched={"taxi": benched or {}},
    )


def stages(records):
    return [v.stage for v in records.versions("taxi")]


def test_an_ill_canary_is_rejected_with_the_reason_and_taken_out(watch, records):
    records.start_canary("taxi", 2, reason="test")
    watch.report(report({1: "live", 2: "canary"}, {1: GOOD, 2: BAD}))
    watch.look()
    rejected = records.get("taxi", 2)
    assert (rejected.stage, watch._endpoint.asked) == (Stage.REJECTED, [("taxi", 2)])
    assert rejected.history[-1]["reason"] == f"{AUTOMATIC}it errs: 10 of 10 batches failed; no such column"
    assert records.events("model.rejected")[0]["data"]["reason"] == rejected.history[-1]["reason"]


def test_told_again_after_a_kill_between_registry_and_replicas_it_goes_on(watch, records, tmp_path):
    records.start_canary("taxi", 2, reason="test")
    told = report({1: "live", 2: "canary"}, {1: GOOD, 2: BAD})
    records.reject("taxi", 2, reason="the actor before came so far")
    watch.report(told)
    watch.look()
    watch.look()
    assert watch._endpoint.asked == [("taxi", 2)] * 2
    assert len(records.events("model.rejected")) == 1


def test_what_one_replica_has_benched_goes_from_all(watch, records):
    records.start_canary("taxi", 2, reason="test")
    watch.report(report({1: "live", 2: "canary"}, {1: GOOD}, "a", benched={2: "it is slow: 5 of 5"}))
    watch.report(report({1: "live", 2: "canary"}, {1: GOOD, 2: GOOD}, "b"))
    watch.look()
    assert records.get("taxi", 2).history[-1]["reason"] == f"{AUTOMATIC}it is slow: 5 of 5"


def test_an_ill_promoted_version_is_rolled_back_but_what_comes_back_is_not(watch, records):
    records.promote("taxi", 2, reason="test")
    watch.report(report({2: "live"}, {2: BAD}))
    watch.look()
    assert stages(records)[:2] == [Stage.LIVE, Stage.RETIRED]
    watch.report(report({1: "live"}, {1: BAD}))
    watch.look()
    watch.look()
    assert stages(records)[:2] == [Stage.LIVE, Stage.RETIRED]
    assert [e["subject"] for e in records.events("model.ill")] == ["taxi/1"]


def test_a_live_version_with_none_before_it_stays_and_the_ledger_says_so_once(watch, records):
    watch.report(report({1: "live"}, {1: BAD}))
    watch.look()
    watch.look()
    assert (stages(records)[0], watch._endpoint.asked) == (Stage.LIVE, [])
    assert "no version before it" in records.events("model.ill")[0]["data"]["reason"]
    assert len(records.events("model.ill")) == 1


def test_a_version_whose_load_ends_replicas_goes_from_the_registry_too_and_one_that_was_not_loaded_does_not(
    watch, records
):
    records.promote("taxi", 2, reason="test")
    records.start_canary("taxi", 3, reason="test")
    why = {2: "DeadlyModel: SIGABRT", 3: "ModelError: 3 numbers a row"}
    watch.report(report({1: "live"}, {1: GOOD}, failures=why))
    watch.look()
    assert stages(records) == [Stage.LIVE, Stage.RETIRED, Stage.CANARY]
    assert records.get("taxi", 2).history[-1]["reason"] == f"{AUTOMATIC}DeadlyModel: SIGABRT"
    assert watch._endpoint.asked == [("taxi", 2)]


def test_a_report_comes_back_from_json_as_it_was():
    told = report({1: "live", 2: "canary"}, {1: GOOD, 2: BAD}, benched={2: "why"})
    assert Report.from_json(told.to_json()) == told


def test_healthy_versions_are_left_alone():
    assert withdrawals([report({1: "live", 2: "canary"}, {1: GOOD, 2: GOOD})]) == []
