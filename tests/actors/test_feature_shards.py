"""Features over shard actors: one is killed while rows come, readers go on, every row is in once when it is back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import ray

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.online import OnlineReader
from raymill.actors.online_intake import OnlineIntake
from raymill.jobs import feature_actors
from raymill.jobs.feature_actors import spawn_features
from raymill.runtime.expressions import col
from raymill.runtime.home import Home
from raymill.runtime.messages import Ingested
from raymill.runtime.records import RemoteRecords
from raymill.runtime.spawn import Remote, ask, named
from raymill.runtime.spec import Col, Cost, FeatureView, Label, Monitor, Pipeline, Source, Train
from raymill.runtime.stores import Stores, places_of

TICKS = Source(
    "ticks",
    key=["tick"],
    time="moment",
    schema={"tick": Col("int64"), "moment": Col("timestamp"), "who": Col("int64"), "x": Col("float64")},
)
PIPELINE = Pipeline(
    "ticking",
    views=[FeatureView("who", TICKS, entity="who", features={"sum": col("x").sum("1h"), "n": col("x").count("1h")})],
    label=Label("high", TICKS, col("x") > 3),
    train=Train(lambda inputs: None),
    monitor=Monitor(cost=Cost(missed=2, false_alarm=1)),
    stores=Stores(online_shards=2),
)
PLAN = FeaturePlan.of(PIPELINE)
WHO = 20
BATCHES = 12


def ticks(batch: int) -> pa.Table:
    """One tick of everybody."""
    i = np.arange(batch * WHO, (batch + 1) * WHO)
    return pa.table(
        {"tick": i, "moment": pa.array(i).cast(pa.timestamp("us", "UTC")), "who": i % WHO, "x": (i % 7) * 1.0}
    )


class IntakeWithPid(OnlineIntake):
    """Tells whom to kill."""

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("home")
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_actors, "OnlineIntake", IntakeWithPid)
        for handle in spawn_features(PIPELINE, str(folder), RemoteRecords()):
            ask(handle.health.remote())
    yield Home(folder)
    ray.shutdown()


def arrive(lake: Lake, batch: int) -> Ingested:
    """What the data actor does with sound rows."""
    version = lake.append("ticks", ticks(batch), batch_id=str(batch))
    return Ingested(
        source="ticks",
        batch_id=str(batch),
        lake_version=version,
        accepted=WHO,
        quarantined={},
        duplicate=False,
        rows_ref=ray.put(ticks(batch)),
    )


def test_a_killed_shard_loses_and_doubles_nothing_and_readers_go_on(home: Home) -> None:
    lake, features, first = Lake(home.lake), Remote("features/ticking"), Remote("features/ticking/0")
    read = OnlineReader(places_of(home, PIPELINE.stores).online, PLAN)
    asked, at = pa.table({"who": np.arange(WHO)}), np.full(WHO, 10**6)
    features.take(arrive(lake, 0))
    before = read.vectors(asked, at)
    assert before[:, 1].tolist() == [1.0] * WHO

    def bring() -> None:
        for batch in range(1, BATCHES):
            features.take(arrive(lake, batch))

    bringing = threading.Thread(target=bring)
    pid = first.pid()
    bringing.start()
    os.kill(pid, signal.SIGKILL)
    reads = 0
    while bringing.is_alive():
        counts = read.vectors(asked, at)[:, 1]
        assert counts.min() >= 1.0 and counts.max() <= BATCHES
        reads += 1
    bringing.join()
    x = read.vectors(asked, at)
    assert reads > 0 and x[:, 1].tolist() == [float(BATCHES)] * WHO
    values = np.concatenate([ticks(b)["x"] for b in range(BATCHES)]).reshape(BATCHES, WHO)
    assert x[:, 0].tolist() == values.sum(axis=0).tolist()
    assert first.health()["lake_versions"] == features.health()["lake_versions"] == {"ticks": lake.version("ticks")}
    assert features.vectors(asked, at).tobytes() == x.tobytes()


def test_shards_of_another_number_are_ended(home: Home) -> None:
    one = replace(PIPELINE, stores=Stores())
    for handle in spawn_features(one, str(home.root), RemoteRecords(), anew=True):
        ask(handle.health.remote())
    assert named("features/") == ["features/ticking"]
    again = Remote("features/ticking").vectors(pa.table({"who": [3]}), np.array([10**6]))  # filled from the lake
    assert again[0, 1] == BATCHES
