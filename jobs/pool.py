"""The pool's scheduler on a session's cluster: one for all that run there, whoever comes first."""

from __future__ import annotations

from raymill.actors.gang import NodeKind
from raymill.actors.scheduler import MAX_CONCURRENCY, NAME, GpuPoolScheduler, RemoteScheduler
from raymill.cluster.session import Session
from raymill.cluster.spec import ClusterConfig
from raymill.runtime.records import RemoteRecords
from raymill.runtime.spawn import ask, on_head, spawn


def scheduler_of(session: Session) -> RemoteScheduler:
    """The scheduler, spawned where none runs; it knows what the session's autoscaler may launch.

    Raises:
        ClusterError: the session's file is lost or damaged.
        RaymillError: it could not start.
    """
    config = session.config()
    kinds = node_kinds(config) if config and session.has_autoscaler else ()
    handle = spawn(GpuPoolScheduler, RemoteRecords(), kinds, name=NAME, max_concurrency=MAX_CONCURRENCY, **on_head())
    ask(handle.health.remote())  # if it could not start, that is said here
    return RemoteScheduler()


def node_kinds(config: ClusterConfig) -> tuple[NodeKind, ...]:
    """What the autoscaler may launch, in the scheduler's words."""
    return tuple(
        NodeKind(name=name, market=kind.market, resources=dict(kind.resources), max_nodes=kind.max_workers)
        for name, kind in config.node_types.items()
    )
