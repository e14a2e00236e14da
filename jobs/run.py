"""A run: its id, its folder, and how far it has come, so that a killed one goes on where it was.

`runs/<id>/loop.json` is written by atomic rename after each stage and each replayed day. What lies between two writes
is done again by a resumed run, under the same idempotency keys: nothing is doubled.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from raymill.runtime.errors import Conflict
from raymill.runtime.home import Home
from raymill.runtime.ids import new_ids
from raymill.runtime.whole_files import write_whole


@dataclass(slots=True)
class Progress:
    """What a resumed run needs to know."""

    run: str
    """Id of the run."""
    pipeline: str
    """Pipeline it runs."""
    began_s: float
    """Wall time of its beginning."""
    finished: bool = False
    """Whether it came to its end."""
    next_day: int | None = None
    """Start of the next day to replay, µs UTC; null: history is not served yet."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage → wall time spent in it."""
    rows: dict[str, Any] = field(default_factory=dict)
    """Counts of rows: ingested, quarantined by reason, seeded_bad, without_label."""
    requests: dict[str, Any] = field(default_factory=dict)
    """Counts of requests, and latencies in ms."""
    correction: dict[str, Any] | None = None
    """State of the retrain machine."""
    retrains: list[dict[str, Any]] = field(default_factory=list)
    """What each retrain came to."""
    gang_changes: list[dict[str, Any]] = field(default_factory=list)
    """Ranks lost and won."""
    trainings: list[dict[str, Any]] = field(default_factory=list)
    """Finished trainings, their epochs."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """What the gate said of each candidate: `{version, accept, reason}`."""
    drills: dict[str, Any] = field(default_factory=dict)
    """Faults brought about, and what came of them."""
    skipped: list[str] = field(default_factory=list)
    """What this cluster can not do, and why."""


class Run:
    """One run of one pipeline; at most one process works on it at a time."""

    def __init__(self, home: Home, progress: Progress) -> None:
        self.home = home
        self.progress = progress

    @property
    def id(self) -> str:
        """Id of the run, a ULID."""
        return self.progress.run

    @property
    def folder(self) -> Path:
        """`runs/<id>`."""
        return self.home.runs / self.id

    def save(self) -> None:
        """Write the progress, atomically."""
        write_whole(self.folder / "loop.json", json.dumps(asdict(self.progress), indent=1))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to the stage's seconds, and save."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = self.progress.seconds
            seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - began, 3)
        self.save()


@contextmanager
def open_run(home: Home, pipeline: str, spec_json: str) -> Iterator[Run]:
    """The newest unfinished run of the pipeline, else a new one; held until the block ends.

    Raises:
        Conflict: another process works on a run of this pipeline.
    """
    home.runs.mkdir(parents=True, exist_ok=True)
    with open(home.runs / f"{pipeline}.lock", "w") as lock:
        _hold(lock, pipeline)
        progress = newest(home, pipeline)
        if progress is None or progress.finished:
            progress = Progress(run=new_ids(1)[0], pipeline=pipeline, began_s=time.time())
        run = Run(home, progress)
        run.folder.mkdir(exist_ok=True)
        write_whole(run.folder / "spec.json", spec_json)
        run.save()
        yield run


def newest(home: Home, pipeline: str | None = None) -> Progress | None:
    """Progress of the newest run (ULIDs sort by time); None where there is none."""
    for file in sorted(home.runs.glob("*/loop.json"), reverse=True):
        progress = Progress(**json.loads(file.read_text()))
        if pipeline is None or progress.pipeline == pipeline:
            return progress
    return None


def _hold(lock: IO[str], pipeline: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        raise Conflict(f"another process runs {pipeline!r} on this home: wait for it, or stop it by its pid") from err
