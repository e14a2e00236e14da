"""`raymill run PIPELINE`: the whole loop, on the running cluster or on one of its own that ends with it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from raymill.jobs.cli.again import serve_again
from raymill.jobs.cli.output import AsJson, emit, err, out, progress
from raymill.jobs.cli.records import join, running_session
from raymill.runtime.errors import Conflict

if TYPE_CHECKING:
    from raymill.cluster.session import Session
    from raymill.cluster.spec import ClusterConfig
    from raymill.jobs.run import Run
    from raymill.runtime.spec import Pipeline

STAGES = ("train", "replay")


def run(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline file, e.g. jobs/flights.py.")],
    keep: Annotated[bool, typer.Option("--keep", help="Leave cluster and endpoint up afterwards.")] = False,
    cluster: Annotated[Path | None, typer.Option(help="cluster.toml; absent: the demo's.")] = None,
    as_json: AsJson = False,
) -> None:
    """From raw rows to a monitored, self-correcting endpoint; an unfinished run of the pipeline is taken up again."""
    from raymill.jobs import pipeline_file

    declared = pipeline_file.load(pipeline)
    summary, folder = run_pipeline(declared, cluster, keep)
    emit(summary, as_json, lambda: _print(summary, folder))


def run_pipeline(declared: Pipeline, cluster: Path | None, keep: bool) -> tuple[dict[str, Any], Path]:
    """Run it; the summary, and the folder that holds the report.

    A cluster that was up before stays up; one that this call starts is ended with it, also when it fails.
    """
    from raymill.cluster import lifecycle
    from raymill.cluster.spec import load_config
    from raymill.jobs import pipeline_file
    from raymill.jobs.planning import plan_run
    from raymill.jobs.run import open_run
    from raymill.runtime.home import current_home

    began = time.monotonic()
    found = running_session()
    if found and cluster:
        raise Conflict(f"a cluster runs at {found.address} already: leave --cluster away, or `raymill down` first")
    config = found.config() if found else load_config(cluster)
    if config:
        plan_run(declared, config)  # what the cluster can not hold is refused before anything starts
    ours = found is None
    home = found.home if found else current_home()
    with open_run(home, declared.name, pipeline_file.resolved(declared)) as opened:
        try:
            with opened.stage("up"):
                used = found or lifecycle.up(home, config, say=_say)
                serve_again(used)
            summary, details = _loop(declared, used, config, opened)
        finally:
            if ours and not keep:
                with opened.stage("down"):
                    lifecycle.down(home, say=_say)
        summary["seconds"] = {**opened.progress.seconds, "total": round(time.monotonic() - began, 3)}
        _finish(opened, summary, details)
        return summary, opened.folder


def _loop(
    declared: Pipeline, used: Session, config: ClusterConfig | None, opened: Run
) -> tuple[dict[str, Any], dict[str, Any]]:
    join(used)
    import ray

    from raymill.cluster.attach import lacks
    from raymill.jobs.loop import run_loop
    from raymill.jobs.summary import summarise
    from raymill.jobs.world import build_world

    world = build_world(declared, used, config, opened)
    skipped = opened.progress.skipped
    skipped += [what for what in lacks(used) if what not in skipped]
    try:
        with progress() as bars:
            tasks = {stage: bars.add_task(stage, total=None, note="", visible=False) for stage in STAGES}

            def tick(stage: str, done: int, of: int, note: str) -> None:
                bars.update(tasks[stage], completed=done, total=of, note=note, visible=True)

            recording = run_loop(world, opened, _say, tick)
        with opened.stage("report"):
            return summarise(world, opened, recording.start, recording.end)
    finally:
        world.close()
        ray.shutdown()


def _finish(opened: Run, summary: dict[str, Any], details: dict[str, Any]) -> None:
    from raymill.jobs.report import write_report
    from raymill.runtime.whole_files import write_whole

    write_report(opened.folder, summary, details)
    write_whole(opened.folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False))
    opened.progress.finished = True
    opened.save()


def _say(text: str) -> None:
    err.print(Text.assemble((time.strftime("%H:%M:%S"), "dim"), f" {text}"), soft_wrap=True)


def _print(summary: dict[str, Any], folder: Path) -> None:
    requests, rows = summary["requests"], summary["rows"]
    out.print(
        f"{summary['pipeline']} run {summary['run']}: {summary['seconds']['total']:.0f} s, "
        f"{rows['ingested']:,} rows, {requests['served']:,} requests ({requests['failed']} failed, "
        f"{requests['retried']} retried), {len(summary['retrains'])} retrains, "
        f"{summary['cost']['bill_usd']:.3f} USD of nodes",
    )
    for what in summary.get("skipped", []):
        out.print(f"skipped: {what}")
    out.print(f"report   {folder / 'report.html'}", soft_wrap=True)
    out.print(f"summary  {folder / 'summary.json'}", soft_wrap=True)
