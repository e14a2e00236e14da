"""raymill's side of the point-in-time benchmark: from the lake's parts to a float32 matrix in shared memory.

`latest`, `windows`: this process alone, the matrix copied into one segment that is kept, as an object store keeps its.
`sharded`: over actors of Ray, one thread each, the matrix put into Ray's object store.
"""

from __future__ import annotations

import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.ours.point_in_time_plans import NEWEST, NEWEST_BY_NAME, WINDOWS
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.point_in_time import join
from raymill.actors.shards import FeatureShards

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))
from answering import answer

memory: SharedMemory | None = None
gangs: dict[int, FeatureShards] = {}


def shared(plan: FeaturePlan, told: dict[str, Any]) -> Any:
    """The matrix in shared memory."""
    global memory
    events = Lake(told["lake"]).parts(told["table"], by="at")
    x = join(pq.read_table(told["labels"]), plan, {next(iter(plan.sources)): events}, at="at")
    if memory is None or memory.size < x.nbytes:
        memory = SharedMemory(create=True, size=x.nbytes)
    there = np.ndarray(x.shape, x.dtype, memory.buf)
    there[:] = x
    return there.copy if told.get("save") else None


def start_shards(told: dict[str, Any]) -> None:
    """Gangs of these sizes, before anything is timed."""
    import ray

    ray.init(address="local", include_dashboard=False, num_cpus=max(told["gangs"]), log_to_driver=False)
    for count in told["gangs"]:
        gangs[count] = FeatureShards(told["lake"], count)


def sharded(told: dict[str, Any]) -> Any:
    """The matrix in Ray's object store, by `shards` actors."""
    import ray

    plan = WINDOWS if told["windows"] else NEWEST
    version = Lake(told["lake"]).version("events")
    x = gangs[told["shards"]].join(pq.read_table(told["labels"]), plan, {"events": version or 0}, at="at")
    ray.put(x)
    return x if told.get("save") else None


answer(
    {
        "latest": lambda told: shared(NEWEST, told),
        "windows": lambda told: shared(WINDOWS, told),
        "by_name": lambda told: shared(NEWEST_BY_NAME, told),
        "start_shards": start_shards,
        "sharded": sharded,
    }
)
if memory is not None:
    memory.close()
    memory.unlink()
for gang in gangs.values():
    gang.close()
if gangs:
    import ray

    ray.shutdown()
