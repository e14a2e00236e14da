"""Quarantine of a running pipeline: its actors are found by name, mended rows reach lake and features, once."""

import os
import signal

import numpy as np
import pyarrow as pa
import pytest
import ray

from raymill.actors.data import DataActor
from raymill.actors.features import FeatureActor
from raymill.actors.lake import Lake
from raymill.actors.quarantine_life import State
from raymill.jobs.mending import Desk, running_desk
from raymill.runtime.errors import UnknownRow, Usage
from raymill.runtime.expressions import col
from raymill.runtime.home import Home
from raymill.runtime.records import NAME, RecordsActor, RemoteRecords
from raymill.runtime.spawn import Remote, spawn
from raymill.runtime.spec import Col, Cost, FeatureView, Label, Monitor, Pipeline, Source, Train

TICKS = Source(
    "ticks",
    key=["tick"],
    time="moment",
    schema={"tick": Col("int64"), "moment": Col("timestamp"), "who": Col("string"), "x": Col("float64", ge=0)},
)
PIPELINE = Pipeline(
    "ticking",
    views=[FeatureView("who", TICKS, entity="who", features={"sum": col("x").sum("1h")})],
    label=Label("high", TICKS, col("x") > 3),
    train=Train(lambda inputs: None),
    monitor=Monitor(cost=Cost(missed=2, false_alarm=1)),
)
HOUR_US = 3_600_000_000


class DyingData(DataActor):
    """A data actor whose process can be killed between the lake's commit and the answer."""

    def kill_after_landing(self):
        self._tell = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def ticks(first, *values):
    n = len(values)
    moments = pa.array(np.arange(first, first + n) * 1_000_000).cast(pa.timestamp("us", "UTC"))
    x = pa.array(values, pa.float64())
    return pa.table({"tick": pa.array(range(first, first + n)), "moment": moments, "who": ["a"] * n, "x": x})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
    spawn(RecordsActor, str(folder), name=NAME)
    spawn(DyingData, str(folder), [TICKS], RemoteRecords(), "ticking", name="data/ticking")
    spawn(FeatureActor, str(folder), PIPELINE, RemoteRecords(), name="features/ticking")
    yield folder
    ray.shutdown()


def summed(home) -> float:
    return float(Remote("features/ticking").vectors(pa.table({"who": ["a"]}), np.array([HOUR_US - 1]))[0, 0])


def test_mended_rows_reach_lake_and_features_though_the_actor_is_killed_meanwhile(home):
    data, features = Remote("data/ticking"), Remote("features/ticking")
    features.take(data.ingest("ticks", ticks(0, 1.0, -2.0, -3.0), batch_id="a"))
    desk = running_desk(None)
    assert isinstance(desk, Desk) and len(desk.takers) == 1 and summed(home) == 1.0
    ids = [e.id for e in desk.rows.quarantine(source="ticks")]
    desk.rows.fix({i: {"x": 10} for i in ids})
    data.kill_after_landing()
    landed = desk.reingest(ids)  # Ray starts the actor again, and the call is made again
    assert sum(d.accepted for d in landed) == 2
    assert Lake(Home(home).lake).count("ticks") == 3 and summed(home) == 21.0
    assert {e.state for e in desk.rows.quarantine()} == {State.REINGESTED}
    assert desk.reingest(ids) == [] and summed(home) == 21.0


def test_what_does_not_run_is_no_desk_and_errors_come_out_as_they_were_raised(home):
    assert running_desk("other") is None
    with pytest.raises(UnknownRow, match="'nonsense'"):
        running_desk("ticking").reingest(["nonsense"])
    spawn(DataActor, str(home), [TICKS], RemoteRecords(), "second", name="data/second")
    with pytest.raises(Usage, match="second"):
        running_desk(None)
