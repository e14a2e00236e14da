"""From a Redis stream to a reader: contract, lake and online store, plain classes in one process as `raymill feed`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import redis

from raymill.actors.data import DataActor
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.features import FeatureActor
from raymill.actors.feed import Feed
from raymill.actors.online import OnlineReader
from raymill.runtime.errors import Unavailable
from raymill.runtime.expressions import col
from raymill.runtime.home import Home
from raymill.runtime.spec import Col, Cost, FeatureView, Label, Monitor, Pipeline, RedisStream, Source, Train

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))
from answering import answer

LATE = 4 * 10**15
"""A moment after all events."""
WARM = 5


def no_model(inputs: int) -> None:
    raise AssertionError("no model is built here")


def pipeline(url: str) -> Pipeline:
    schema = {"ride": Col("int64"), "left": Col("timestamp"), "stop": Col("int64"), "delay": Col("float64", ge=0)}
    rides = Source("rides", key=["ride"], time="left", schema=schema, read=RedisStream(url, "rides"))
    return Pipeline(
        "riding",
        views=[
            FeatureView("newest", rides, entity="stop", features=["delay"]),
            FeatureView("windows", rides, entity="stop", features={"mean": col("delay").mean("7d")}),
        ],
        label=Label("late", rides, col("delay") > 5),
        train=Train(no_model),
        monitor=Monitor(cost=Cost(missed=1, false_alarm=1)),
    )


def stream(told: dict[str, Any]) -> dict[str, float]:
    """Milliseconds from sending an entry until it is read, one after the other."""
    declared = pipeline(told["url"])
    data = DataActor(told["home"], list(declared.sources), lambda events: None, declared.name)
    features = FeatureActor(told["home"], declared, lambda events: None)
    feed = Feed(declared.sources, data, [features])
    for actor in (data, features, feed):
        actor.start()
    ask, took = OnlineReader(Home(Path(told["home"])).online, FeaturePlan.of(declared)), []
    with redis.Redis.from_url(told["url"]) as client:
        for i in range(WARM + told["calls"]):
            left = f"{np.datetime64(1_700_000_000_000_000 + i * 1000, 'us')}Z"
            begun = time.perf_counter()
            client.xadd("rides", {"ride": i, "left": left, "stop": 7, "delay": i})
            while newest(ask) != i:
                time.sleep(0.0005)
            took.append(time.perf_counter() - begun)
    for actor in (feed, features, data):
        actor.stop()
    p50, p99 = np.percentile(took[WARM:], [50, 99]) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def newest(ask: OnlineReader) -> float | None:
    """The value that is read; None before the first row."""
    try:
        return float(ask.latest("newest", [7], LATE)[0][0, 0])
    except Unavailable:
        return None


answer({"stream": stream})
