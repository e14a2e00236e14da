"""Features of any moment, from pinned versions of the lake's tables: what a batch job reads for the online store.

The online store answers for the last days alone; the lake for every moment, with the same vectors bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.entities import entity_column, number
from raymill.actors.evaluate import Ints
from raymill.actors.feature_plan import FeaturePlan, ViewPlan
from raymill.actors.lake import Lake
from raymill.actors.lake_join import sources_of
from raymill.actors.parts import Parts, Rows
from raymill.actors.point_in_time import with_lookups
from raymill.actors.stream import MEMORY_BYTES, bounded
from raymill.runtime.errors import StoreError, UnknownEntity

Mask = npt.NDArray[np.bool_]


class LakeReader:
    """A `FeatureReader` over one version of each source; the sources are opened at the first question."""

    def __init__(self, lake: Lake, plan: FeaturePlan, versions: Mapping[str, int]) -> None:
        self._lake, self._plan, self._versions = lake, plan, dict(versions)
        self._sources: dict[str, pa.Table | Parts] | None = None

    def vectors(self, rows: pa.Table, at: Ints) -> npt.NDArray[np.float32]:
        """Feature vectors, float32 [rows, features], NaN for unknown, as `point_in_time.join` gives them.

        Raises:
            ContractError: a column is missing or has another type than declared.
            StoreError: a pinned version is gone.
        """
        return bounded(rows, self._plan, self._opened(), at=at, memory_bytes=MEMORY_BYTES)

    def unknown(self, rows: pa.Table, at: Ints) -> dict[int, UnknownEntity]:
        """The rows that the endpoint refuses, because a required view has no event of their entity."""
        required = [view for view in self._plan.event_views if view.required]
        if not required or not len(rows):
            return {}
        rows = with_lookups(rows, self._plan, self._opened(), at)
        found: dict[int, UnknownEntity] = {}
        for view in required:
            for i in np.flatnonzero(~self._seen(view, rows)).tolist():
                keys = [entity_column(rows.slice(i, 1), c, view.source.dtypes[c])[0].as_py() for c in view.entity]
                told = ", ".join(f"{c}={v!r}" for c, v in zip(view.entity, keys, strict=True))
                found.setdefault(i, UnknownEntity(f"{told} was never seen by view {view.name!r}, which requires it"))
        return found

    def _seen(self, view: ViewPlan, rows: pa.Table) -> Mask:
        """Whether the view has an event, of whatever time, of each row's entity."""
        source = self._opened()[view.source.name]
        numbered = number(view, Rows(source) if isinstance(source, pa.Table) else source, rows)
        there = np.zeros(numbered.groups + 1, dtype=np.bool_)  # the last one stands for no entity
        for codes in numbered.events:
            numbers = np.asarray(codes).astype(np.int64) - numbered.low
            there[numbers[(numbers >= 0) & (numbers < numbered.groups)]] = True
        return there[np.where(numbered.asked < 0, numbered.groups, numbered.asked)]

    def _opened(self) -> dict[str, pa.Table | Parts]:
        if self._sources is None:
            self._sources = sources_of(self._lake, self._plan, self._versions)
        return self._sources


def newest_versions(lake: Lake, plan: FeaturePlan) -> dict[str, int]:
    """The newest version of each table that the plan reads.

    Raises:
        StoreError: the lake has no such table.
    """
    found = {name: lake.version(name) for name in plan.sources}
    absent = sorted(name for name, version in found.items() if version is None)
    if absent:
        raise StoreError(f"the lake {lake.root} has no tables {absent}, which features are made of: ingest rows first")
    return {name: version for name, version in found.items() if version is not None}
