"""A small shop: real lake, record, features and online store, and a log of what its replica would have answered."""

import json
import time

import numpy as np
import pyarrow as pa

from raymill.actors.data import DataActor
from raymill.actors.features import FeatureActor
from raymill.actors.lake import Lake
from raymill.actors.prediction_rows import Scored, decode, encode
from raymill.actors.recompute import Recompute
from raymill.runtime.expressions import col
from raymill.runtime.home import Home
from raymill.runtime.records import RecordsActor
from raymill.runtime.spec import Col, Cost, FeatureView, Label, Monitor, OnDemand, Pipeline, Source, Train

MINUTE = 60_000_000
UTC_US = pa.timestamp("us", "UTC")
SALES = Source(
    "sales",
    key=["sale"],
    time="sold",
    schema={"sale": Col("int64"), "sold": Col("timestamp"), "shop": Col("string"), "price": Col("float64")},
)


def no_model(inputs):
    raise AssertionError("no model is built here")


def pipeline_of(window="30m", source=SALES):
    return Pipeline(
        "shop",
        views=[
            FeatureView("shop", source, entity="shop", features={"sum": col("price").sum(window)}),
            OnDemand("sale", {"twice": col("price") * 2}),
        ],
        label=Label("dear", source, col("price") > 3),
        train=Train(no_model),
        monitor=Monitor(cost=Cost(missed=2, false_alarm=1)),
    )


def sales(*numbers, price=None):
    """One a minute; shops `a` and `b` in turn."""
    n = np.array(numbers)
    prices = n % 7 * 1.0 if price is None else np.full(len(n), price)
    shops = pa.array(np.array(["a", "b"])[n % 2])
    sold = pa.array(n * MINUTE).cast(UTC_US)
    return pa.table({"sale": pa.array(n), "sold": sold, "shop": shops, "price": pa.array(prices)})


class Shop:
    """Lake, record and features of one pipeline; `serve` logs what a replica would have."""

    def __init__(self, home, source=SALES):
        self.home = home
        self.source = source
        self.records = RecordsActor(home)
        self.records.start()
        self.lake = Lake(Home(home).lake)
        self.data = DataActor(home, [source], self.records.append, "shop")
        self.data.start()
        self.features = FeatureActor(home, pipeline_of(source=source), self.records.append)
        self.features.start()
        self.recompute = Recompute(self.lake, self.records, Home(home).online)

    def arrive(self, rows, batch_id, *, seen=True):
        done = self.data.ingest("sales", rows, batch_id=batch_id)
        if seen:
            self.features.take(done)
        time.sleep(0.002)  # what is served next has a later wall time

    def train(self, window="30m"):
        """A version of the model, trained with the definitions of that window."""
        actor = FeatureActor(self.home, pipeline_of(window, self.source), self.records.append)
        made = actor.training_set(0, 60 * MINUTE, 60 * MINUTE, 50 * MINUTE)
        actor.stop()
        return self.records.register("shop", "model", b"m" + window.encode(), made.manifest, window, {}, 0.5).version

    def serve(self, rows, version, *, x=None, prefix="p"):
        at = rows["sold"].cast(pa.int64()).to_numpy() + MINUTE // 2
        x = self.features.vectors(rows, at) if x is None else x
        texts = [json.dumps({"shop": r["shop"], "price": r["price"]}).encode() for r in rows.to_pylist()]
        n = len(rows)
        scored = Scored(
            model="shop", ids=[f"{prefix}{i}" for i in range(n)], versions=np.full(n, version), roles=["live"] * n,
            at=at, keys=[None] * n, texts=texts, x=x, p=np.zeros(n, np.float32),
        )  # fmt: skip
        batch = decode(encode(scored, "r", time.time()))
        self.lake.append("predictions", batch, batch_id=f"served-{prefix}")
        time.sleep(0.002)

    def close(self):
        self.features.stop()
        self.records.stop()
