"""A watched folder as a `Stream`: each complete file in it, in batches, once.

Invariants
- A file is what its name, size and time of change say; which files are in is asked of the lake, so a restarted watcher
  takes none twice.
- A file that its writer has not finished is left alone: Parquet and Arrow files show their end, others are taken when
  they have not changed for `settle`.
- A file that can not be read is set aside with the reason, once, and holds nothing up; changed, it is another file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import orjson

from raymill.actors.contract import arrow_schema
from raymill.actors.files import File, files_in
from raymill.actors.incoming import Batch, IsTaken
from raymill.actors.sources import end_of, named, read_batches
from raymill.runtime.errors import ContractError
from raymill.runtime.expressions import duration_us
from raymill.runtime.spec import Directory, Source

POLL_S = 0.2
"""Time between two looks into the folder."""
STALLED_S = 60.0
"""A file without its end that has not changed for so long gets none any more: it is read, which says what is wrong."""
ATTEMPTS = 3
"""Tries at reading a file before it is set aside: an object store may fail for a moment."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A file, and since when it is as it is."""

    file: File
    """The file as it was last seen."""
    since_s: float
    """Monotonic time at which it was first seen so."""


def sighted(files: Sequence[File], before: dict[str, Sighting], now_s: float) -> dict[str, Sighting]:
    """What is in the folder now, by place; a file that changed begins anew."""
    found = {}
    for file in files:
        known = before.get(file.place)
        found[file.place] = known if known is not None and known.file == file else Sighting(file, now_s)
    return found


def is_ready(seen: Sighting, is_whole: bool | None, settle_s: float, now_s: float) -> bool:
    """Whether a file may be read: it shows its end, or nobody has written to it for long enough."""
    if is_whole:
        return True
    return now_s - seen.since_s >= (settle_s if is_whole is None else STALLED_S)


class WatchedDirectory:
    """Follows a folder; a `Stream`."""

    def __init__(self, source: Source, declared: Directory, is_taken: IsTaken) -> None:
        self._source, self._declared, self._is_taken = source, declared, is_taken
        self._settle_s = duration_us(declared.settle) / 1e6
        self._seen: dict[str, Sighting] = {}
        self._done: set[str] = set()
        """Ids of files that are in the lake, of those that are still in the folder."""
        self._failures: dict[str, int] = {}
        self._given: Batch | None = None
        self._coming: Iterator[Batch] = iter(())

    def open(self) -> None:
        files_in(self._declared.path, self._declared.pattern)

    def close(self) -> None:
        self._coming, self._given = iter(()), None

    def next(self, wait_s: float) -> Batch | None:
        end = time.monotonic() + wait_s
        while self._given is None:
            self._given = next(self._coming, None) or self._look()
            if self._given is None:
                left = end - time.monotonic()
                if left <= 0:
                    return None
                time.sleep(min(POLL_S, left))
        return self._given

    def acknowledge(self, batch: Batch) -> None:
        self._given = None
        if batch.batch_id == end_of(batch.position):
            self._done.add(batch.position)

    def waiting(self) -> int:
        return sum(name.file.id not in self._done for name in self._seen.values())

    def _look(self) -> Batch | None:
        """The first batch of a file that is ready and not in the lake."""
        now_s = time.monotonic()
        files = files_in(self._declared.path, self._declared.pattern)
        self._seen = sighted(files, self._seen, now_s)
        self._done &= {file.id for file in files}
        for seen in sorted(self._seen.values(), key=lambda s: (s.file.mtime_ns, s.file.name)):
            file = seen.file
            if file.id in self._done or not is_ready(seen, file.is_whole(), self._settle_s, now_s):
                continue
            if self._is_taken(end_of(file.id)):
                self._done.add(file.id)
                continue
            self._coming = self._batches(file)
            if (batch := next(self._coming, None)) is not None:
                return batch
        return None

    def _batches(self, file: File) -> Iterator[Batch]:
        try:
            for batch_id, rows in named(file.id, read_batches(file, self._source), self._source):
                yield Batch(batch_id=batch_id, rows=rows, origin=_told(file, ""), position=file.id)
        except ContractError as err:
            self._failures[file.id] = self._failures.get(file.id, 0) + 1
            if self._failures[file.id] >= ATTEMPTS:
                del self._failures[file.id]
                aside = ((_told(file, err.message), "file:unreadable"),)
                none = arrow_schema(self._source).empty_table()
                yield Batch(batch_id=end_of(file.id), rows=none, rejected=aside, position=file.id)


def _told(file: File, error: str) -> str:
    facts = {"file": file.place, "bytes": file.size, "mtime_ns": file.mtime_ns}
    return orjson.dumps(facts | ({"error": error} if error else {})).decode()
