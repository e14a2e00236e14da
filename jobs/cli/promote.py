"""`raymill promote MODEL VERSION`: make a version live, in registry and replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from raymill.jobs.cli.output import AsJson, emit, out
from raymill.jobs.cli.records import join, needed_session, open_records
from raymill.runtime.messages import ModelVersion


def promote(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[int, typer.Argument(help="Version to make live.")],
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "by hand",
    as_json: AsJson = False,
) -> None:
    """The version becomes live, the one that was live is retired; the replicas follow within a second."""
    change_live(lambda records: records.promote(model, version, reason=reason), as_json)


def change_live(change: Callable[[Any], ModelVersion], as_json: bool) -> None:
    """Apply a change of the registry, then bring the replicas to it; prints the version that is live now."""
    session = needed_session()
    join(session)
    from raymill.jobs.reach import endpoint_of

    with open_records() as (_, records):
        live = change(records)
        endpoint = endpoint_of(session)
        endpoint.follow(records, live.model)
        endpoint.close()
    emit(asdict(live), as_json, lambda: out.print(f"{live.model} version {live.version} is live"))
