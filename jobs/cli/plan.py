"""`raymill plan PIPELINE`: what a run would do and cost, without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from raymill.jobs.cli.output import AsJson, emit, out, table
from raymill.jobs.cli.records import has_records, open_records

if TYPE_CHECKING:
    from raymill.runtime.spec import Pipeline


def plan(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline file.")],
    cluster: Annotated[Path | None, typer.Option(help="cluster.toml; absent: the demo's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the file against the cluster, and say what a run needs."""
    from raymill.cluster.spec import load_config
    from raymill.jobs import pipeline_file
    from raymill.jobs.planning import plan_run

    declared = pipeline_file.load(pipeline)
    made = {**plan_run(declared, load_config(cluster)), "warnings": _deprecated(declared)}

    def human() -> None:
        sizes = f"{len(made['features'])} features of {len(made['sources'])} sources"
        out.print(Text.assemble((made["pipeline"], "bold"), f": {sizes}"))
        table("features", ["feature", "version"], [[n, h] for n, h in made["features"].items()])
        for name, functions in made["slow_features"].items():
            out.print(f"slow: {name} calls {', '.join(functions)} once a row")
        table(
            "needs",
            ["for", "what", "USD/h"],
            [[n["purpose"], n["what"], f"{n['usd_per_h']:.2f}"] for n in made["needs"]],
        )
        out.print(f"at most {made['usd_per_h']:.2f} USD/h")
        for note in made["skipped"]:
            out.print(f"skipped: {note}")
        for warning in made["warnings"]:
            out.print(f"warning: {warning}")

    emit(made, as_json, human)


def _deprecated(declared: Pipeline) -> list[str]:
    """A sentence for each feature of the pipeline that is deprecated; none where nothing was run yet."""
    from raymill.runtime.feature_registry import Catalogue

    if not has_records():
        return []
    with open_records() as (_, records):
        return Catalogue.of(records).warnings(declared)
