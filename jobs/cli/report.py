"""`raymill report`: where the newest run's report is."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from raymill.jobs.cli.output import AsJson, emit, out
from raymill.jobs.cli.records import running_session
from raymill.runtime.errors import Unavailable
from raymill.runtime.home import current_home


def report(
    run: Annotated[str | None, typer.Argument(help="Id of a run; absent: the newest finished one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Path of the page; with --json the run's summary."""
    session = running_session()
    runs = (session.home if session else current_home()).runs
    done = sorted(runs.glob(f"{run or '*'}/summary.json"))
    if not done:
        raise Unavailable(f"no finished run {run or ''} under {runs}: `raymill run jobs/flights.py` makes one")
    summary = json.loads(done[-1].read_text())
    emit(summary, as_json, lambda: out.print(str(done[-1].with_name("report.html")), soft_wrap=True))
