"""FeatureActor under Ray: references in and out, restarted by Ray with the same vectors, read by another process."""

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from raymill.actors import lake_join
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.features import FeatureActor
from raymill.actors.lake import Lake
from raymill.actors.online import OnlineReader
from raymill.actors.point_in_time import join
from raymill.actors.shards import FeatureShards, Shard
from raymill.runtime.errors import StoreError
from raymill.runtime.expressions import col
from raymill.runtime.home import Home
from raymill.runtime.records import NAME, RecordsActor, RemoteRecords
from raymill.runtime.spawn import find, spawn
from raymill.runtime.spec import Col, Cost, FeatureView, Label, Monitor, Pipeline, Source, Train

MINUTE = 60_000_000
UTC = pa.timestamp("us", "UTC")
TICKS = Source(
    "ticks",
    key=["tick"],
    time="moment",
    schema={"tick": Col("int64"), "moment": Col("timestamp"), "who": Col("string"), "x": Col("float64")},
)


def no_model(inputs):
    raise AssertionError("no model is built here")


PIPELINE = Pipeline(
    "ticking",
    views=[FeatureView("who", TICKS, entity="who", features={"mean": col("x").mean("30m"), "n": col("x").count("2h")})],
    label=Label("high", TICKS, col("x") > 3),
    train=Train(no_model),
    monitor=Monitor(cost=Cost(missed=2, false_alarm=1)),
)


class FeatureActorWithPid(FeatureActor):
    """The actor under test, which also tells its process."""

    def pid(self):
        return os.getpid()


def ticks(first, n):
    i = np.arange(first, first + n)
    who, x = pa.array(np.array(["a", "b"])[i % 2]), pa.array(i % 7 * 1.0)
    return pa.table({"tick": pa.array(i), "moment": pa.array(i * MINUTE).cast(UTC), "who": who, "x": x})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYMILL_HOME", str(folder / "raymill"))
        ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
        spawn(RecordsActor, str(folder / "raymill"), name=NAME)
        yield folder / "raymill"
        ray.shutdown()


def test_references_go_in_and_come_out_and_a_killed_actor_comes_back_whole(home):
    lake = Lake(Home(home).lake)
    actor = spawn(FeatureActorWithPid, str(home), PIPELINE, RemoteRecords(), name="features/ticking")
    for day in range(3):
        version = lake.append("ticks", ticks(day * 100, 100), batch_id=f"{day}")
        rows = ray.put(ticks(day * 100, 100))
        ray.get(find("features/ticking").ingest.remote("ticks", rows, f"{day}", lake_version=version))
    made = ray.get(actor.training_set.remote(0, 300 * MINUTE, 300 * MINUTE, 200 * MINUTE))
    train, later = ray.get([made.train_ref, made.evaluate_ref])
    assert (len(train), len(later)) == (200, 100)
    told = RemoteRecords().events("training_set.made")
    assert [(e["subject"], e["data"]["train_rows"], e["data"]["evaluate_rows"]) for e in told] == [
        ("ticking", 200, 100)
    ]

    lake.append("ticks", ticks(300, 50), batch_id="lost")  # acknowledged by the lake, never handed on
    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
    asked, at = ticks(340, 10), np.arange(340, 350) * MINUTE
    offline = join(asked, FeaturePlan.of(PIPELINE), {"ticks": ticks(0, 350)}, at=at)
    assert ask_until_restarted(actor, asked, at).tobytes() == offline.tobytes()
    here = OnlineReader(Home(home).online, FeaturePlan.from_json(ray.get(actor.plan.remote()).to_json()))
    assert here.vectors(asked, at).tobytes() == offline.tobytes()
    here.close()


class MortalShard(Shard):
    """A shard whose process dies at its first piece, once."""

    def __init__(self, lake, memory_bytes, workers):
        super().__init__(lake, memory_bytes, workers)
        self._lived = Path(lake) / "one-has-died"

    def join(self, piece, plan, rows, at, versions):
        if not self._lived.exists():
            self._lived.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().join(piece, plan, rows, at, versions)


def test_shard_that_is_killed_in_mid_join_is_replaced_and_the_answer_is_the_same(home, tmp_path):
    lake, plan = Lake(tmp_path), FeaturePlan.of(PIPELINE)
    versions = {"ticks": lake.append("ticks", ticks(0, 5000), batch_id="0")}
    asked, at = ticks(0, 400), np.arange(400)[::-1] * 11 * MINUTE
    whole = join(asked, plan, {"ticks": ticks(0, 5000)}, at=at)
    shards = FeatureShards(str(tmp_path), 2, shard=MortalShard)
    assert shards.join(asked, plan, versions, at=at).tobytes() == whole.tobytes()
    assert (tmp_path / "one-has-died").exists()
    assert shards.join(asked, plan, versions, at=at).tobytes() == whole.tobytes()
    with pytest.raises(StoreError, match="ticks"):
        shards.join(asked, plan, {"ticks": 99}, at=at)
    shards.close()


def test_large_training_set_is_joined_by_shards_and_its_columns_are_read_where_they_lie(home, tmp_path, monkeypatch):
    monkeypatch.setattr(lake_join, "SHARDED_FROM", 1)
    events = []
    actor = FeatureActor(tmp_path, PIPELINE, events.extend)
    Lake(Home(tmp_path).lake).append("ticks", ticks(0, 300), batch_id="0")
    made = actor.training_set(0, 300 * MINUTE, 300 * MINUTE, 200 * MINUTE)
    assert actor._offline._shards is not None
    train = ray.get(made.train_ref)
    x, known = train.column("x").chunk(0), train.column("known").chunk(0)
    vectors = x.flatten().to_numpy(zero_copy_only=True).reshape(200, -1)
    assert vectors.tobytes() == join(ticks(0, 200), actor.plan(), {"ticks": ticks(0, 300)}, at="moment").tobytes()
    assert known.flatten().to_numpy(zero_copy_only=False).tolist() == (~np.isnan(vectors)).ravel().tolist()
    assert any(plasma(b) for b in x.flatten().buffers())
    actor.stop()


def plasma(buffer):
    """Whether memory is that of the object store, mapped by every process of the host."""
    if buffer is None:
        return False
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= buffer.address < high:
            return "plasma" in line or "/dev/shm" in line
    return False


def ask_until_restarted(actor, asked, at):
    for _ in range(50):
        try:
            return ray.get(actor.vectors.remote(asked, at), timeout=30)
        except ray.exceptions.RayActorError:  # the call was on its way when the process died: ask again
            continue
    raise AssertionError("the actor did not come back")
