"""`raymill status`: what runs: nodes, leases, queue with reasons, the newest run; and what is alarming of features."""

from __future__ import annotations

from typing import Any

from raymill.jobs.cli.output import AsJson, emit, out, table
from raymill.jobs.cli.records import has_records, join, open_records, running_session
from raymill.runtime.errors import Unavailable
from raymill.runtime.feature_registry import JUDGED
from raymill.runtime.home import current_home


def status(as_json: AsJson = False) -> None:
    """Works with and without a running cluster."""
    document = _gather()

    def human() -> None:
        cluster = document["cluster"]
        out.print(f"cluster  {cluster['address'] + '  ' + cluster['serve_url'] if cluster else 'down'}")
        if cluster and cluster["public_url"]:
            out.print(f"elsewhere  {cluster['public_url']}  gRPC {cluster['public_grpc']}  (TLS, API key)")
        if document["run"]:
            run = document["run"]
            out.print(f"run      {run['run']} of {run['pipeline']}: {'finished' if run['finished'] else 'unfinished'}")
        for alert in document["alerts"]:
            out.print(f"ALARM    {alert['what']} of {alert['model']}: {alert['reason']}")
        for name, rows in (("nodes", document["nodes"]), ("leases", document["leases"]), ("queue", document["queue"])):
            if rows:
                table(name, list(rows[0]), [[_short(cell) for cell in row.values()] for row in rows])

    emit(document, as_json, human)


def _short(cell: Any) -> str:
    """An id's beginning; of resources those that are counted out to ranks and replicas."""
    if isinstance(cell, dict):
        return " ".join(f"{name} {cell[name]:g}" for name in ("CPU", "GPU") if name in cell)
    text = str(cell)
    return text[:12] if len(text) > 40 and " " not in text else text


def _gather() -> dict[str, Any]:
    from raymill.jobs.run import newest

    session = running_session()
    home = session.home if session else current_home()
    last = newest(home)
    document: dict[str, Any] = {
        "home": str(home.root),
        "cluster": session.document() if session else None,
        "run": {"run": last.run, "pipeline": last.pipeline, "finished": last.finished} if last else None,
        "nodes": [],
        "leases": [],
        "queue": [],
        "alerts": [],
    }
    if session is not None:
        join(session)
        document |= _pool()
    if has_records():
        document["alerts"] = _alerts()
    return document


def _alerts() -> list[dict[str, str]]:
    """What was served and is not what the lake gives, by the newest check of each model."""
    with open_records() as (_, records):
        newest = {e["pipeline"]: e["data"] for e in records.events(JUDGED)}
    return [{"model": model, "what": "consistency", "reason": d["reason"]} for model, d in newest.items() if d["alert"]]


def _pool() -> dict[str, Any]:
    """What the scheduler says of nodes, leases and queue; nothing, if none was needed yet."""
    from raymill.runtime.spawn import ask, find

    try:
        found = ask(find("scheduler").status.remote(), timeout_s=10)
    except Unavailable:
        return {}
    return {"nodes": found["nodes"], "leases": found["leases"], "queue": found["queue"]}
