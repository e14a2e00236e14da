"""The ledger and registry for a verb: through the running cluster, else the database itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raymill.runtime.errors import Unavailable
from raymill.runtime.home import Home, current_home

if TYPE_CHECKING:
    from raymill.actors.readings import Readings
    from raymill.cluster.session import Session


def running_session() -> Session | None:
    """The cluster to use: this home's running one, else that of the Ray job we are in; None: there is none."""
    from raymill.cluster import attach, session

    found = session.load(current_home())
    if found and found.is_alive:
        return found
    return attach.attach() if os.environ.get("RAY_ADDRESS") else None


def needed_session() -> Session:
    """The running cluster.

    Raises:
        Unavailable: none runs.
    """
    found = running_session()
    if found is None:
        raise Unavailable(f"no cluster of {current_home().root} runs: `raymill up`, or `raymill run … --keep`")
    return found


def join(session: Session) -> None:
    """Connect this process to the cluster."""
    session.enter()
    import ray

    if not ray.is_initialized():
        ray.init(address=session.address, log_to_driver=False, logging_level="ERROR")


def has_records() -> bool:
    """Whether anything was ever run on this home, or a cluster of it runs."""
    return current_home().record.exists() or running_session() is not None


def joined_session() -> Session | None:
    """The cluster to use, with this process connected to it; to be called before anything imports Ray."""
    found = running_session()
    if found is not None:
        join(found)
    return found


@contextmanager
def open_records(*, new: bool = False) -> Iterator[tuple[Home, Any]]:
    """Home and records; where no cluster runs the database is opened for the time of the block.

    Raises:
        Unavailable: nothing was ever run on this home, and it is not to be `new`.
    """
    session = running_session()
    home = session.home if session else current_home()
    if session is not None:
        join(session)
    from raymill.runtime.records import RecordsActor, RemoteRecords
    from raymill.runtime.spawn import on_head, spawn

    if session is not None:
        spawn(RecordsActor, str(home.root), name="records", **on_head())
        yield home, RemoteRecords()
        return
    if not home.record.exists() and not new:
        raise Unavailable(f"nothing was run on {home.root} yet: `raymill run jobs/flights.py`")
    actor = RecordsActor(home.root)
    actor.start()
    try:
        yield home, actor
    finally:
        actor.stop()


@contextmanager
def open_readings() -> Iterator[Readings]:
    """What may be read of models, drift, cost and lineage; errors as `open_records`."""
    with open_records() as (home, records):
        from raymill.actors.lakes import Lakes
        from raymill.actors.readings import Readings

        yield Readings(records, Lakes(home, records.events))
