"""The drift monitor under Ray: programs from the registry, killed with SIGKILL, the same verdict afterwards."""

import os
import signal

import numpy as np
import orjson
import pyarrow as pa
import pytest
import ray
import torch

from raymill.actors.drift import DriftMonitor
from raymill.actors.lake import Lake
from raymill.actors.program import export_program
from raymill.runtime.expressions import col
from raymill.runtime.home import Home
from raymill.runtime.records import RecordsActor, RemoteRecords
from raymill.runtime.spawn import spawn
from raymill.runtime.spec import Col, Cost, Label, Monitor, OnDemand, Pipeline, Source, Train

DAY = 86_400_000_000
ROWS = 3_000


class MonitorWithPid(DriftMonitor):
    """The actor under test, which also tells its process."""

    def pid(self) -> int:
        return os.getpid()


class Linear(torch.nn.Module):
    """Log-odds that lean on one input."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] * self.weight


def no_model(inputs: int) -> None:
    """Nothing is trained here."""


def pipeline() -> Pipeline:
    schema = {"ride": Col("int64"), "t": Col("timestamp"), "late": Col("float64"), "a": Col("float64")}
    rides = Source("rides", key=["ride"], time="t", schema=schema)
    return Pipeline(
        "rides-late",
        views=[OnDemand("row", {"a": col("a")})],
        label=Label("late", rides, col("late") > 0),
        train=Train(model=no_model),
        monitor=Monitor(cost=Cost(missed=10, false_alarm=10), min_labels=1000),
    )


@pytest.fixture
def home(tmp_path):
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
    yield tmp_path / "raymill"
    ray.shutdown()


def test_a_killed_monitor_comes_back_with_the_same_verdict(home):
    spawn(RecordsActor, str(home), name="records")
    records = RemoteRecords()
    for version, weight in ((1, 2.0), (2, -2.0)):
        kind = "baseline" if version == 1 else "model"
        records.register("rides-late", kind, export_program(Linear(weight), 1), None, f"t{version}", {}, 0.5)
        records.promote("rides-late", version, reason="given")
    rng = np.random.default_rng(0)
    x, at = rng.normal(size=(ROWS, 1)).astype(np.float32), np.sort(rng.integers(0, 28 * DAY, ROWS))
    moments = pa.array(at, pa.timestamp("us", "UTC"))
    rides = pa.table(
        {"ride": np.arange(ROWS), "t": moments, "late": (x[:, 0] > 0).astype(float), "a": x[:, 0].astype(float)}
    )
    predictions = pa.table(
        {
            "id": [f"p{n}" for n in range(ROWS)],
            "model": ["rides-late"] * ROWS,
            "version": np.full(ROWS, 2),
            "role": ["live"] * ROWS,
            "at": moments,
            "key": [orjson.dumps([n]).decode() for n in range(ROWS)],
            "x": pa.array(list(x), pa.list_(pa.float32())),
            "p": (1 / (1 + np.exp(2 * x[:, 0]))).astype(np.float32),
            "wall_s": np.arange(ROWS, dtype=float),
        }
    )
    monitor = spawn(MonitorWithPid, str(home), pipeline(), name="drift/rides-late")
    ray.get([monitor.reference.remote(2, x), monitor.observe.remote("s", predictions), monitor.labels.remote(rides)])
    verdict = ray.get(monitor.verdict.remote(0, 28 * DAY))
    assert verdict.retrain and verdict.best_alternative == "baseline (version 1)"
    lake = Lake(Home(home).lake)
    lake.append("predictions", predictions, batch_id="s")
    lake.append("rides", rides, batch_id="b")
    os.kill(ray.get(monitor.pid.remote()), signal.SIGKILL)
    assert ray.get(monitor.verdict.remote(0, 28 * DAY)) == verdict
