"""The HTML report of a run: one self-contained page, written from what `summary.json` says and some details.

`summary` is the run's `summary.json` (docs/design.md lists its fields). `details` holds what is too much for it;
every field may be absent, and the page then says that there was nothing of the kind:

    unit           currency of all amounts, "USD"
    model          name of the model; began_s, ended_s: wall time of the run
    marks          [{at, kind, version, why}]  kind: retrain | canary | promoted | rolled_back | rejected | failed
    verdicts       [{period, version, labelled, regret, regret_low, retrain, reason, input_drift {feature: psi},
                     output_drift}]   period: what the heat strip calls it, e.g. "2013-05"
    decisions      [{version, accept, reason}] of the gate
    latencies_ms   [milliseconds] of requests (or a sample), or latency {bounds_ms [n + 1], counts [n]}
    trainings      [{training_id, ranks, steps, seconds, auc, log_loss}]
    gang_changes   [{training_id, step, before, after, reason, steps_lost, seconds}]
    replica_kill   {at, requests, retried, failed, seconds}
    quarantine     [{source, reason, rows, seeded}]    seeded: corrupted on purpose, to show it
    lineage        [{what, facts {name: value}}], from a prediction down to its source rows
    skipped        [{what, why}], or sentences
    notes          [sentence]

Moments (`at`) are µs UTC or ISO text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from raymill.jobs import report_plots
from raymill.runtime.whole_files import write_whole

NAME = "report.html"
"""File name, in the run's folder and as the template."""

MUCH_DRIFT = 0.25
"""PSI from which a cell of the heat strip has its full colour at four times this value."""

MAX_FEATURES = 24
"""Features on the heat strip: those that drifted most."""


def write_report(run_dir: Path, summary: Mapping[str, Any], details: Mapping[str, Any]) -> Path:
    """Write `report.html` into the run's folder, and return its path."""
    page = render(summary, details)
    path = run_dir / NAME
    write_whole(path, page)
    return path


def render(summary: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """The page as text."""
    unit = str(details.get("unit") or "USD")
    marks = [{**m, "at": day(m.get("at"))} for m in details.get("marks") or []]
    requests = summary.get("requests") or {}
    bounds, counts = _latency(details)
    quantiles = {"p50": requests.get("p50_ms"), "p99": requests.get("p99_ms")}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "day": day, "seconds": seconds, "age": age}
    template = environment.from_string(resources.files("raymill.jobs").joinpath(NAME).read_text(encoding="utf-8"))
    return template.render(
        s=summary,
        d=details,
        unit=unit,
        marks=marks,
        tiles=tiles(summary, unit),
        cost=_shares((summary.get("cost") or {}).get("parts") or {}),
        stages=_shares({k: v for k, v in (summary.get("seconds") or {}).items() if k != "total"}),
        heat=heat(details.get("verdicts") or []),
        timeline=Markup(report_plots.timeline(summary.get("months") or [], marks, unit)),
        latency=Markup(report_plots.latency(bounds, counts, quantiles)),
    )


def tiles(summary: Mapping[str, Any], unit: str) -> list[dict[str, str]]:
    """The headline figures: `{name, value, note}` each."""
    months = summary.get("months") or []
    requests, rows = summary.get("requests") or {}, summary.get("rows") or {}
    cost, spot = summary.get("cost") or {}, summary.get("spot") or {}
    lost, baseline = _total(months, "usd"), _total(months, "baseline_usd")
    outcomes = [str(r.get("outcome")) for r in summary.get("retrains") or []]
    last = months[-1] if months else {}
    saved = baseline - lost
    word = "less" if saved >= 0 else "more"
    quarantined = sum((rows.get("quarantined") or {}).values())
    return [
        _tile(f"{unit} lost", number(lost), f"{number(abs(saved))} {word} than the baseline"),
        _tile("AUC, last month", number(last.get("auc"), 3), f"baseline {number(last.get('baseline_auc'), 3)}"),
        _tile("requests", number(requests.get("served")), _requests_note(requests)),
        _tile("p99", f"{number(requests.get('p99_ms'), 1)} ms", f"p50 {number(requests.get('p50_ms'), 1)} ms"),
        _tile("retrains", number(len(outcomes)), f"{outcomes.count('promoted')} promoted"),
        _tile("rows", number(rows.get("ingested")), f"{number(quarantined)} in quarantine"),
        _tile(
            "bill", f"{number(cost.get('bill_usd'), 4)} USD", f"spot nodes reclaimed: {number(spot.get('reclaimed'))}"
        ),
        _tile("run time", seconds((summary.get("seconds") or {}).get("total")), "wall time"),
    ]


def heat(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The heat strip: `periods`, and `features` as `{name, cells [{psi, share}]}`, most drifted first."""
    told = [v for v in verdicts if v.get("input_drift")]
    worst: dict[str, float] = {}
    for verdict in told:
        for name, psi in verdict["input_drift"].items():
            worst[name] = max(worst.get(name, 0.0), psi or 0.0)
    names = sorted(worst, key=lambda n: -worst[n])
    features = [{"name": n, "cells": [_cell(v["input_drift"].get(n)) for v in told]} for n in names[:MAX_FEATURES]]
    answer = {"name": "the answer", "cells": [_cell(v.get("output_drift")) for v in told]}
    return {
        "periods": [v.get("period") or day(v.get("start_at")) for v in told],
        "features": [*features, answer] if told else [],
        "left_out": max(0, len(names) - MAX_FEATURES),
        "much": MUCH_DRIFT,
    }


def number(value: Any, digits: int = 0) -> str:
    """A number with thin thousands separators; a dash where it is unknown."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "−")


def seconds(value: Any) -> str:
    """A duration a person can read."""
    if value is None:
        return "–"
    if value >= 120:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def age(value: Any) -> str:
    """How long ago, in event time; a dash where it is unknown."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if value is not None and value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return seconds(value)


def day(at: Any) -> str:
    """The day of a moment in µs UTC, or text as it is."""
    if isinstance(at, int | float):
        return datetime.fromtimestamp(at / 1e6, UTC).date().isoformat()
    return "–" if at is None else str(at)[:10]


def _cell(psi: float | None) -> dict[str, Any]:
    # The square root lets one see that something drifted a little beside what drifted much.
    share = 0 if psi is None else min(100, round(50 * math.sqrt(max(psi, 0.0) / MUCH_DRIFT)))
    return {"psi": psi, "share": share}


def _tile(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _requests_note(requests: Mapping[str, Any]) -> str:
    return f"{number(requests.get('failed'))} failed, {number(requests.get('retried'))} retried"


def _total(months: Sequence[Mapping[str, Any]], name: str) -> float:
    known = [m[name] for m in months if m.get(name) is not None]
    return float(sum(known)) if known else math.nan


def _shares(parts: Mapping[str, float]) -> list[dict[str, Any]]:
    total = sum(parts.values())
    return [{"name": n, "value": v, "share": 100 * v / total if total else 0} for n, v in parts.items()]


def _latency(details: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[int]]:
    ready = details.get("latency")
    if ready:
        return ready["bounds_ms"], ready["counts"]
    return report_plots.histogram(details.get("latencies_ms") or [])
