"""`raymill status`: what runs: nodes, leases, queue with reasons, newest run, feeds; what is alarming of features."""

from __future__ import annotations

from datetime import UTC, datetime
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
        for name in ("nodes", "leases", "queue", "feeds"):
            if rows := document[name]:
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
        "feeds": [],
        "alerts": [],
    }
    if session is not None:
        join(session)
        document |= _pool()
        document["feeds"] = _feeds()
    if has_records():
        document["alerts"] = _alerts()
    return document


def _alerts() -> list[dict[str, str]]:
    """What was served and is not what the lake gives, by the newest check of each model."""
    with open_records() as (_, records):
        newest = {e["pipeline"]: e["data"] for e in records.events(JUDGED)}
    return [{"model": model, "what": "consistency", "reason": d["reason"]} for model, d in newest.items() if d["alert"]]


def _feeds() -> list[dict[str, Any]]:
    """How each source stands that a feed of this cluster follows; a feed that does not answer is told as such."""
    from raymill.runtime.spawn import ask, find, named

    found = []
    for name in named("feed/"):
        try:
            sources = ask(find(name).health.remote(), timeout_s=10)["sources"]
        except Unavailable as err:
            sources = {"": {"state": "away", "error": err.message}}
        found += [feed_row(name.partition("/")[2], source, stands) for source, stands in sources.items()]
    return found


def feed_row(pipeline: str, source: str, stands: dict[str, Any]) -> dict[str, Any]:
    """One line of `feeds`: what `Progress.to_json` of a feed's source says, in short."""
    last_s = stands.get("last_s")
    return {
        "pipeline": pipeline,
        "source": source,
        **{k: stands.get(k) for k in ("state", "waiting", "behind_s", "rows", "last_batch")},
        "last_at": datetime.fromtimestamp(last_s, UTC).isoformat(timespec="seconds") if last_s else None,
        "error": stands.get("error"),
    }


def _pool() -> dict[str, Any]:
    """What the scheduler says of nodes, leases and queue; nothing, if none was needed yet."""
    from raymill.runtime.spawn import ask, find

    try:
        found = ask(find("scheduler").status.remote(), timeout_s=10)
    except Unavailable:
        return {}
    return {"nodes": found["nodes"], "leases": found["leases"], "queue": found["queue"]}
