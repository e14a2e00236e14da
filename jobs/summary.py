"""What a run came to: `summary.json` (docs/design.md lists its fields), and the details that the report adds."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from raymill.actors.data import SEEDED
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.quarantine_life import State
from raymill.jobs.feature_watch import features_told
from raymill.jobs.replay import DAY_US, iso_date
from raymill.jobs.run import Progress, Run
from raymill.jobs.world import World
from raymill.runtime.cost import split
from raymill.runtime.lineage import trace
from raymill.runtime.stores import places_of

PREDICTIONS = "predictions"


def summarise(world: World, run: Run, start: int, end: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summary and details of a run that replayed `start` to `end` (event time, µs UTC)."""
    name, progress = world.pipeline.name, run.progress
    tally = world.data.tally()
    events = world.records.events()
    mine = [v for v in world.records.versions(name) if v.training_id.startswith(run.id)]
    changes = progress.gang_changes
    cost = split(events, time.time(), since_s=progress.began_s)
    summary = {
        "run": run.id,
        "pipeline": name,
        "seconds": dict(progress.seconds),
        "rows": {
            "ingested": sum(tally["ingested"].values()),
            "quarantined": tally["quarantined"],
            "seeded_bad": sum(tally["seeded_bad"].values()),
            "without_label": tally["without_label"].get(world.pipeline.label.source.name, 0),
        },
        "months": [
            {"month": iso_date(begin)[:7], **_chosen(world.monitor.figures(begin, until))}
            for begin, until in months(start, end)
        ],
        "versions": [
            {"version": v.version, "kind": v.kind, "stage": v.stage, "metrics": v.metrics, "history": list(v.history)}
            for v in mine
        ],
        "retrains": [_retrain(entry) for entry in progress.retrains],
        "requests": {k: progress.requests.get(k) for k in ("served", "failed", "retried", "rows", "p50_ms", "p99_ms")},
        "spot": {
            "reclaimed": len([e for e in events if e["kind"] == "spot.reclaimed" and e["wall_s"] >= progress.began_s]),
            "steps_lost": sum(c["steps_lost"] for c in changes),
        },
        "cost": cost.to_json(),
        **features_told(world, run, end),
        "skipped": list(progress.skipped),
    }
    return summary, _details(world, run, events)


def months(start: int, end: int) -> list[tuple[int, int]]:
    """Calendar months (UTC) of the range, cut to it: (first moment, end) each, µs.

    A rest of less than two days at its end (local dates reach beyond the UTC month) goes with the month before.
    """
    found = []
    begin = start
    while begin < end:
        day = datetime.fromtimestamp(begin / 1e6, UTC)
        following = datetime(day.year + day.month // 12, day.month % 12 + 1, 1, tzinfo=UTC)
        until = min(end, int(following.timestamp()) * 1_000_000)
        until = end if end - until < 2 * DAY_US else until
        found.append((begin, until))
        begin = until
    return found


def _chosen(figures: dict[str, Any]) -> dict[str, Any]:
    wanted = ("auc", "baseline_auc", "usd", "baseline_usd", "regret_usd", "predictions", "labelled", "by_version")
    return {k: figures[k] for k in wanted}


def _retrain(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "at": iso_date(entry["at"]), "outcome_at": iso_date(entry["outcome_at"])}


def _details(world: World, run: Run, events: list[dict[str, Any]]) -> dict[str, Any]:
    progress = run.progress
    ours = [e for e in events if e["pipeline"] == world.pipeline.name and e["wall_s"] >= progress.began_s]
    epochs = {t["training_id"]: t["epochs"][-1] for t in progress.trainings}
    return {
        "unit": world.pipeline.monitor.unit,
        "model": world.pipeline.name,
        "began_s": progress.began_s,
        "ended_s": time.time(),
        "marks": _marks(progress),
        "verdicts": [
            {**e["data"], "period": iso_date(e["data"]["start_at"])} for e in ours if e["kind"] == "drift.judged"
        ],
        "decisions": progress.decisions,
        "latencies_ms": progress.requests.get("ms", []),
        "trainings": [
            {
                **{k: t[k] for k in ("steps", "seconds")},
                "training_id": _short(t["training_id"], run.id),
                "ranks": epochs[t["training_id"]]["ranks"],
                "auc": epochs[t["training_id"]]["evaluate_auc"],
                "log_loss": epochs[t["training_id"]]["evaluate_log_loss"],
            }
            for t in progress.trainings
        ],
        "gang_changes": [{**c, "training_id": _short(c["training_id"], run.id)} for c in progress.gang_changes],
        "replica_kill": _replica_kill(progress),
        "quarantine": _quarantine(world),
        "lineage": _lineage(world),
        "skipped": [
            {"what": what.partition(":")[0], "why": what.partition(":")[2].strip()} for what in progress.skipped
        ],
        "notes": progress.requests.get("errors", []),
    }


def _short(training_id: str, run: str) -> str:
    """Without the run's id in front."""
    return training_id.removeprefix(f"{run}-")


def _quarantine(world: World) -> list[dict[str, Any]]:
    """Rows that were refused and are not in the lake, by source and reason; those spoilt on purpose apart."""
    found = Counter(
        (entry.source, entry.reason, entry.batch_id.startswith(SEEDED))
        for entry in world.data.quarantine()
        if entry.state is not State.REINGESTED
    )
    return [
        {"source": source, "reason": reason, "rows": rows, "seeded": seeded}
        for (source, reason, seeded), rows in sorted(found.items())
    ]


def _marks(progress: Progress) -> list[dict[str, Any]]:
    marks = []
    for entry in progress.retrains:
        marks.append({"at": entry["at"], "kind": "retrain", "version": entry["version"], "why": entry["reason"]})
        marks.append(
            {"at": entry["outcome_at"], "kind": entry["outcome"], "version": entry["version"], "why": entry["why"]}
        )
    return marks


def _replica_kill(progress: Progress) -> dict[str, Any] | None:
    kill = progress.drills.get("replica")
    if kill is None:
        return None
    failed = progress.requests.get("failed", 0)
    return {
        "at": kill["date"],
        "requests": kill["requests"],
        "retried": kill["retried"],
        "failed": failed,
        "seconds": kill["seconds"],
    }


def _lineage(world: World) -> list[dict[str, Any]]:
    """The way back from the newest prediction."""
    lake = Lake(places_of(world.home, world.pipeline.stores).lake)
    if lake.version(PREDICTIONS) is None:
        return []
    newest = lake.read(PREDICTIONS, columns=["id", "at"], where=[("model", "=", world.pipeline.name)])
    if not newest.num_rows:
        return []
    last = newest.sort_by([("at", "descending")])["id"][0].as_py()
    return trace(last, lake.read, world.records, FeaturePlan.of(world.pipeline).to_json()).steps()
