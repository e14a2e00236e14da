"""The join of rows with the lake's tables as they are pinned: in this process, or over shards where they are large."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.evaluate import Ints
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.parts import Parts
from raymill.actors.shards import FeatureShards
from raymill.actors.stream import MEMORY_BYTES, bounded

SHARDED_FROM = 50_000_000
"""Rows of all sources together from which shards are worth their start (two seconds) and the way there and back."""
MOST_SHARDS = 16
"""More of them than that wait for the disk."""


class LakeJoin:
    """Joins from one lake; its shards, once there are any, stay for the next join."""

    def __init__(self, lake: Lake, place: str, *, memory_bytes: int = MEMORY_BYTES) -> None:
        """`place` is where the lake is, for shards that open it themselves."""
        self._lake, self._place, self._memory_bytes = lake, place, memory_bytes
        self._shards: FeatureShards | None = None

    def close(self) -> None:
        """End the shards."""
        if self._shards is not None:
            self._shards.close()
        self._shards = None

    def join(
        self, rows: pa.Table, plan: FeaturePlan, versions: Mapping[str, int], *, at: Ints
    ) -> npt.NDArray[np.float32]:
        """As `point_in_time.join`, from the lake's tables of these versions.

        Raises:
            ContractError: as there.
            StoreError: a version is gone, or can not be read.
        """
        sources = sources_of(self._lake, plan, versions)
        count = _processors() if sum(len(s) for s in sources.values()) >= SHARDED_FROM else 1
        if count < 2:
            return bounded(rows, plan, sources, at=at, memory_bytes=self._memory_bytes)
        if self._shards is None:
            self._shards = FeatureShards(self._place, count, memory_bytes=self._memory_bytes)
        return self._shards.join(rows, plan, versions, at=at)


def sources_of(lake: Lake, plan: FeaturePlan, versions: Mapping[str, int]) -> dict[str, pa.Table | Parts]:
    """The lake's tables that a plan reads, as they were at these versions.

    Raises:
        StoreError: a version is gone, or can not be read.
    """
    return {name: _parts(lake, name, versions[name], s.time) for name, s in plan.sources.items()}


def _parts(lake: Lake, table: str, version: int, by: str) -> pa.Table | Parts:
    parts = lake.parts(table, version=version, by=by)
    # Of a table that never had a row there is no file, which would say what its columns are.
    return parts if len(parts) else lake.read(table, version=version)


def _processors() -> int:
    """Of the cluster, as many as are of use; 1 without a cluster."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return 1
    return min(int(ray.cluster_resources().get("CPU", 1)), MOST_SHARDS)
