"""`raymill feed PIPELINE`: follow the sources whose rows come by themselves, until interrupted."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymill.jobs.cli.output import AsJson, emit, err, out
from raymill.jobs.cli.records import joined_session
from raymill.runtime.errors import RaymillError, Usage
from raymill.runtime.expressions import duration_us
from raymill.runtime.home import current_home

if TYPE_CHECKING:
    from raymill.jobs.feature_watch import LiveChecks
    from raymill.jobs.intake import Intake
    from raymill.runtime.spec import Pipeline

LOOK_S = 0.2
"""Time between two looks at how the feeds stand."""


def feed(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline file, e.g. jobs/flights.py.")],
    idle: Annotated[str | None, typer.Option(help="End when nothing came for so long, e.g. 10s.")] = None,
    check_every: Annotated[
        str, typer.Option(help="Time between two checks of served vectors against the lake.")
    ] = "10m",
    as_json: AsJson = False,
) -> None:
    """Watched folders, Delta tables, Redis streams → lake and online store; each batch once, whatever is killed."""
    from raymill.actors.feed import is_followed, reach
    from raymill.jobs import pipeline_file

    declared = pipeline_file.load(pipeline)
    followed = [s for s in declared.sources if is_followed(s)]
    if not followed:
        raise Usage(
            f"no source of pipeline {declared.name!r} comes by itself: declare `read=Directory(…)`, `DeltaTable(…)` "
            f"or `RedisStream(…)`, or push files by `raymill ingest`"
        )
    for source in followed:
        reach(source)  # a wrong address is told before anything starts
    idle_s = duration_us(idle) / 1e6 if idle else None
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    check_s = duration_us(check_every) / 1e6
    session = joined_session()
    from raymill.jobs.feature_watch import LiveChecks
    from raymill.jobs.intake import open_intake

    home = session.home if session else current_home()
    with open_intake(declared, session) as intake:
        document = _run(declared, intake, idle_s, LiveChecks(declared, home, intake.records, check_s))
    emit(document, as_json, lambda: _print(document))


def _run(pipeline: Pipeline, intake: Intake, idle_s: float | None, checks: LiveChecks) -> dict[str, Any]:
    """Start the feed, watch it and what is served meanwhile, end it; how its sources stood in the end."""
    from raymill.jobs.intake import running_feed

    told: dict[str, Any] = {}
    try:
        with running_feed(pipeline, intake) as feed:
            quiet_since = time.monotonic()
            while idle_s is None or time.monotonic() - quiet_since < idle_s:
                time.sleep(LOOK_S)
                now = feed.health()["sources"]
                for name, source in now.items():
                    _say(name, source, told.get(name))
                moved = any(s["state"] != "waiting" or s != told.get(n) for n, s in now.items())
                quiet_since = time.monotonic() if moved else quiet_since
                told = now
                _check(checks)
            feed.stop()
            told = feed.health()["sources"]
    except KeyboardInterrupt:
        err.print("interrupted: what was not acknowledged comes again with the next `raymill feed`")
    return told


def _check(checks: LiveChecks) -> None:
    """Tell what was served and is not what the lake gives; a check that fails is told, and the feed goes on."""
    try:
        judged = checks.look()
    except RaymillError as error:
        err.print(f"consistency: not checked: {error.message}", soft_wrap=True)
        return
    if judged is not None and judged.alert:
        err.print(f"ALARM consistency: {judged.reason}", soft_wrap=True)


def _say(name: str, now: dict[str, Any], before: dict[str, Any] | None) -> None:
    if now["error"] and (before is None or now["error"] != before["error"]):
        err.print(f"{name}: {now['error']}; trying again", soft_wrap=True)
    elif before is not None and now["batches"] > before["batches"]:
        err.print(f"{name}: {now['rows']:,} rows in {now['batches']} batches", soft_wrap=True)


def _print(document: dict[str, Any]) -> None:
    for name, source in document.items():
        out.print(f"{name}: {source['rows']:,} new rows in {source['batches']} batches")
        for reason, count in source["quarantined"].items():
            out.print(f"quarantined: {count:,}, {reason}")
