"""The point-in-time join over several actors: each takes the rows of its share of the entities, from stored parts.

Labels go out and answers come back through Ray's object store, both read in place. The answer is that of
`point_in_time.join`, bit for bit, whatever the number of shards and however many of them die on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.aggregates import BEFORE_ALL
from raymill.actors.evaluate import Ints, moments
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.parts import Parts
from raymill.actors.point_in_time import join
from raymill.actors.scan import place_rows
from raymill.actors.sharding import Dispatch, Piece, divide, of_requests, part_of, rows_of
from raymill.actors.stream import MEMORY_BYTES, bounded
from raymill.runtime.errors import ContractError, Unavailable
from raymill.runtime.spawn import ask, companion

Matrix = npt.NDArray[np.float32]


class Shard:
    """One of the actors: joins pieces, one at a time."""

    def __init__(self, lake: str, memory_bytes: int = MEMORY_BYTES, workers: int = 1) -> None:
        """Nothing is read yet.

        Args:
            lake: folder or URL of the lake.
            memory_bytes: what a join may take; a larger one is streamed.
            workers: threads.
        """
        self._lake = Lake(lake)
        self._memory_bytes, self._workers = memory_bytes, workers
        self._opened: dict[tuple[str, int], Parts] = {}

    def start(self) -> None:
        """Ready from the beginning."""

    def join(
        self, piece: Piece, plan: str, rows: pa.Table, at: Ints, versions: Mapping[str, int]
    ) -> tuple[Ints, Matrix]:
        """Numbers of the piece's rows, and the features of its views for them.

        Args:
            piece: what to do.
            plan: the whole plan, as JSON.
            rows: all rows, with the plan's request columns.
            at: moment of each.
            versions: source → version of its lake table.
        """
        whole = FeaturePlan.from_json(plan)
        mine = rows_of(piece, whole, rows)
        part, _ = part_of(whole, piece.views)
        sources = {name: self._parts(name, versions[name], s.time) for name, s in part.sources.items()}
        rows, at = rows.take(pa.array(mine)), at[mine]
        return mine, bounded(rows, part, sources, at=at, memory_bytes=self._memory_bytes, workers=self._workers)

    def _parts(self, table: str, version: int, by: str) -> Parts:
        if (table, version) not in self._opened:
            self._opened = {
                k: p for k, p in self._opened.items() if k[0] != table
            }  # the version before is not asked for
            self._opened[table, version] = self._lake.parts(table, version=version, by=by)
        return self._opened[table, version]


class FeatureShards:
    """A gang of shards, as one join."""

    def __init__(
        self, lake: str, count: int, *, memory_bytes: int = MEMORY_BYTES, workers: int = 1, shard: type[Shard] = Shard
    ) -> None:
        """Start them; they end with this process, or by `close`.

        Args:
            lake: folder or URL of the lake; every node that may hold a shard must reach it.
            count: how many.
            memory_bytes: of each.
            workers: threads of each.
            shard: class of the actors.
        """
        self._new: Callable[[], Any] = lambda: companion(shard, lake, memory_bytes, workers)
        self._shards = [self._new() for _ in range(count)]

    def __len__(self) -> int:
        return len(self._shards)

    def close(self) -> None:
        """End them."""
        import ray

        for shard in self._shards:
            ray.kill(shard)
        self._shards = []

    def join(self, rows: pa.Table, plan: FeaturePlan, versions: Mapping[str, int], *, at: str | Ints) -> Matrix:
        """As `point_in_time.join`, from the lake's tables of these versions.

        Raises:
            ContractError: as there.
            StoreError: a version is gone, or one piece brought several shards down.
        """
        import ray

        moment = moments(rows.column(at), BEFORE_ALL) if isinstance(at, str) else np.asarray(at, dtype=np.int64)
        if len(moment) != len(rows):
            raise ContractError(f"{len(moment)} moments for {len(rows)} rows: give one each")
        missing = [c for c in plan.request_columns if c not in rows.column_names]
        if missing:
            raise ContractError(f"columns {missing} are missing: the rows have {', '.join(rows.column_names)}")
        sent = ray.put(rows.select(list(plan.request_columns)).combine_chunks()), ray.put(moment)
        out = np.empty((len(rows), len(plan.names)), dtype=np.float32)
        whole, dispatch = plan.to_json(), Dispatch(divide(plan, len(self)), len(self))
        running: dict[Any, tuple[int, Piece]] = {}
        while not dispatch.finished:
            for number, piece in dispatch.next():
                call = self._shards[number].join.remote(piece, whole, *sent, dict(versions))
                running[call] = number, piece
            ready = ray.wait(list(running), num_returns=1)[0][0]
            number, piece = running[ready]
            try:
                found, x = ask(ready)
            except Unavailable:
                dispatch.lost(number)
                running = {call: of for call, of in running.items() if of[0] != number}
                self._shards[number] = self._new()
                continue
            del running[ready]
            dispatch.done(number, piece)
            place_rows(x, found, part_of(plan, piece.views)[1], out)
        part, columns = part_of(plan, of_requests(plan))
        if len(columns):
            place_rows(join(rows, part, {}, at=moment), np.arange(len(rows)), columns, out)
        return out
