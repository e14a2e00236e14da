"""`raymill lineage --prediction ID`: from a prediction back to its source rows."""

from __future__ import annotations

from typing import Annotated

import typer

from raymill.jobs.cli.output import AsJson, emit, table
from raymill.jobs.cli.records import open_readings


def lineage(
    prediction: Annotated[str, typer.Option(help="Id of the prediction, as the answer gave it.")],
    as_json: AsJson = False,
) -> None:
    """Prediction → version → training → feature hashes and lake versions → source rows."""
    with open_readings() as readings:
        found = readings.lineage(prediction)

    def human() -> None:
        rows = [[step["what"], "\n".join(f"{k}: {v}" for k, v in step["facts"].items())] for step in found["steps"]]
        table(f"lineage of {prediction}", ["what", "facts"], rows)

    emit(found, as_json, human)
