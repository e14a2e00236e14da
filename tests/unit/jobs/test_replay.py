from datetime import UTC, datetime

import pyarrow as pa
import pytest

from raymill.jobs.replay import DAY_US, Recording, iso_date, moment
from raymill.runtime import Col, Cost, Drills, FeatureView, Label, Monitor, Pipeline, Replay, Source, Train, col
from raymill.runtime.errors import SpecError

ROWS = Source("rows", key=["ref"], time="t", schema={"ref": Col("string"), "t": Col("timestamp"), "v": Col("float64")})


def a_table(days: list[str]) -> pa.Table:
    times = [datetime.fromisoformat(d).replace(tzinfo=UTC) for d in days]
    return pa.table(
        {
            "ref": [str(i) for i in range(len(days))],
            "t": pa.array(times, pa.timestamp("us", "UTC")),
            "v": [1.0] * len(days),
        }
    )


def a_recording(table: pa.Table, **replay) -> Recording:
    pipeline = Pipeline(
        "demo",
        views=[FeatureView("past", ROWS, entity="ref", features={"m": col("v").mean("1d")})],
        label=Label("big", ROWS, col("v") > 1),
        train=Train(lambda n: None),
        monitor=Monitor(cost=Cost(missed=2, false_alarm=1)),
        replay=Replay("2020-01-02", **replay),
    )
    return Recording(pipeline, {"rows": table})


def test_every_row_comes_once_in_history_or_in_its_day():
    recording = a_recording(a_table(["2020-01-03T23:59", "2020-01-01T05:00", "2020-01-02T00:00", "2020-01-03T00:00"]))
    (past,) = recording.history()
    days = {iso_date(d): [b.rows["ref"].to_pylist() for b in recording.batches(d)] for d in recording.days()}
    assert past.rows["ref"].to_pylist() == ["1"]
    assert days == {"2020-01-02": [["2"]], "2020-01-03": [["3", "0"]]}


def test_batches_and_requests_have_the_same_ids_each_time():
    recording = a_recording(a_table(["2020-01-02T05:00"] * 3), rows_per_request=2)
    day = moment("2020-01-02")
    assert [b.batch_id for b in recording.batches(day)] == ["rows/2020-01-02"]
    ids = [t["id"].to_pylist() for t in recording.requests(day, "R")]
    assert ids == [["R-2020-01-02-00000", "R-2020-01-02-00001"], ["R-2020-01-02-00002"]]


def test_a_request_carries_what_features_read_and_its_moment_but_never_the_label():
    (request,) = a_recording(a_table(["2020-01-02T05:00"])).requests(moment("2020-01-02"), "R")
    assert request.column_names == ["id", "at", "ref"]


def test_faulty_rows_are_batches_of_their_own():
    bad = a_table(["2020-01-02T05:00"])
    recording = a_recording(
        a_table(["2020-01-02T06:00"]), drills=Drills(bad_rows=lambda: [("rows", "2020-01-02", bad)])
    )
    assert [b.batch_id for b in recording.batches(moment("2020-01-02"))] == [
        "rows/2020-01-02",
        "seeded-0/rows/2020-01-02",
    ]


def test_a_resumed_replay_begins_where_it_stopped():
    recording = a_recording(a_table(["2020-01-02", "2020-01-05"]))
    assert recording.days(moment("2020-01-04")) == [moment("2020-01-04"), moment("2020-01-04") + DAY_US]


def test_a_date_that_is_none_is_refused():
    with pytest.raises(SpecError, match="YYYY-MM-DD"):
        moment("May 1st")
