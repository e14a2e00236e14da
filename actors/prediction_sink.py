"""Where the prediction log ends: the lake table `predictions` and the monitor, each row in each of them once.

Invariant: of the rows of one model and id only the first that arrives stays (of a shadow's, the first per version),
whichever replicas of whichever hosts sent them: what is new of a segment is appended to the version of the table that
it was compared with, else compared again. The replicas of a host take turns by a file lock, so that this is rare.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors.lake import Lake
from raymill.runtime.errors import Conflict
from raymill.runtime.turns import turn

TABLE = "predictions"
LOOK_BACK_US = 3_600_000_000  # a retry has the moment of the first try, or one a deadline later; rows are found by it

Observe = Callable[[str, str, pa.Table], bool]
"""(model, segment, rows): hands the monitor of that model a segment, idempotent by segment; False: it has none now."""


class LakeSink:
    """Ships segments to the lake of each model, after the monitor has seen them."""

    def __init__(
        self, lake_of: Callable[[str], Lake], lock: Path, observe: Observe, *, vectors_are_new: bool = False
    ) -> None:
        """A sink.

        Args:
            lake_of: lake of a model.
            lock: the file by which the replicas of a host take turns.
            observe: shows rows to a monitor.
            vectors_are_new: rows without a text, which came as ready vectors, have their ids from who answered them,
                so that none can be there already; in a batch job the table may name them.
        """
        self._lake_of = lake_of
        self._vectors_are_new = vectors_are_new
        self._lock = lock
        self._observe = observe
        self._whole: set[Lake] = set()
        """Lakes whose table has every column."""

    def ship(self, segment: str, rows: pa.Table) -> None:
        """Append what is new of the segment; the monitor first, since the append is what marks it as done."""
        with turn(self._lock):
            lakes: dict[Lake, list[str]] = {}
            for model in rows.column("model").unique().to_pylist():
                lakes.setdefault(self._lake_of(model), []).append(model)
            for lake, models in lakes.items():
                self._append(lake, segment, _of(models, rows) if len(lakes) > 1 else rows)

    def _append(self, lake: Lake, segment: str, rows: pa.Table) -> None:
        if lake.version(TABLE) is None:
            lake.append(TABLE, rows.slice(0, 0), batch_id="created", by="at")
        if lake not in self._whole:
            lake.add_columns(TABLE, rows.schema)  # of a table that an older raymill made
            self._whole.add(lake)
        while not lake.has_batch(TABLE, segment):
            version = lake.version(TABLE)
            fresh = self._fresh(lake, version, rows)
            lonely = self._show(segment, fresh, fresh.column("model").unique().to_pylist())
            try:
                lake.append(TABLE, fresh, batch_id=segment, after=version, by="at")
            except Conflict:
                continue
            # A monitor that came meanwhile read the lake before this append.
            self._show(segment, fresh, lonely)

    def _fresh(self, lake: Lake, version: int | None, rows: pa.Table) -> pa.Table:
        """The rows that a version of the table does not have, each once."""
        doubtful = pc.is_valid(rows.column("row" if self._vectors_are_new else "id"))
        if not pc.any(doubtful).as_py():
            return rows
        names = _names(rows)
        if pc.count_distinct(names).as_py() < rows.num_rows:
            _, first = np.unique(names.to_numpy(zero_copy_only=False), return_index=True)
            first.sort()
            rows, names, doubtful = (column.take(pa.array(first)) for column in (rows, names, doubtful))
        asked = rows.filter(doubtful)
        moments, ids = pc.min_max(asked.column("at")).as_py(), asked.column("id").unique()
        ends = pc.min_max(ids).as_py()
        where = [
            ("at", ">=", moments["min"] - timedelta(microseconds=LOOK_BACK_US)),
            ("at", "<=", moments["max"]),
            ("id", ">=", ends["min"]),  # ids made here grow with time: parts that are older are not even opened
            ("id", "<=", ends["max"]),
            ("id", "in", ids),
        ]
        there = lake.read(TABLE, version=version, columns=["model", "id", "role", "version"], where=where)
        return rows.filter(pc.invert(pc.is_in(names, value_set=_names(there))))

    def _show(self, segment: str, rows: pa.Table, models: list[str]) -> list[str]:
        """Hand each model's monitor its rows; the models that have none."""
        alone = len(models) == 1 and bool(pc.all(pc.equal(rows.column("model"), models[0])).as_py())
        return [m for m in models if not self._observe(m, segment, rows if alone else _of([m], rows))]


def _of(models: list[str], rows: pa.Table) -> pa.Table:
    return rows.filter(pc.is_in(rows.column("model"), value_set=pa.array(models)))


def _names(rows: pa.Table) -> pa.Array:
    """What must be unique in the table."""
    shadow = pc.equal(rows.column("role"), "shadow")
    version = pc.if_else(shadow, pc.cast(rows.column("version"), pa.string()), "")
    joined = pc.binary_join_element_wise(rows.column("model"), rows.column("id"), version, "\x1f")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined
