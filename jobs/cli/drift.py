"""`raymill drift`: the monitor's verdicts, in money."""

from __future__ import annotations

from typing import Annotated

import typer

from raymill.jobs.cli.output import AsJson, emit, table
from raymill.jobs.cli.records import open_readings


def drift(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """One line a period: what the live version cost beyond the best known alternative, and what follows from it."""
    from raymill.jobs.replay import iso_date

    with open_readings() as readings:
        found = readings.drift({"model": model} if model else {})

    def human() -> None:
        rows = [
            [
                f"{iso_date(v['start_at'])} – {iso_date(v['end_at'])}",
                f"{v['model']}/{v['version']}",
                f"{v['labelled']:,}",
                "–" if v["regret"] is None else f"{v['regret']:+.2f} (≥ {v['regret_low']:+.2f})",
                "retrain" if v["retrain"] else "",
                v["reason"],
            ]
            for v in found
        ]
        table("verdicts", ["period", "version", "labelled", "regret a row", "", "why"], rows)

    emit(found, as_json, human)
