"""`raymill promote MODEL VERSION`: make a version live, in registry and replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymill.jobs.cli.output import AsJson, emit, out
from raymill.jobs.cli.records import join, needed_session, open_records
from raymill.runtime.errors import ModelError
from raymill.runtime.messages import ModelVersion, Stage

if TYPE_CHECKING:
    from raymill.actors.endpoint import Endpoint

Change = Callable[[Any], ModelVersion]
"""Of the registry; gives the version that is live then."""
Undo = Callable[[Any, ModelVersion, ModelVersion, str], ModelVersion]
"""Takes it back: records, the version live before, the one live since, why."""


def promote(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[int, typer.Argument(help="Version to make live.")],
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "by hand",
    as_json: AsJson = False,
) -> None:
    """The version becomes live, the one that was live is retired; the replicas follow within a second."""
    change_live(
        model,
        lambda records: records.promote(model, version, reason=reason),
        lambda records, _, since, why: records.rollback(model, version=since.version, reason=why),
        as_json,
    )


def change_live(model: str, change: Change, undo: Undo, as_json: bool) -> None:
    """Apply a change of the registry, then bring the replicas to it; prints the version that is live now."""
    session = needed_session()
    join(session)
    from raymill.jobs.reach import endpoint_of

    with open_records() as (_, records):
        endpoint = endpoint_of(session)
        try:
            live, served = bring_live(model, records, endpoint, change, undo)
        finally:
            endpoint.close()
    emit({**asdict(live), "served": served}, as_json, lambda: out.print(_told(live, served), soft_wrap=True))


def bring_live(model: str, records: Any, endpoint: Endpoint, change: Change, undo: Undo) -> tuple[ModelVersion, bool]:
    """The version that is live now, and whether the endpoint serves its model.

    Raises:
        ModelError: the replicas can not load it; they go on as before, and so does the registry.
    """
    before = next((v for v in records.versions(model) if v.stage is Stage.LIVE), None)
    live = change(records)
    try:
        return live, endpoint.follow(records, live.model)
    except ModelError as err:
        if before is not None and before.version != live.version:
            undo(records, before, live, f"not loaded: {err.message[:200]}")
        raise


def _told(live: ModelVersion, served: bool) -> str:
    if served:
        return f"{live.model} version {live.version} is live"
    return (
        f"{live.model} version {live.version} is live in the registry, but nothing serves {live.model}: "
        "its pipeline's run, or `raymill serve`, puts it on the endpoint"
    )
