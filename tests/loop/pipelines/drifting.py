"""A made-up shop: will an order be returned? What `SHIFT` says happens on 29 February.

costly  what a heavy, expensive order means turns round: the model is wrong until it is trained anew
free    a column that means nothing shrinks: inputs drift, nothing gets worse
none    nothing

`UNTIL` (a date) and `EPOCHS` make it shorter.
"""

import os

import numpy as np
import pyarrow as pa
import torch

from raymill.runtime import (
    Budget,
    Col,
    Cost,
    Drills,
    FeatureView,
    Label,
    Monitor,
    OnDemand,
    Pipeline,
    Replay,
    Serve,
    Source,
    Train,
    col,
)

SHIFT = os.environ.get("SHIFT", "costly")
NAME = "orders" if SHIFT == "costly" else f"orders-{SHIFT}"  # other rows: another source, another lake table
UNTIL = os.environ.get("UNTIL", "2020-03-25")
EPOCHS = int(os.environ.get("EPOCHS", "20"))
DAYS, PER_DAY, TURN = 90, 1000, 59
HOUR_US = 3_600_000_000


def orders() -> pa.Table:
    rng = np.random.default_rng(7)
    day = np.repeat(np.arange(DAYS), PER_DAY)
    start = np.datetime64("2020-01-01", "us").astype(np.int64)
    time = start + day * 24 * HOUR_US + np.sort(rng.integers(0, 24 * HOUR_US, (DAYS, PER_DAY)), axis=1).ravel()
    turned = day >= TURN
    price, weight, noise = rng.normal(size=(3, len(day)))
    want = price * weight * np.where(turned & (SHIFT == "costly"), -1, 1)  # no straight line parts this
    returned = rng.random(len(day)) < 1 / (1 + np.exp(-4 * want))
    noise *= np.where(turned & (SHIFT == "free"), 0.2, 1.0)  # within what the model knows: outside, it is not free
    at = pa.timestamp("us", "UTC")
    return pa.table(
        {
            "order": pa.array([f"o{i}" for i in range(len(day))]),
            "placed_at": pa.array(time, at),
            "known_at": pa.array(time + 6 * HOUR_US, at),
            "shop": pa.array([f"shop{i}" for i in rng.integers(0, 8, len(day))]),
            "price": pa.array(price),
            "weight": pa.array(weight),
            "noise": pa.array(noise),
            "returned": pa.array(returned.astype(float)),
        }
    )


def broken_orders() -> list[tuple[str, str, pa.Table]]:
    bad = orders().slice(0, 2)
    bad = bad.set_column(bad.column_names.index("price"), "price", pa.array([1e9, None], pa.float64()))
    return [(NAME, "2020-02-20", bad)]


class Net(torch.nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(inputs, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).squeeze(-1)


ORDERS = Source(
    NAME,
    key=["order"],
    time="placed_at",
    known_at="known_at",
    read=orders,
    schema={
        "order": Col("string"),
        "placed_at": Col("timestamp"),
        "known_at": Col("timestamp", nullable=True),
        "shop": Col("string"),
        "price": Col("float64", ge=-1000, le=1000),
        "weight": Col("float64"),
        "noise": Col("float64"),
        "returned": Col("float64", nullable=True, ge=0, le=1),
    },
)

pipeline = Pipeline(
    f"returns-{SHIFT}",
    views=[
        OnDemand("order", features={"price": col("price"), "weight": col("weight"), "noise": col("noise")}),
        FeatureView("shop", ORDERS, entity="shop", features={"rate_7d": col("returned").mean("7d")}, required=True),
    ],
    label=Label("returned", ORDERS, col("returned") > 0.5),
    train=Train(
        Net,
        ranks=2,
        min_ranks=1,
        epochs=EPOCHS,
        batch_rows=64,
        learning_rate=5e-3,
        history="7d",
        evaluate_on="2d",
        spot=True,
    ),
    serve=Serve(canary_weight=0.5),
    monitor=Monitor(
        cost=Cost(missed=20, false_alarm=20), every="7d", canary_for="2d", min_labels=500, tolerance=0.1, max_retrains=2
    ),
    budget=Budget(usd_per_day=50),
    replay=Replay(
        history_until="2020-02-15",
        until=UNTIL,
        drills=Drills(reclaim_spot=True, kill_replica_on="2020-02-19", bad_rows=broken_orders),
    ),
)
