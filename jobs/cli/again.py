"""Models that were served when a cluster crashed are served again, before a verb that needs the cluster goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymill.jobs.cli.output import err
from raymill.jobs.cli.records import join, open_records
from raymill.runtime.errors import RaymillError

if TYPE_CHECKING:
    from raymill.cluster.session import Session


def serve_again(session: Session) -> list[str]:
    """Names of the models that are served again, after a cluster of this home has ended without `raymill down`.

    Nothing where anything is served. What can not be served again is said, and stays noted: it ends no verb that was
    asked for something else.
    """
    if not session.home.served.exists():
        return []
    join(session)
    from raymill.actors.endpoint import Placement
    from raymill.jobs.pool import scheduler_of
    from raymill.jobs.reach import endpoint_of
    from raymill.jobs.serving_alone import bring_back
    from raymill.runtime.spawn import on_head

    try:
        with open_records():  # the replicas and the scheduler ask it
            endpoint = endpoint_of(session)
            try:
                names, pipelines = bring_back(endpoint, scheduler_of(session), Placement(**on_head()))
            finally:
                endpoint.close()
    except RaymillError as fault:
        err.print(f"not served again ({fault.code}): {fault.message}; {fault.remedy}", soft_wrap=True)
        return []
    for name in names:
        err.print(f"{name} is served again, as before the crash", style="dim")
    for name in pipelines:
        err.print(f"{name} is a pipeline's: `raymill run` serves it again", style="dim")
    return names
