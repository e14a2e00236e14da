"""raymill's side of the online benchmark: a writer of so many rows a second, and a reader."""

from __future__ import annotations

import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.online import OnlineReader, OnlineStore
from raymill.runtime.expressions import col
from raymill.runtime.spec import Col, FeatureView, Source

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))
from answering import answer

UTC = pa.timestamp("us", "UTC")
LATE = 4 * 10**15
"""A moment after all events."""


@cache
def plan(columns: tuple[str, ...], windows: bool) -> FeaturePlan:
    schema = {
        "id": Col("int64"),
        "at": Col("timestamp"),
        "entity": Col("int64"),
        **{c: Col("float64") for c in columns},
    }
    source = Source("events", key=["id"], time="at", schema=schema)
    views = [FeatureView("newest", source, entity="entity", features=list(columns))]
    totals = {f"{c}_{w}": col(c).mean(w) for c in columns[:5] for w in ("6h", "7d")}
    more = [FeatureView("windows", source, entity="entity", features=totals)] if windows else []
    return FeaturePlan.of_views([*views, *more], source)


def fill(told: dict[str, Any]) -> dict[str, float]:
    """The store from the events' file; what it takes on disk, and the memory of who writes (not the mapped file)."""
    before_mb = most_mb = own_mb()
    store = OnlineStore(told["place"], plan(tuple(told["columns"]), told["windows"]))
    events = pq.read_table(told["events"])
    for first in range(0, len(events), 100_000):
        store.ingest("events", events.slice(first, 100_000))
        most_mb = max(most_mb, own_mb())
    disk = sum(file.stat().st_size for file in Path(told["place"]).rglob("data.mdb"))  # 0: it is a server
    millions = len(events) / 1e6
    return {"disk_mb": disk / 2**20 / millions, "writer_mb": most_mb, "writer_grown_mb": most_mb - before_mb}


def own_mb() -> float:
    """Memory that is this process's alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def write(told: dict[str, Any]) -> dict[str, float]:
    """New rows, `told["rate"]` a second in batches of a hundredth of it, for so many seconds; the rows written."""
    columns = tuple(told["columns"])
    store = OnlineStore(told["place"], plan(columns, told["windows"]))
    dice = np.random.default_rng(1)
    begun, done, size = time.perf_counter(), 0, max(told["rate"] // 100, 1)
    while time.perf_counter() - begun < told["seconds"]:
        at = pa.array(np.full(size, LATE // 2 + done)).cast(UTC)
        rows = {"id": np.arange(size) + 10**12 + done, "at": at, "entity": dice.integers(0, told["entities"], size)}
        store.ingest("events", pa.table({**rows, **{c: dice.normal(size=size) for c in columns}}))
        done += size
        time.sleep(max(0.0, begun + done / told["rate"] - time.perf_counter()))
    return {"rows_per_s": done / (time.perf_counter() - begun)}


def read(told: dict[str, Any]) -> dict[str, float]:
    """As Feast's side: reads of random entities; of windows by `vectors`, whose rows are Arrow."""
    columns = tuple(told["columns"])
    ask = OnlineReader(told["place"], plan(columns, told["windows"]))
    dice = np.random.default_rng(0)
    took = []
    for _ in range(told["warm"] + told["calls"]):
        keys = dice.integers(0, told["entities"], told["keys"]).tolist()
        begun = time.perf_counter()
        if told["windows"]:
            ask.vectors(pa.table({"entity": keys}), np.full(len(keys), LATE))
        else:
            ask.latest("newest", keys, LATE)
        took.append(time.perf_counter() - begun)
    p50, p99 = np.percentile(took[told["warm"] :], [50, 99]) * 1e6
    return {"p50_us": float(p50), "p99_us": float(p99)}


def fresh(told: dict[str, Any]) -> dict[str, float]:
    """Seconds from the call that takes a row in until another reader gives it back; `told["calls"]` times."""
    columns = tuple(told["columns"])
    store, ask = (kind(told["place"], plan(columns, told["windows"])) for kind in (OnlineStore, OnlineReader))
    took = []
    for i in range(told["calls"]):
        rows = {"id": [10**15 + i], "at": pa.array([LATE - 1000 + i]).cast(UTC), "entity": [7]}
        begun = time.perf_counter()
        store.ingest("events", pa.table({**rows, **{c: [float(i)] for c in columns}}))
        while ask.latest("newest", [7], LATE)[0][0, 0] != i:
            pass
        took.append(time.perf_counter() - begun)
    p50, p99 = np.percentile(took, [50, 99]) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


answer({"fill": fill, "write": write, "read": read, "fresh": fresh})
