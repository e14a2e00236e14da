"""The model `online` of the serving benchmark: a row names a customer and a shop, the replica looks their features up.

24 inputs: the newest values of a customer's eight columns and of a shop's eight, means and counts of both over an hour
and a day, and two numbers of the row itself; from LMDB, where 50,000 customers and 500 shops have 200,000 payments.
Each request names another customer and shop. The trees are as deep and as many as those of the model `bench`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.online import OnlineStore
from raymill.actors.rollout import ColumnForm, ModelSpec, Role, Route
from raymill.runtime.expressions import col
from raymill.runtime.home import Home
from raymill.runtime.spec import Col, FeatureView, OnDemand, Source

NAME = "online"
CUSTOMERS, SHOPS, PAYMENTS, REQUESTS = 50_000, 500, 200_000, 2_000
_NOW = 1_760_000_000_000_000
"""Moment of every request, µs; the payments lie in the two days before."""
_COLUMNS = tuple(f"v{i}" for i in range(8))
_SOURCE = Source(
    "payments",
    key=["payment"],
    time="at",
    schema={
        "payment": Col("int64"),
        "at": Col("timestamp"),
        "customer": Col("int64"),
        "shop": Col("string"),
        "amount": Col("float64"),
        **{c: Col("float64", nullable=True) for c in _COLUMNS},
    },
)
_WINDOWS = {
    "mean_1h": col("amount").mean("1h"),
    "mean_1d": col("amount").mean("1d"),
    "count_1d": col("amount").count("1d"),
}


def plan() -> FeaturePlan:
    """What is looked up."""
    views = [
        view
        for entity in ("customer", "shop")
        for view in (
            FeatureView(entity, _SOURCE, entity=entity, features=list(_COLUMNS)),
            FeatureView(f"{entity}_lately", _SOURCE, entity=entity, features=_WINDOWS),
        )
    ]
    row = OnDemand("row", features={"amount": col("amount") * 1.0, "large": col("amount") > 100})
    return FeaturePlan.of_views([*views, row], _SOURCE, name=NAME)


def write(folder: Path) -> None:
    """The model, `online.ubj`; requests, one a line: rows in `online.lines`, their vectors' like in `vectors.lines`."""
    import xgboost

    random = np.random.default_rng(3)
    inputs = len(plan().names)
    x = random.normal(size=(5000, inputs)).astype(np.float32)
    y = x[:, 0] * x[:, 1] + x[:, 2] + random.normal(size=5000) > 0
    settings = {"objective": "binary:logistic", "max_depth": 6, "nthread": 1, "seed": 0}
    xgboost.train(settings, xgboost.DMatrix(x, y), 200).save_model(folder / "online.ubj")
    asked = [
        {"payment": 10**9 + n, "customer": int(c), "shop": f"s{s}", "amount": round(float(a), 2)}
        for n, c, s, a in zip(range(REQUESTS), *_entities(random, REQUESTS), strict=True)
    ]
    lines = [orjson.dumps({"rows": [row], "at": _NOW}) for row in asked]
    (folder / "online.lines").write_bytes(b"\n".join(lines))
    vectors = [
        orjson.dumps({"inputs": [{"name": "features", "shape": [1, inputs], "datatype": "FP32", "data": v}]})
        for v in x[:REQUESTS].astype(float).round(4).tolist()
    ]
    (folder / "vectors.lines").write_bytes(b"\n".join(vectors))


def fill(home: Home) -> None:
    """The online store of the replica that is to come."""
    random = np.random.default_rng(4)
    customers, shops, amounts = _entities(random, PAYMENTS)
    rows = pa.table(
        {
            "payment": np.arange(PAYMENTS),
            "at": pa.array(np.sort(_NOW - random.integers(1, 2 * 86_400_000_000, PAYMENTS))).cast(
                pa.timestamp("us", "UTC")
            ),
            "customer": customers,
            "shop": pa.array([f"s{s}" for s in shops]),
            "amount": amounts,
            **{c: random.normal(size=PAYMENTS) for c in _COLUMNS},
        }
    )
    store = OnlineStore(home.online, plan())
    for first in range(0, PAYMENTS, 50_000):
        store.ingest("payments", rows.slice(first, 50_000))


def spec(digest: str) -> ModelSpec:
    """What is served."""
    found = plan()
    return ModelSpec(
        name=NAME,
        label="p",
        inputs=found.names,
        routes=(Route(version=1, digest=digest, role=Role.LIVE),),
        plan=found.to_json(),
        columns={c: ColumnForm(form.dtype, form.nullable) for c, form in _SOURCE.schema.items()},
        required=found.request_columns,
        key=("payment",),
    )


def _entities(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Customers, shops and amounts of so many payments."""
    return (
        random.integers(0, CUSTOMERS, count),
        random.integers(0, SHOPS, count),
        random.lognormal(3.5, 1.0, count),
    )
