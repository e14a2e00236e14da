"""Feed: the sources that come by themselves, each from its stream into the lake and then the online store.

Invariants
- A batch is acknowledged when the lake and the online store hold it; until then it comes again under its id, so kill -9
  of feed, data actor, feature actor or the stream's server loses nothing and doubles nothing.
- One batch a source is under way: what comes faster waits in the stream.
- What can not be taken in is quarantined with the reason and the stream goes on; who can not be reached is asked again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import orjson

from raymill.actors.contract import arrow_schema
from raymill.actors.delta_follow import DeltaFollower
from raymill.actors.directory import WatchedDirectory
from raymill.actors.incoming import Batch, IsTaken, Stream
from raymill.actors.redis_stream import RedisGroup
from raymill.actors.row_text import json_rows
from raymill.runtime.errors import Conflict, ContractError, RaymillError, SpecError
from raymill.runtime.messages import Ingested
from raymill.runtime.spec import DeltaTable, Directory, RedisStream, Source

WAIT_S = 0.5
"""Longest wait for a batch before the loop looks whether it is to stop."""
_LONGEST_PAUSE_S = 5.0
"""Between two tries at what can not be reached; the first pause is a fiftieth of it, each next one twice as long."""


@dataclass(slots=True)
class Progress:
    """How one source's feed stands."""

    state: str = "starting"
    """`starting`, `waiting` (nothing new), `taking`, `retrying` (see `error`), `stopped`."""
    batches: int = 0
    """Batches taken in since the start."""
    rows: int = 0
    """Rows accepted of them, without those that an earlier process had taken in."""
    quarantined: dict[str, int] = field(default_factory=dict)
    """Reason → rows, entries or files that went to quarantine."""
    last_batch: str = ""
    """Id of the newest batch."""
    last_s: float = 0.0
    """Wall time at which it was in."""
    waiting: int | None = None
    """Entries of the stream, files or versions that are not in yet; null: the carrier can not say."""
    level_s: float = field(default_factory=time.time)
    """Wall time at which nothing more was waiting, or of the start."""
    error: str = ""
    """What is tried again, and why."""

    def to_json(self) -> dict[str, Any]:
        """JSON values; with `behind_s`, for how long something has been waiting without a break."""
        told = asdict(self)
        level_s = told.pop("level_s")
        return {**told, "behind_s": 0.0 if self.state == "waiting" else round(time.time() - level_s, 3)}


class Feed:
    """Follows a pipeline's sources, each in a thread of its own."""

    def __init__(
        self,
        sources: Sequence[Source],
        data: Any,
        takers: Sequence[Any] = (),
        *,
        consumer: str = "feed",
    ) -> None:
        """Nothing is reached yet.

        Args:
            sources: those to follow; the others are passed over.
            data: the DataActor, or a handle with its methods.
            takers: features and monitor: their `take` is told of each batch that the lake holds, perhaps twice.
            consumer: name of this feed wherever a carrier wants one: the same after a restart, another feed's never.
        """
        self._sources = [s for s in sources if is_followed(s)]
        self._data, self._takers = data, tuple(takers)
        self._streams = {s.name: open_stream(s, partial(data.has_batch, s.name), consumer) for s in self._sources}
        self._progress = {s.name: Progress() for s in self._sources}
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to follow."""
        self._stop.clear()
        self._threads = [threading.Thread(target=self._follow, args=(s,), daemon=True) for s in self._sources]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End after the batches that are under way; calling it again does nothing."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def health(self) -> dict[str, Any]:
        """Whether every source is reached, and how each stands (see `Progress`)."""
        told = {name: progress.to_json() for name, progress in self._progress.items()}
        return {"ok": all(p["state"] != "retrying" for p in told.values()), "sources": told}

    def _follow(self, source: Source) -> None:
        stream, progress, pause_s = self._streams[source.name], self._progress[source.name], 0.0
        while not self._stop.wait(pause_s):
            try:
                batch = stream.next(WAIT_S)
                if batch is not None:
                    progress.state = "taking"
                    self._take(source, batch, progress)
                    stream.acknowledge(batch)
                    progress.batches += 1
                    progress.last_batch, progress.last_s = batch.batch_id, time.time()
                    progress.waiting = stream.waiting()
                else:
                    progress.state, progress.waiting, progress.level_s = "waiting", 0, time.time()
                progress.error, pause_s = "", 0.0
            except Exception as err:  # noqa: BLE001 - edge of the loop: told, and tried again
                progress.error = err.message if isinstance(err, RaymillError) else f"{type(err).__name__}: {err}"
                progress.state = "retrying"
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2 or _LONGEST_PAUSE_S / 50)
        stream.close()
        progress.state = "stopped"

    def _take(self, source: Source, batch: Batch, progress: Progress) -> None:
        for _, reason in batch.rejected:
            progress.quarantined[reason] = progress.quarantined.get(reason, 0) + 1
        for done in take(self._data, source, batch):
            progress.rows += 0 if done.duplicate else done.accepted
            for reason, count in done.quarantined.items():
                progress.quarantined[reason] = progress.quarantined.get(reason, 0) + count
            for taker in self._takers:
                taker.take(done)


def take(data: Any, source: Source, batch: Batch) -> list[Ingested]:
    """Bring a batch into the lake, or into quarantine as a whole; what the lake then holds of it.

    Raises:
        StoreError: the lake can not be written; doing it again is safe.
        Unavailable: the data actor does not answer; doing it again is safe.
    """
    aside = f"{batch.batch_id}/aside"
    if batch.rejected:
        data.set_aside(source.name, batch.rejected, batch_id=aside)
    at = time.time_ns() // 1000 if batch.is_live else None
    try:
        return [data.ingest(source.name, batch.rows, batch_id=batch.batch_id, at=at)]
    except (ContractError, Conflict) as err:
        data.set_aside(source.name, _refused(batch, err), batch_id=aside)
        if isinstance(err, Conflict):  # the lake has other rows under this id
            return []
        return [data.ingest(source.name, arrow_schema(source).empty_table(), batch_id=batch.batch_id)]


def is_followed(source: Source) -> bool:
    """Whether its rows come by themselves."""
    return isinstance(source.read, Directory | DeltaTable | RedisStream)


def open_stream(source: Source, is_taken: IsTaken, consumer: str) -> Stream:
    """The stream of a source; nothing is reached before its `open` or `next`.

    Raises:
        SpecError: the source declares none.
    """
    read = source.read
    if isinstance(read, RedisStream):
        return RedisGroup(source, read, consumer)
    if isinstance(read, Directory):
        return WatchedDirectory(source, read, is_taken)
    if isinstance(read, DeltaTable):
        return DeltaFollower(source, read, is_taken)
    raise SpecError(
        f"source {source.name!r} can not be followed: give it `read=Directory(…)`, `DeltaTable(…)` or `RedisStream(…)`"
    )


def reach(source: Source) -> None:
    """See whether a source's stream is there.

    Raises:
        StoreError: it can not be reached.
        SpecError: the source declares none.
    """
    stream = open_stream(source, lambda batch_id: False, "")
    stream.open()
    stream.close()


def _refused(batch: Batch, err: RaymillError) -> list[tuple[str, str]]:
    """The rows of a batch that does not fit as a whole, or the file that stands for them."""
    reason = f"batch:{err.code}"
    if batch.origin:
        told = orjson.loads(batch.origin) | {"rows": batch.rows.num_rows, "error": err.message}
        return [(orjson.dumps(told).decode(), reason)]
    return [(row, reason) for row in json_rows(batch.rows)]
