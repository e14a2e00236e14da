"""`raymill ingest PIPELINE SOURCE [PATH…]`: take files or folders in, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from raymill.jobs.cli.output import AsJson, emit, out, progress
from raymill.jobs.cli.records import joined_session
from raymill.runtime.errors import Usage


def ingest(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline file, e.g. jobs/flights.py.")],
    source: Annotated[str, typer.Argument(help="Name of the source whose rows these are.")],
    paths: Annotated[
        list[str] | None, typer.Argument(help="Parquet, CSV or Arrow files or folders; absent: what `read` names.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rows go the way of all rows: contract, quarantine, lake, online store; what is there already is not doubled."""
    from raymill.jobs import pipeline_file

    declared = pipeline_file.load(pipeline)
    named = {s.name: s for s in declared.sources}
    if source not in named:
        raise Usage(f"pipeline {declared.name!r} has no source {source!r}: its sources are {sorted(named)}")
    document: dict[str, Any] = {
        "source": source,
        "batches": 0,
        "duplicates": 0,
        "accepted": 0,
        "quarantined": {},
        "lake_version": None,
    }
    session = joined_session()
    from raymill.jobs.intake import open_intake, push

    with open_intake(declared, session) as intake, progress() as bars:
        task = bars.add_task(source, total=None, note="")
        for done in push(intake, named[source], paths or []):
            _count(document, done)
            bars.update(task, completed=document["batches"], note=f"{document['accepted']:,} rows")
    emit(document, as_json, lambda: _print(document))


def _count(document: dict[str, Any], done: Any) -> None:
    document["batches"] += 1
    document["duplicates"] += int(done.duplicate)
    document["lake_version"] = done.lake_version
    if not done.duplicate:
        document["accepted"] += done.accepted
        for reason, count in done.quarantined.items():
            document["quarantined"][reason] = document["quarantined"].get(reason, 0) + count


def _print(document: dict[str, Any]) -> None:
    again = f" ({document['duplicates']} of them were in already)" if document["duplicates"] else ""
    out.print(
        f"{document['source']}: {document['accepted']:,} new rows in {document['batches']} batches{again}; "
        f"lake version {document['lake_version']}"
    )
    for reason, count in document["quarantined"].items():
        out.print(f"quarantined: {count:,} rows, {reason}")
