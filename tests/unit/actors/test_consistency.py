"""What was served against what the lake gives: agreement is found, and every injected skew with its cause."""

import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from raymill.actors import consistency
from raymill.actors.consistency import CAUSES, Cause, agree, explain, number
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.features import FeatureActor
from raymill.actors.online import OnlineStore
from raymill.actors.served import LakeStates, Span, request_rows
from raymill.runtime.errors import Unavailable
from raymill.runtime.home import Home
from raymill.runtime.spec import Col
from tests.unit.actors.served_shop import MINUTE, SALES, UTC_US, Shop, pipeline_of, sales

CELLS = some.arrays(np.float32, (3, 2), elements=st.sampled_from([0.0, 1.0, 2.0, float("nan")]))


@pytest.fixture
def shop(tmp_path):
    made = Shop(tmp_path)
    made.arrive(sales(*range(60)), "first")
    yield made
    made.close()


def test_what_was_served_right_is_found_right_and_told_once(shop):
    shop.serve(sales(*range(40, 60)), shop.train())
    found = shop.recompute.check("shop")
    assert (found.rows, found.mismatched, found.alert) == (20, 0, False)
    assert "every value the same" in found.reason
    shop.recompute.check("shop")
    (told,) = shop.records.events("consistency.judged")
    assert told["data"] == found.to_json() | {"features": []}
    (observed,) = shop.records.events("features.observed")
    assert observed["data"]["unseen"] == {"shop": 0.0}
    assert observed["data"]["features"]["sale.twice"]["null_share"] == 0


def test_an_online_record_that_was_replaced_is_found_and_named(shop):
    version = shop.train()
    rows = sales(*range(40, 60))
    store = OnlineStore(Home(shop.home).online, FeaturePlan.of(pipeline_of()))
    store.ingest("sales", sales(58, price=1e4).set_column(0, "sale", pa.array([999])))
    store.close()
    shop.serve(rows, version)
    found = shop.recompute.check("shop")
    (finding,) = found.features
    assert finding.feature == "shop.sum" and finding.causes == {"code": 1} and found.alert
    assert "its records are not those of the lake" in finding.why and "p18" in finding.why


def test_what_neither_lake_nor_online_store_gives_is_other_code(shop):
    rows = sales(58)
    shop.serve(rows, shop.train(), x=np.array([[1e6, rows["price"][0].as_py() * 2]], np.float32))
    (finding,) = shop.recompute.check("shop").features
    assert finding.causes == {"code": 1} and "other code, or another record" in finding.why


def test_a_definition_that_was_changed_is_found_and_named(shop):
    trained, changed = shop.train("30m"), shop.train("10m")
    other = FeatureActor(shop.home, pipeline_of("10m"), shop.records.append)
    other.start()
    rows = sales(*range(40, 60))
    at = rows["sold"].cast(pa.int64()).to_numpy() + MINUTE // 2
    x = other.vectors(rows, at)
    other.stop()
    shop.serve(rows, trained, x=x)
    found = shop.recompute.check("shop")
    (finding,) = found.features
    hashes = [pipeline_of(w).feature_hashes["shop.sum"] for w in ("10m", "30m")]
    assert finding.causes == {"code": 20} and trained != changed
    assert f"definition {hashes[0]} was served, the model was trained with {hashes[1]}" in finding.why


def test_a_store_that_lagged_is_found_stale_with_the_batch_it_lacked(shop):
    version = shop.train()
    shop.arrive(sales(60, 61), "lost", seen=False)
    shop.arrive(sales(62, 63), "lost too", seen=False)
    shop.serve(sales(61, 62, 63), version)
    (finding,) = shop.recompute.check("shop").features
    assert finding.causes == {"stale": 3} and "'lost'" in finding.why


def test_a_row_that_came_after_the_answer_is_found_late(shop):
    version = shop.train()
    shop.serve(sales(57, 58, 59), version)
    shop.arrive(sales(58).set_column(0, "sale", pa.array([1000])), "late")
    (finding,) = shop.recompute.check("shop").features
    assert finding.feature == "shop.sum" and finding.causes == {"late row": 1}
    assert "came after it was served" in finding.why


def test_a_correction_that_came_in_time_changes_nothing_and_one_that_came_late_is_named(tmp_path):
    told = SALES.schema | {"told": Col("timestamp")}
    shop = Shop(tmp_path, replace(SALES, schema=told, known_at="told", corrected=True))

    def told_at(rows, minute):
        at = rows["sold"] if minute is None else pa.array([minute * MINUTE] * len(rows)).cast(UTC_US)
        return rows.append_column("told", at)

    shop.arrive(told_at(sales(*range(60)), None), "first")
    version = shop.train()
    shop.serve(sales(56, 57), version)  # half a minute after each sale
    shop.arrive(told_at(sales(54, 55, price=50.0), 58), "corrections")
    shop.serve(sales(58, 59), version, prefix="after")
    assert shop.recompute.check("shop").mismatched == 0
    shop.arrive(told_at(sales(56, price=70.0), 57), "late")
    (finding,) = shop.recompute.check("shop").features
    assert finding.feature == "shop.sum" and finding.causes == {"late row": 1}
    shop.close()


def test_a_state_whose_version_was_vacuumed_is_not_examined_and_nobody_is_accused(shop):
    shop.serve(sales(*range(40, 60)), shop.train())
    shop.arrive(sales(58).set_column(0, "sale", pa.array([1000])), "late")
    assert shop.lake.compact("sales", fewest=2) is not None
    assert shop.lake.vacuum("sales", pins=(), older_than_s=0, now_s=time.time() + 86_400).files
    (finding,) = shop.recompute.check("shop").features
    assert finding.causes == {"unexamined": 1}


def test_where_the_states_run_out_nobody_is_accused(shop, monkeypatch):
    monkeypatch.setattr("raymill.actors.recompute.STATES", 1)
    version = shop.train()
    shop.arrive(sales(60, 61), "lost", seen=False)
    shop.serve(sales(61), version)
    found = shop.recompute.check("shop")
    assert found.features[0].causes == {"unexamined": 1} and found.alert


def test_the_definitions_are_those_of_the_version_that_answered(shop):
    before, after = shop.train("30m"), shop.train("10m")
    rows = sales(*range(40, 60))
    shop.serve(rows, before, prefix="before")
    other = FeatureActor(shop.home, pipeline_of("10m"), shop.records.append)
    other.start()
    at = rows["sold"].cast(pa.int64()).to_numpy() + MINUTE // 2
    shop.serve(rows, after, x=other.vectors(rows, at), prefix="after")
    other.stop()
    found = shop.recompute.check("shop")
    assert (found.rows, found.mismatched) == (40, 0)
    told = [e["data"] for e in shop.records.events("features.observed")]
    observed = {data["feature_hashes"]["shop.sum"]: data["rows"] for data in told}
    assert observed == {pipeline_of(w).feature_hashes["shop.sum"]: 20 for w in ("30m", "10m")}


def test_vectors_of_another_width_are_an_alarm(shop):
    shop.serve(sales(58), shop.train(), x=np.zeros((1, 3), np.float32))
    found = shop.recompute.check("shop")
    assert found.alert and found.mismatched == 1


def test_the_sample_is_spread_over_the_span_and_bounded(shop):
    version = shop.train()
    shop.serve(sales(*range(20, 60)), version)
    whole = shop.recompute.check("shop", rows=10)
    assert whole.rows == 10 and whole.end_at - whole.start_at == 39 * MINUTE
    part = shop.recompute.check("shop", Span(start_at=30 * MINUTE, end_at=40 * MINUTE))
    assert part.rows == 10
    assert shop.recompute.check("shop", Span(since_s=time.time())).rows == 0


def test_a_model_without_a_training_set_is_refused(shop):
    shop.serve(sales(58), 1)
    with pytest.raises(Unavailable, match="knows no training set"):
        shop.recompute.check("shop")


def test_nothing_served_is_no_alarm(shop):
    found = shop.recompute.check("shop")
    assert not found.alert and "nothing was served" in found.reason


@settings(deadline=None)
@given(CELLS, CELLS, CELLS, st.lists(CELLS, max_size=3))
def test_every_cell_that_differs_has_one_cause_and_no_other_has_any(served, now, then, earlier):
    found = explain(served, now, then, iter(earlier))
    assert ((found.codes == 0) == agree(served, now)).all()
    late = found.codes == number(Cause.LATE_ROW)
    assert (late == (~agree(served, now) & agree(served, then))).all()
    stale = found.codes == number(Cause.STALE)
    assert ((found.steps > 0) == stale).all()
    for step, state in enumerate(earlier, start=1):
        assert agree(served, state)[found.steps == step].all()
    code = found.codes == number(Cause.CODE)
    assert not any(agree(served, state)[code].any() for state in [now, then, *earlier])


@settings(deadline=None)
@given(st.lists(st.sampled_from(range(len(CAUSES) + 1)), min_size=1, max_size=50), st.floats(0, 1))
def test_the_alarm_is_a_rate_above_the_tolerance(codes, tolerance):
    cells = {"a": np.array(codes, np.int8)}
    findings, alert, _ = consistency.judge(cells, {}, len(codes), tolerance)
    wrong = sum(c > 0 for c in codes)
    assert alert == (wrong / len(codes) > tolerance)
    assert sum(sum(f.causes.values()) for f in findings) == wrong


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 11))
def test_the_lake_at_a_moment_is_the_version_of_the_last_batch_before_it(walls, moment):
    walls = sorted(walls)
    events = [
        {"subject": "s", "wall_s": w, "data": {"lake_version": i + 1, "accepted": 1, "batch_id": f"b{i}"}}
        for i, w in enumerate(walls)
    ]
    states = LakeStates(events, {"s": 9})
    state = states.at(moment)
    came = sum(w <= moment for w in walls)
    assert state == (came,)
    assert states.versions(state)["s"] == (9 if not walls else came or None)
    before = states.before(state, 1)
    assert (before is None) == (came == 0)
    assert before is None or states.batch("s", state, 1) == f"b{came - 1}"


def test_the_same_bits_agree_and_unknown_values_do():
    a = np.array([[1.0, np.nan, 0.0]], np.float32)
    assert agree(a, a.copy()).all()
    assert agree(a, np.array([[np.nan, np.nan, -0.0]], np.float32)).tolist() == [[False, True, False]]


def test_a_plan_reads_logged_rows_as_the_endpoint_did(shop):
    rows = request_rows(['{"id": "x", "shop": "a", "price": 1}'], FeaturePlan.of(pipeline_of()))
    assert rows.column_names == ["shop", "price"] and rows["price"].to_pylist() == [1.0]
