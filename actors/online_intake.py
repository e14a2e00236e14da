"""Accepted rows on their way into the online store, or into one share of it, kept at the versions of the lake.

Invariants
- The online store holds every row that the lake held at its `lake_version`; what a crash or a missed batch left out is
  read again from the lake, which changes nothing that is in already.
- At most `IN_FLIGHT` batches are under way; who brings another one is told so and waits with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors.contract import arrow_schema
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.online import KEEP, OnlineStore
from raymill.actors.row_refs import table_of
from raymill.actors.windows import warm
from raymill.runtime.errors import Unavailable
from raymill.runtime.expressions import duration_us
from raymill.runtime.home import Home
from raymill.runtime.spec import Pipeline
from raymill.runtime.stores import places_of

IN_FLIGHT = 4
"""Batches that are taken in at once: one is written, the others are being read."""

PIECE_ROWS = 131_072
"""Rows that are read from the lake and taken in at once."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class OnlineIntake:
    """One writer's work, as a plain object or as an actor of its own; whatever is asked may be asked again."""

    def __init__(self, home: str | Path, pipeline: Pipeline, share_no: int = 0, keep: str = KEEP) -> None:
        """Of a store that is divided by entities it writes the share of that number."""
        places = places_of(Home(Path(home)), pipeline.stores)
        self._told = f"online features of {pipeline.name!r}, share {share_no} of {pipeline.stores.online_shards}"
        self._sources = {s.name: s for s in pipeline.sources}
        self._lake = Lake(places.lake)
        self._plan = FeaturePlan.of(pipeline)
        self._keep_us = duration_us(keep)
        self._store = OnlineStore(places.online, self._plan, keep=keep, share_no=share_no)
        self._free = threading.BoundedSemaphore(IN_FLIGHT)

    def start(self) -> None:
        """Bring the store to the lake's present versions; in a replay only to where the replay is."""
        warm()
        for declared in self._sources.values():  # the data actor does so too, and may come later
            self._lake.migrate(declared)
        horizon = self._store.horizon()
        for source in self._plan.sources:
            version = self._lake.version(source)
            if version is not None and (horizon is not None or self._store.lake_version(source) < version):
                self._catch_up(source, version, horizon)

    def stop(self) -> None:
        """Close the store; everything taken in is durable."""
        self._store.close()

    def health(self) -> dict[str, Any]:
        """Lake version up to which the store holds each source; −1: not known to."""
        return {"ok": True, "lake_versions": {s: self._store.lake_version(s) for s in self._plan.sources}}

    def ingest(self, source: str, rows: Any, lake_version: int | None) -> None:
        """Take accepted rows in, as `FeatureActor.ingest` does.

        Raises:
            Unavailable: as many batches as it takes are under way; to be asked again soon.
        """
        with admitted(self._free, self._told):
            if self._store.horizon() is not None or lake_version is None:
                self._store.ingest(source, table_of(rows))
            elif self._lacks_only(source, table_of(rows), lake_version):
                self._store.ingest(source, table_of(rows), lake_version=lake_version, whole=True)
            else:
                self._catch_up(source, lake_version, None)

    def rebuild(self, versions: dict[str, int], until: int | None) -> None:
        """Throw its views away and fill them from these versions of the lake, as `FeatureActor.rebuild` does."""
        pieces = {s: partial(self._pieces, s, v, until) for s, v in versions.items()}
        self._store.replace(pieces, versions, horizon=until)

    def replay_to(self, until: int) -> bool:
        """Move the replay on to `until`, µs UTC; False: the store must be filled anew, as of then, instead."""
        horizon = self._store.horizon()
        if horizon is None or horizon > until + self._keep_us // 2:
            return False
        if until > horizon:
            self._store.set_horizon(until)
        return True

    def _lacks_only(self, source: str, rows: pa.Table, version: int) -> bool:
        """Whether these rows are all that the store lacks of a version; some versions only merge parts."""
        have = self._store.lake_version(source)
        if have < 0 or have >= version - 1:
            return have >= version - 1
        return self._lake.count(source, version=have) + rows.num_rows == self._lake.count(source, version=version)

    def _catch_up(self, source: str, version: int, horizon: int | None) -> None:
        since = self._store.lake_version(source) if horizon is None else -1
        if since >= 0:
            rows = self._lake.read(
                source, version=version, columns=list(self._plan.source_columns(source)), since=since
            )
        else:
            for rows in self._pieces(source, version, horizon):
                self._store.ingest(source, rows)
            rows = arrow_schema(self._sources[source]).empty_table()
        self._store.ingest(source, rows, lake_version=version if horizon is None else None, whole=True)

    def _pieces(self, source: str, version: int, end_at: int | None) -> Iterator[pa.Table]:
        """What the views need of a source's rows with event time before `end_at`."""
        time, columns = self._plan.sources[source].time, list(self._plan.source_columns(source))
        parts = self._lake.parts(source, version=version, by=time)
        for block in parts.blocks():
            least = parts.extremes(block, time)
            if end_at is not None and least is not None and least[0] >= end_at:
                continue
            rows = parts.read(block, columns)
            if end_at is not None:
                rows = rows.filter(pc.less(rows[time], pa.scalar(moment(end_at))))
            for first in range(0, rows.num_rows, PIECE_ROWS):
                yield rows.slice(first, PIECE_ROWS)
            parts.release()


class OnlineShards:
    """The intakes of all shares, asked at once; while one is away the others go on with the same batch."""

    def __init__(self, shards: Sequence[Any], pipeline: str) -> None:
        self._shards = shards
        self._told = f"online features of {pipeline!r}"
        self._threads = ThreadPoolExecutor(2 * IN_FLIGHT * len(shards), thread_name_prefix="shards")
        self._free = threading.BoundedSemaphore(IN_FLIGHT)

    def start(self) -> None:
        """They are started by themselves."""

    def stop(self) -> None:
        """They are stopped by who started them."""
        self._threads.shutdown()

    def health(self) -> dict[str, Any]:
        """Of each source the lake version of the share that is least far."""
        found = [h["lake_versions"] for h in self._all(lambda shard: shard.health())]
        return {"ok": True, "lake_versions": {s: min(f[s] for f in found) for s in found[0]}, "shards": len(found)}

    def ingest(self, source: str, rows: Any, lake_version: int | None) -> None:
        """As `OnlineIntake.ingest`; the rows are in every share when it is done."""
        with admitted(self._free, self._told):
            self._all(lambda shard: shard.ingest(source, rows, lake_version))

    def rebuild(self, versions: dict[str, int], until: int | None) -> None:
        """As `OnlineIntake.rebuild`; each share in one transaction."""
        self._all(lambda shard: shard.rebuild(versions, until))

    def replay_to(self, until: int) -> bool:
        """As `OnlineIntake.replay_to`."""
        return all(self._all(lambda shard: shard.replay_to(until)))

    def _all(self, ask: Callable[[Any], Any]) -> list[Any]:
        """What each answers; one that fails is told of when the others are done."""
        calls = [self._threads.submit(ask, shard) for shard in self._shards]
        wait(calls)
        return [call.result() for call in calls]


@contextmanager
def admitted(free: threading.BoundedSemaphore, told: str) -> Iterator[None]:
    """Hold one of the places for a batch.

    Raises:
        Unavailable: all are taken.
    """
    if not free.acquire(blocking=False):
        raise Unavailable(f"{told}: {IN_FLIGHT} batches are under way, wait and send this one again")
    try:
        yield
    finally:
        free.release()


def moment(us: int) -> datetime:
    """µs UTC as what the lake compares with."""
    return _EPOCH + timedelta(microseconds=us)
