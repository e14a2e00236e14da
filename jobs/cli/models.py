"""`raymill models`: versions of the models and where in their life they are."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raymill.jobs.cli.output import AsJson, emit, table
from raymill.jobs.cli.records import open_readings


def models(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """List versions, newest last."""
    with open_readings() as readings:
        found = readings.models({"model": model} if model else {})

    def human() -> None:
        rows = [[v["model"], v["version"], v["kind"], v["stage"], _auc(v), _why(v)] for v in found]
        table("models", ["model", "version", "kind", "stage", "AUC", "since"], rows)

    emit(found, as_json, human)


def _auc(version: dict[str, Any]) -> str:
    """Of a version that was not trained here nobody measured it."""
    auc = version["metrics"].get("auc")
    return "" if auc is None else f"{auc:.3f}"


def _why(version: dict[str, Any]) -> str:
    return str(version["history"][-1].get("reason", "")) if version["history"] else ""
