"""A small shop whose lake and online store are reached by address (`LAKE`, `ONLINE`), and what a host does with them.

`answers` runs on either host of `test_stores_by_address.py`: it takes rows in, makes a training set, looks vectors up.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import ray

from raymill.actors.data import DataActor
from raymill.actors.features import FeatureActor
from raymill.runtime import (
    Col,
    Cost,
    FeatureView,
    Label,
    Monitor,
    OnDemand,
    Pipeline,
    Serve,
    Source,
    Stores,
    Train,
    col,
)

MINUTE = 60_000_000
ROWS = 2000
ORDERS = Source(
    "orders",
    key=["order"],
    time="placed_at",
    known_at="known_at",
    schema={
        "order": Col("int64"),
        "placed_at": Col("timestamp"),
        "known_at": Col("timestamp"),
        "shop": Col("string"),
        "price": Col("float64", nullable=True),
    },
)
pipeline = Pipeline(
    "by-address",
    views=[
        OnDemand("order", {"price": col("price"), "hour": col("placed_at").hour()}),
        FeatureView(
            "shop", ORDERS, entity="shop", features={"mean": col("price").mean("1h"), "n": col("price").count("1d")}
        ),
        FeatureView("newest", ORDERS, entity="shop", max_age="2h", features=["price"]),
    ],
    label=Label("dear", ORDERS, col("price") > 0.5),
    train=Train(lambda inputs: None),
    monitor=Monitor(cost=Cost(missed=1, false_alarm=1)),
    serve=Serve(anywhere=True),
    stores=Stores(lake=os.environ.get("LAKE"), online=os.environ.get("ONLINE")),
)


def in_folders() -> Pipeline:
    """The same in folders of one host: what the answers must equal."""
    return replace(pipeline, serve=Serve(), stores=Stores())


def orders() -> pa.Table:
    """Some known late, some without a price."""
    dice = np.random.default_rng(3)
    placed = np.cumsum(dice.integers(0, 3, ROWS)) * MINUTE
    price = dice.normal(size=ROWS)
    moment = pa.timestamp("us", "UTC")
    return pa.table(
        {
            "order": np.arange(ROWS),
            "placed_at": pa.array(placed, moment),
            "known_at": pa.array(placed + dice.integers(0, 90, ROWS) * MINUTE, moment),
            "shop": [f"shop{i}" for i in dice.integers(0, 5, ROWS)],
            "price": pa.array(price, mask=dice.random(ROWS) < 0.1),
        }
    )


def asked() -> tuple[pa.Table, np.ndarray]:
    """The newest rows, each at its own moment."""
    rows = orders().slice(ROWS - 300)
    return rows, np.array(rows.column("placed_at").cast(pa.int64()))


def answers(home: str, declared: Pipeline, batches: dict[str, pa.Table]) -> dict:
    """Take the batches in, then answer."""
    data = DataActor(home, list(declared.sources), lambda events: None, declared.name, declared.stores)
    features = FeatureActor(home, declared, lambda events: None)
    data.start()
    features.start()
    for batch_id, rows in batches.items():
        features.take(data.ingest("orders", rows, batch_id=batch_id))
    rows, at = asked()
    end = int(at.max()) + 1
    made = features.training_set(0, end, end, end // 2)
    sets = ray.get([made.train_ref, made.evaluate_ref])
    vectors = features.vectors(rows, at)
    features.stop()
    data.stop()
    folder = Path(home)
    return {
        "ip": ray.util.get_node_ip_address(),
        "interfaces": sorted(psutil.net_if_addrs()),
        "home": sorted(p.name for p in folder.iterdir()) if folder.exists() else [],
        "versions": made.manifest.lake_versions,
        "training": [_bytes(t) for t in sets],
        "vectors": vectors.tobytes(),
        "known": float(np.isfinite(vectors).mean()),
    }


def _bytes(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows.combine_chunks())
    return sink.getvalue().to_pybytes()
