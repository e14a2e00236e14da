"""Who holds the quarantine now: the running pipeline's data actor, or one that is made here on the home itself.

Reingested rows reach the lake first, then the features and the monitor, where they run; only then are they closed.
A death in between leaves them pending, and the next reingest brings them to their end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymill.actors.lakes import Lakes
from raymill.actors.quarantine import Quarantine
from raymill.cluster.session import Session
from raymill.jobs import pipeline_file
from raymill.jobs.cli.records import open_records
from raymill.jobs.intake import open_intake
from raymill.runtime.errors import Usage
from raymill.runtime.messages import Ingested
from raymill.runtime.spawn import Remote, named
from raymill.runtime.stores import Stores


@dataclass(frozen=True, slots=True)
class Desk:
    """Where quarantined rows are shown, mended and sent in again."""

    rows: Any
    """A data actor, one that is reached by name, or the bare `Quarantine`."""
    takers: tuple[Any, ...] = ()
    """Features and monitor of the pipeline, where they run."""

    def reingest(self, ids: Sequence[str]) -> list[Ingested]:
        """Land the rows, let features and monitor take them, close them; errors as in `DataActor.reingest`.

        Raises:
            Usage: no pipeline is known, whose contracts the rows would have to pass.
        """
        if isinstance(self.rows, Quarantine):
            raise Usage(
                "no pipeline runs whose contracts the rows would have to pass: name its file, "
                "e.g. --pipeline jobs/flights.py"
            )
        landed: list[Ingested] = self.rows.reingest(list(ids))
        for done in landed:
            if done.accepted:
                for taker in self.takers:
                    taker.take(done)
            self.rows.settle(done.batch_id)
        return landed


@contextmanager
def open_desk(pipeline: str | None, session: Session | None) -> Iterator[Desk]:
    """The desk of a pipeline, which is named or given by its file; absent: the running one, else the bare quarantine.

    `session` is the running cluster, joined; None: none runs.

    Raises:
        Usage: several pipelines run and none was named, or the named one does not run.
        Unavailable: nothing was ever run on this home.
        SpecError: the pipeline file is wrong.
    """
    if pipeline is not None and pipeline.endswith(".py"):
        with open_intake(pipeline_file.load(Path(pipeline)), session) as intake:
            yield Desk(intake.data, intake.takers)
        return
    with open_records() as (home, records):
        running = running_desk(pipeline) if session is not None else None
        if running is None and pipeline is not None:
            raise Usage(f"pipeline {pipeline!r} does not run: give the path of its file, e.g. jobs/flights.py")
        yield running or Desk(Quarantine(Lakes(home, records.events).at(Stores()), home.locks / "quarantine"))


def running_desk(name: str | None) -> Desk | None:
    """The desk of the pipeline that runs under this name, or of the only one; None: it does not run."""
    running = [n.removeprefix("data/") for n in named("data/")]
    if name is None and len(running) > 1:
        raise Usage(f"pipelines {running} run: name one, e.g. --pipeline {running[0]}")
    name = name or (running[0] if running else None)
    if name not in running:
        return None
    takers = [n for n in (f"features/{name}", f"drift/{name}") if n in named("")]
    return Desk(Remote(f"data/{name}"), tuple(Remote(n) for n in takers))
