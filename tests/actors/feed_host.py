"""A process that follows a Redis stream into a home, as plain classes, until it is killed: `feed_host.py HOME URL`."""

from __future__ import annotations

import sys
import threading

from raymill.actors.data import DataActor
from raymill.actors.features import FeatureActor
from raymill.actors.feed import Feed
from raymill.runtime.expressions import col
from raymill.runtime.spec import Col, Cost, FeatureView, Label, Monitor, Pipeline, RedisStream, Source, Train


def no_model(inputs: int) -> None:
    raise AssertionError("no model is built here")


def pipeline(url: str) -> Pipeline:
    schema = {"ride": Col("int64"), "left": Col("timestamp"), "stop": Col("int64"), "delay": Col("float64", ge=0)}
    rides = Source("rides", key=["ride"], time="left", schema=schema, read=RedisStream(url, "rides"))
    features = {"delay": col("delay").last("7d"), "n": col("delay").count("7d")}
    return Pipeline(
        "riding",
        views=[
            FeatureView("stop", rides, entity="stop", features=features),
            FeatureView("newest", rides, entity="stop", features=["delay"]),
        ],
        label=Label("late", rides, col("delay") > 5),
        train=Train(no_model),
        monitor=Monitor(cost=Cost(missed=1, false_alarm=1)),
    )


def main(home: str, url: str) -> None:
    told = pipeline(url)
    data = DataActor(home, list(told.sources), lambda events: None, told.name)
    features = FeatureActor(home, told, lambda events: None)
    data.start()
    features.start()
    Feed(told.sources, data, [features]).start()
    print("following", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
