"""`raymill cost`: node-seconds × price, split over training, serving, idle."""

from __future__ import annotations

from raymill.jobs.cli.output import AsJson, emit, out, table
from raymill.jobs.cli.records import open_readings


def cost(as_json: AsJson = False) -> None:
    """The bill since the ledger began; the parts sum to it."""
    with open_readings() as readings:
        found = readings.cost({})

    def human() -> None:
        table("cost", ["part", "USD"], [[part, f"{usd:.6f}"] for part, usd in found["parts"].items()])
        out.print(f"bill {found['bill_usd']:.6f} USD")

    emit(found, as_json, human)
