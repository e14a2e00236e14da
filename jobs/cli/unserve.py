"""`raymill unserve MODEL`: a model that `raymill serve` put on the endpoint is served no longer."""

from __future__ import annotations

from typing import Annotated

import typer

from raymill.jobs.cli.output import AsJson, emit, out
from raymill.jobs.cli.records import join, needed_session


def unserve(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    as_json: AsJson = False,
) -> None:
    """Callers get 404 for it from then on; its versions stay in the registry, and `raymill serve` puts it back."""
    session = needed_session()
    join(session)
    from raymill.jobs.pool import scheduler_of
    from raymill.jobs.reach import endpoint_of
    from raymill.jobs.serving_alone import take_off

    endpoint = endpoint_of(session)
    try:
        rest = take_off(model, endpoint, scheduler_of(session))
    finally:
        endpoint.close()
    still = f"still served: {', '.join(rest)}" if rest else "nothing is served any more, its replicas are gone"
    emit({"model": model, "served": rest}, as_json, lambda: out.print(f"{model} is off the endpoint; {still}"))
