from dataclasses import replace

import numpy as np
import orjson
import pyarrow as pa
import pytest
from scipy.special import expit

from raymill.actors import detectors, wire
from raymill.actors.drift import DriftMonitor
from raymill.actors.lake import Lake
from raymill.actors.observed import Observed, key_texts
from raymill.actors.rollout import spec_of
from raymill.runtime.errors import Conflict, ModelError
from raymill.runtime.expressions import col
from raymill.runtime.home import Home
from raymill.runtime.messages import Manifest
from raymill.runtime.records import RecordsActor
from raymill.runtime.spec import Col, Cost, Label, Monitor, OnDemand, Pipeline, Source, Train

HOUR = 3_600_000_000
DAY = 24 * HOUR
PERIOD = 28 * DAY
RIDES = Source(
    "rides",
    key=["ride", "t"],
    time="t",
    known_at="done",
    schema={
        "ride": Col("int64"),
        "t": Col("timestamp"),
        "done": Col("timestamp", nullable=True),
        "delay": Col("float64", nullable=True),
        "a": Col("float64"),
        "b": Col("float64"),
    },
)
PIPELINE = Pipeline(
    "rides-late",
    views=[OnDemand("row", {"a": col("a"), "b": col("b")})],
    label=Label("late", RIDES, col("delay") > 15),
    train=Train(model=lambda inputs: None),
    monitor=Monitor(cost=Cost(missed=120, false_alarm=30), min_labels=1000),
)


def linear(wa: float, wb: float, bias: float = -1.0):
    return lambda x: expit(x @ np.array([wa, wb], np.float32) + bias).astype(np.float32)


def broken(x):
    raise ModelError("version 9 can not be run: load another")


PROGRAMS = {1: linear(0.8, 0.0), 2: linear(1.5, 0.0), 3: linear(-1.5, 0.0), 4: linear(1.5, 0.05), 5: broken}


@pytest.fixture
def records(tmp_path):
    """A registry with a baseline (1, retired), a live version (2), and three candidates: bad, good, broken."""
    actor = RecordsActor(tmp_path)
    actor.start()
    for version in PROGRAMS:
        kind = "baseline" if version == 1 else "model"
        actor.register("rides-late", kind, b"program %d" % version, None, f"t{version}", {}, 0.2)
    actor.promote("rides-late", 1, reason="first")
    actor.promote("rides-late", 2, reason="better")
    yield actor
    actor.stop()


def monitor(records, tmp_path, pipeline=PIPELINE, programs=PROGRAMS, since_s=0.0) -> DriftMonitor:
    found = DriftMonitor(tmp_path, pipeline, records, since_s, lambda version: programs[version])
    found.start()
    return found


def world(period: int, rows: int = 4000, *, truth=(1.5, 0.0), shift=0.0, bias=-1.0, seed=0, version=2):
    """A period's predictions by `version` and the rides they were about, whose delay follows `truth`."""
    rng = np.random.default_rng(1000 * seed + period)
    x = rng.normal(size=(rows, 2)).astype(np.float32)
    x[:, 1] += shift
    at = period * PERIOD + np.sort(rng.integers(0, PERIOD - 10 * HOUR, rows))
    late = rng.random(rows) < expit(x @ np.array(truth, np.float32) + bias)
    numbers = np.arange(rows) + 1_000_000 * period
    never = rng.random(rows) < 0.03
    rides = pa.table(
        {
            "ride": numbers,
            "t": pa.array(at, pa.timestamp("us", "UTC")),
            "done": pa.array(at + 3 * HOUR, pa.timestamp("us", "UTC"), mask=never),
            "delay": pa.array(np.where(late, 30.0, 0.0), mask=never),
            "a": x[:, 0].astype(float),
            "b": x[:, 1].astype(float),
        }
    )
    return answered(numbers, at, x, version), rides


def answered(numbers, at, x, version: int, role: str = "live") -> pa.Table:
    p = np.asarray(PROGRAMS[version](x), np.float32)
    return pa.table(
        {
            "id": [f"p{n}" for n in numbers],
            "model": ["rides-late"] * len(at),
            "version": np.full(len(at), version),
            "role": [role] * len(at),
            "at": pa.array(at, pa.timestamp("us", "UTC")),
            "key": [orjson.dumps([int(n), int(t)]).decode() for n, t in zip(numbers, at, strict=True)],
            "row": ["{}"] * len(at),
            "x": pa.array(list(x), pa.list_(pa.float32())),
            "p": p,
            "wall_s": np.arange(len(at), dtype=float),
            "replica": ["r"] * len(at),
        }
    )


def fed(found: DriftMonitor, *periods) -> DriftMonitor:
    for number, (predictions, rides) in enumerate(periods):
        found.observe(f"s{number}", predictions)
        found.labels(rides)
    return found


def test_a_world_that_turned_leads_to_a_proven_regret_and_a_retrain(records, tmp_path):
    verdict = fed(monitor(records, tmp_path), world(0), world(1, truth=(0.2, 1.5)), world(2, truth=(0.2, 1.5))).verdict(
        2 * PERIOD, 3 * PERIOD
    )
    assert verdict.retrain and verdict.best_alternative == "refit", verdict.reason
    assert 0 < verdict.regret_low < verdict.regret
    assert verdict.cost - verdict.best_alternative_cost == pytest.approx(verdict.regret * verdict.labelled)
    assert (verdict.version, verdict.predictions) == (2, 4000) and 3800 < verdict.labelled < 3950
    (event,) = records.events("drift.judged")
    assert event["data"]["retrain"] is True and event["subject"] == "rides-late/2"


def test_a_drift_of_inputs_that_costs_nothing_is_told_and_starts_no_retrain(records, tmp_path):
    found = monitor(records, tmp_path)
    training = np.random.default_rng(7).normal(size=(5000, 2)).astype(np.float32)
    found.reference(2, training)
    verdict = fed(found, world(0), world(1, shift=3.0)).verdict(PERIOD, 2 * PERIOD)
    assert verdict.input_drift["row.b"] > 1 and verdict.input_drift["row.a"] < 0.05
    assert verdict.output_drift < 0.05
    assert not verdict.retrain and "1 of 2 inputs drifted, most of all row.b" in verdict.reason


def test_without_drift_hardly_a_verdict_asks_for_a_retrain(records, tmp_path):
    asked = 0
    for seed in range(12):
        found = fed(monitor(records, tmp_path), world(0, 1500, seed=seed + 1), world(1, 1500, seed=seed + 1))
        asked += found.verdict(PERIOD, 2 * PERIOD).retrain
    assert asked <= 1


def test_regret_within_the_tolerance_starts_no_retrain(records, tmp_path):
    lenient = replace(PIPELINE, monitor=replace(PIPELINE.monitor, tolerance=50.0))
    periods = [world(0), world(1, truth=(0.2, 1.5)), world(2, truth=(0.2, 1.5))]
    verdict = fed(monitor(records, tmp_path, lenient), *periods).verdict(2 * PERIOD, 3 * PERIOD)
    assert verdict.regret_low > 0 and not verdict.retrain and "within the tolerance" in verdict.reason


def test_a_label_counts_only_once_it_is_known(records, tmp_path):
    predictions, rides = world(0, truth=(0.2, 1.5))
    late = rides.set_column(2, "done", pa.array(np.full(4000, PERIOD + 1), pa.timestamp("us", "UTC")))
    verdict = fed(monitor(records, tmp_path), (predictions, late)).verdict(0, PERIOD)
    assert verdict.labelled == 0 and not verdict.retrain and "too few labels: 0 of 1000" in verdict.reason
    assert fed(monitor(records, tmp_path), (predictions, late)).figures(0, PERIOD)["labelled"] > 3800


def test_a_restarted_monitor_gives_the_same_verdict_from_lake_and_ledger(records, tmp_path):
    lake = Lake(Home(tmp_path).lake)
    before = monitor(records, tmp_path)
    before.reference(2, np.random.default_rng(7).normal(size=(500, 2)).astype(np.float32))
    periods = [world(0), world(1, truth=(0.2, 1.5)), world(2, truth=(0.2, 1.5), shift=1.0)]
    for number, (predictions, rides) in enumerate(periods):
        before.observe(f"s{number}", predictions)
        before.labels(rides)
        lake.append("predictions", predictions, batch_id=f"s{number}")
        lake.append("rides", rides, batch_id=f"b{number}")
    verdict = before.verdict(2 * PERIOD, 3 * PERIOD)
    after = monitor(records, tmp_path)
    assert after.verdict(2 * PERIOD, 3 * PERIOD) == verdict
    fed(after, *periods)  # what was under way when it died comes again
    assert after.verdict(2 * PERIOD, 3 * PERIOD) == verdict
    assert verdict.input_drift["row.b"] > 0.25
    assert len(records.events("drift.judged")) == 1


def test_rows_that_come_twice_or_answered_nobody_or_are_of_another_model_do_not_count(records, tmp_path):
    found = monitor(records, tmp_path)
    predictions, _ = world(0, 100)
    assert found.observe("s", predictions) == 100
    assert found.observe("s", predictions) == 0
    found.observe("other segment, same ids", predictions)
    shadow = predictions.set_column(3, "role", pa.array(["shadow"] * 100))
    assert found.observe("shadow", shadow.set_column(0, "id", pa.array([f"q{n}" for n in range(100)]))) == 0
    assert found.observe("foreign", predictions.set_column(1, "model", pa.array(["other"] * 100))) == 0
    narrow = predictions.set_column(7, "x", pa.array([[1.0]] * 100, pa.list_(pa.float32())))
    assert found.observe("of an older pipeline file", narrow) == 0
    assert found.verdict(0, PERIOD).predictions == 100


def test_answers_of_an_earlier_replay_of_the_same_time_are_not_looked_at(records, tmp_path):
    predictions, _ = world(0, 100)
    found = monitor(records, tmp_path, since_s=60.0)
    assert found.observe("s", predictions) == 40
    Lake(Home(tmp_path).lake).append("predictions", predictions, batch_id="s")
    assert monitor(records, tmp_path, since_s=60.0).figures(0, PERIOD)["predictions"] == 40


def test_the_key_of_a_label_row_is_the_one_that_serving_logs():
    rides = world(0, 50)[1].select(["ride", "t", "a", "b"])
    asked = wire.read_arrow(wire.write_stream(rides), spec_of(PIPELINE, None, []), 0)
    assert asked.keys == key_texts(rides, RIDES)


def test_a_sample_is_the_same_share_of_every_version(records, tmp_path):
    half = replace(PIPELINE, monitor=replace(PIPELINE.monitor, sample=0.3))
    found = monitor(records, tmp_path, half)
    kept = [found.observe(f"v{v}", world(v, 4000, version=v)[0]) for v in (1, 2)]
    assert kept == pytest.approx([1200, 1200], rel=0.1)
    assert monitor(records, tmp_path, half).observe("again", world(1, 4000, version=1)[0]) == kept[0]


def test_the_window_forgets_old_periods():
    observed = Observed(2, PERIOD, periods=3)
    for period in range(5):
        observed.add_predictions(world(period, 50)[0])
    assert len(observed.rows(0, 5 * PERIOD, 0)) == 150


def test_nobody_is_judged_on_what_it_was_trained_on(records, tmp_path):
    def manifest(until: int) -> Manifest:
        return Manifest(
            pipeline="rides-late",
            lake_versions={},
            features=("row.a", "row.b"),
            feature_hashes={},
            label="late",
            label_rule=[],
            start_at=0,
            end_at=until,
            known_until=until,
            rows=0,
            without_label=0,
        )

    half = PERIOD + PERIOD // 2
    programs = {**PROGRAMS, 6: linear(1.5, 0.0), 7: linear(0.2, 1.5)}
    for version, until in ((7, 2 * PERIOD), (6, half)):
        number = records.register("rides-late", "model", b"m%d" % version, manifest(until), f"u{version}", {}, 0.2)
        programs[number.version] = programs[version]
        records.promote("rides-late", number.version, reason="newer")
    found = fed(monitor(records, tmp_path, programs=programs), world(0, truth=(0.2, 1.5)), world(1, truth=(0.2, 1.5)))
    verdict = found.verdict(PERIOD, 2 * PERIOD)
    assert verdict.predictions == 4000 and 1800 < verdict.labelled < 2100
    assert verdict.best_alternative == "refit"  # not the retired version that has seen the whole period


def test_a_bad_canary_shows_on_all_rows_and_a_good_one_does_no_harm(records, tmp_path):
    predictions, rides = world(0, 3000)
    found = fed(monitor(records, tmp_path), (predictions, rides))
    bad = found.canary(3, 0, 5 * DAY)
    assert bad.low > 0 and bad.live_version == 2 and bad.labelled > 400 and bad.answered == 0
    good = found.canary(4, 0, 5 * DAY)
    assert good.low < 0 < good.high or good.difference == 0
    assert abs(good.difference) < 1 and good.not_finite == 0
    assert found.canary(5, 0, 5 * DAY).broken == "version 9 can not be run: load another"
    assert found.canary(4, 40 * DAY, 41 * DAY).labelled == 0
    assert len(records.events("canary.looked")) == 4


def test_answers_that_are_no_probability_are_counted_against_the_canary(records, tmp_path):
    predictions, rides = world(0, 1000, version=4)
    p = predictions.column("p").to_numpy().copy()
    p[:3] = np.nan
    found = fed(monitor(records, tmp_path), (predictions.set_column(8, "p", pa.array(p)), rides))
    evidence = found.canary(4, 0, PERIOD)
    assert (evidence.not_finite, evidence.answered) == (3, 1000)


def test_figures_are_what_the_answers_really_cost_beside_the_baseline(records, tmp_path):
    predictions, rides = world(0, 2000)
    figures = fed(monitor(records, tmp_path), (predictions, rides)).figures(0, PERIOD)
    known = ~np.isnan(rides.column("delay").to_numpy(zero_copy_only=False))
    y = (rides.column("delay").to_numpy(zero_copy_only=False) > 15).astype(np.float32)[known]
    x = np.array(predictions.column("x").to_pylist(), np.float32)[known]
    cost = PIPELINE.monitor.cost
    assert figures["usd"] == detectors.costs(PROGRAMS[2](x), y, cost.threshold, cost).sum()
    assert figures["baseline_usd"] == detectors.costs(PROGRAMS[1](x), y, cost.threshold, cost).sum()
    assert figures["regret_usd"] == figures["usd"] - min(figures["usd"], figures["baseline_usd"])
    assert figures["by_version"] == {2: 2000} and 0.7 < figures["auc"] < 1
    assert fed(monitor(records, tmp_path)).figures(0, PERIOD)["auc"] is None


def test_without_a_live_version_there_is_nothing_to_watch(tmp_path):
    actor = RecordsActor(tmp_path)
    actor.start()
    with pytest.raises(Conflict):
        monitor(actor, tmp_path).verdict(0, PERIOD)
    actor.stop()
