"""raymill's side of the point-in-time benchmark: from Parquet parts to a float32 matrix in shared memory."""

from __future__ import annotations

import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.point_in_time import join
from raymill.runtime.expressions import col
from raymill.runtime.spec import Col, FeatureView, Source

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))
from answering import answer

VALUES = [f"x{i}" for i in range(10)]
SCHEMA = {
    "id": Col("int64"),
    "at": Col("timestamp"),
    "known": Col("timestamp"),
    "entity": Col("int64"),
    **{c: Col("float64") for c in VALUES},
}
AT_ONCE = Source("events", key=["id"], time="at", schema=SCHEMA)
LATER = Source("events", key=["id"], time="at", known_at="known", schema=SCHEMA)
NEWEST = FeaturePlan.of_views([FeatureView("newest", AT_ONCE, entity="entity", features=VALUES)], AT_ONCE)
TOTALS = {
    "mean_6h": col("x0").mean("6h"),
    "mean_7d": col("x0").mean("7d"),
    "count_6h": col("x0").count("6h"),
    "count_7d": col("x0").count("7d"),
}
WINDOWS = FeaturePlan.of_views([FeatureView("windows", LATER, entity="entity", features=TOTALS)], LATER)

memory: SharedMemory | None = None


def shared(plan: FeaturePlan, told: dict[str, Any]) -> Any:
    """The matrix, copied into one segment that is kept, as an object store keeps its."""
    global memory
    events = Lake(told["lake"]).parts(told["table"], by="at")
    x = join(pq.read_table(told["labels"]), plan, {"events": events}, at="at")
    if memory is None or memory.size < x.nbytes:
        memory = SharedMemory(create=True, size=x.nbytes)
    there = np.ndarray(x.shape, x.dtype, memory.buf)
    there[:] = x
    return there.copy if told.get("save") else None


answer({"latest": lambda told: shared(NEWEST, told), "windows": lambda told: shared(WINDOWS, told)})
if memory is not None:
    memory.close()
    memory.unlink()
