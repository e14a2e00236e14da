"""Lineage on a real lake and real records: the rows behind a prediction are those known when it was made."""

import json
from dataclasses import asdict

import pyarrow as pa
import pytest

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.runtime.errors import UnknownPrediction
from raymill.runtime.expressions import col
from raymill.runtime.lineage import trace
from raymill.runtime.messages import Event, Manifest
from raymill.runtime.records import RecordsActor
from raymill.runtime.spec import Col, FeatureView, OnDemand, Source

US = 1_000_000
MOMENT = pa.timestamp("us", "UTC")
FLIGHTS = Source(
    "flights", key=["flight", "day"], time="departs", known_at="landed",
    schema={
        "flight": Col("int64"), "day": Col("string"), "carrier": Col("string", nullable=True),
        "departs": Col("timestamp"), "landed": Col("timestamp", nullable=True), "delay": Col("float64", nullable=True),
    },
)  # fmt: skip
VIEWS = [
    FeatureView("late", FLIGHTS, entity="carrier", features={"mean": col("delay").mean("100s")}),
    OnDemand("calendar", {"hour": col("departs").hour()}),
]
PLAN = FeaturePlan.of_views(VIEWS, FLIGHTS, name="m").to_json()
MANIFEST = Manifest(
    pipeline="m", lake_versions={"flights": 1}, features=("late.mean", "calendar.hour"),
    feature_hashes={"late.mean": "aaaa", "calendar.hour": "bbbb"}, label="late", label_rule=["col", "delay"],
    start_at=0, end_at=9, known_until=9, rows=5, without_label=1,
)  # fmt: skip


def flights(*rows):
    names = ["flight", "day", "carrier", "departs", "landed", "delay"]
    types = [pa.int64(), pa.string(), pa.string(), MOMENT, MOMENT, pa.float64()]
    return pa.table([pa.array(c, t) for c, t in zip(zip(*rows, strict=True), types, strict=True)], names=names)


def prediction(id_, at, row, *, version=1, role="live", key=None, wall_s=150.0):
    columns = {
        "id": id_, "model": "m", "version": version, "role": role, "at": at, "key": json.dumps(key) if key else None,
        "row": json.dumps(row), "x": [float("nan"), 0.5], "p": 0.25, "wall_s": wall_s, "replica": "r1",
    }  # fmt: skip
    table = pa.table({k: [v] for k, v in columns.items()})
    return table.set_column(4, "at", table["at"].cast(MOMENT))


@pytest.fixture
def world(tmp_path):
    records, lake = RecordsActor(tmp_path), Lake(tmp_path / "lake")
    records.start()

    def append(batch, rows, wall_s):
        version = lake.append("flights", rows, batch_id=batch)
        data = {"lake_version": version, "batch_id": batch}
        records.append([Event(kind="rows.appended", subject="flights", wall_s=wall_s, data=data)])
        return version

    first = append(
        "b1",
        flights(
            (1, "d", "UA", 10 * US, 40 * US, 1.0),  # before the window
            (2, "d", "UA", 60 * US, 90 * US, 2.0),
            (3, "d", "UA", 70 * US, 95 * US, 3.0),
            (4, "d", "UA", 80 * US, 500 * US, 4.0),  # lands after the prediction
            (5, "d", "AA", 75 * US, 90 * US, 5.0),
        ),
        100.0,
    )
    append("b2", flights((6, "d", "UA", 120 * US, 130 * US, 9.0), (9, "d", "UA", 140 * US, None, None)), 200.0)
    records.register("m", "model", b"program", MANIFEST, "t1", {"auc": 0.7}, 0.2)
    records.append([Event(kind="training.finished", subject="t1", wall_s=120.0, data={"steps": 7})])
    yield records, lake, first
    records.stop()


def test_the_way_from_a_prediction_to_its_rows(world):
    records, lake, first = world
    row = {"flight": 9, "day": "d", "carrier": "UA", "departs": 140 * US}
    lake.append("predictions", prediction("p1", 140 * US, row, key=[9, "d"]), batch_id="s1")
    found = trace("p1", lake.read, records, PLAN)
    assert found.prediction["at"] == 140 * US and found.prediction["row"] == row
    assert found.features == {
        "late.mean": {"value": None, "hash": "aaaa"},
        "calendar.hour": {"value": 0.5, "hash": "bbbb"},
    }
    assert found.version["stage"] == "candidate" and found.training == {"id": "t1", "training.finished": {"steps": 7}}
    assert found.manifest["lake_versions"] == {"flights": 1}
    late, label = found.sources
    assert (late.view, late.lake_version, late.entity, late.rows) == ("late", first, {"carrier": "UA"}, 2)
    assert [r["flight"] for r in late.newest] == [3, 2]  # flight 6 came after the answer, flight 4 landed after it
    assert label.view == "label" and label.rows == 1 and label.newest[0]["flight"] == 9


def test_it_prints_and_is_json(world):
    records, lake, _ = world
    lake.append("predictions", prediction("p1", 140 * US, {"carrier": "UA"}), batch_id="s1")
    found = trace("p1", lake.read, records, PLAN)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert "late.mean" in text
    printed = str(found)
    for said in ("prediction p1", "model m/1", "training t1", "late ← flights", "aaaa"):
        assert said in printed
    assert [step["what"] for step in found.steps()][:2] == ["prediction p1", "model m/1"]


def test_the_plan_is_taken_from_the_ledger_if_it_is_there(world):
    records, lake, _ = world
    lake.append("predictions", prediction("p1", 140 * US, {"carrier": "UA"}), batch_id="s1")
    assert trace("p1", lake.read, records).sources == () and not trace("p1", lake.read, records).plan_known
    data = {"manifest": asdict(MANIFEST), "plan": json.loads(PLAN)}
    records.append([Event(kind="training_set.made", subject="m", pipeline="m", wall_s=1.0, data=data)])
    assert trace("p1", lake.read, records).sources == trace("p1", lake.read, records, PLAN).sources != ()


def test_of_a_live_and_a_shadow_answer_the_live_one_is_meant(world):
    records, lake, _ = world
    lake.append("predictions", prediction("p1", 1, {}, version=2, role="shadow"), batch_id="s1")
    lake.append("predictions", prediction("p1", 1, {}, version=1), batch_id="s2")
    assert trace("p1", lake.read, records, PLAN).prediction["version"] == 1


def test_an_unknown_entity_has_no_rows_and_an_unregistered_version_no_history(world):
    records, lake, _ = world
    lake.append("predictions", prediction("p1", 140 * US, {"carrier": None}, version=8), batch_id="s1")
    found = trace("p1", lake.read, records, PLAN)
    assert found.sources[0].rows == 0 and found.version == {} and found.manifest == {}
    assert list(found.features) == ["late.mean", "calendar.hour"]


def test_an_unknown_prediction_says_where_ids_come_from(world):
    records, lake, _ = world
    with pytest.raises(UnknownPrediction, match="is not in the log"):
        trace("nothing", lake.read, records)
    lake.append("predictions", prediction("p1", 1, {}), batch_id="s1")
    with pytest.raises(UnknownPrediction, match="take the id from an answer"):
        trace("nothing", lake.read, records)
