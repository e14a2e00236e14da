"""`raymill rollback MODEL`: go back to the version that was live before, in registry and replicas."""

from __future__ import annotations

from typing import Annotated

import typer

from raymill.jobs.cli.output import AsJson
from raymill.jobs.cli.promote import change_live


def rollback(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "by hand",
    as_json: AsJson = False,
) -> None:
    """The live version is retired, the one it had replaced is live again."""
    change_live(
        model,
        lambda records: records.rollback(model, reason=reason),
        lambda records, before, _, why: records.promote(model, before.version, reason=why),
        as_json,
    )
