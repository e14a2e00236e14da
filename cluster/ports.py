"""The ports of a session: four that people know, the rest picked free so that sessions run side by side."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from raymill.cluster.processes import holder_of, is_free
from raymill.cluster.spec import ListenSpec, PortSpec
from raymill.runtime.errors import ClusterError

PICK_FROM = range(20_000, 32_000)
"""Below the kernel's ephemeral ports, so that no outgoing connection takes one in between."""
BLOCK = 64
"""Ports that Serve has for its replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Every fixed port of a session."""

    gcs: int
    dashboard: int
    serve: int
    grpc: int
    agent: int
    """HTTP of the head's dashboard agent (jobs)."""
    client: int
    """Ray client."""
    haproxy_stats: int
    haproxy_metrics: int
    fallback_http: int
    """Serve's proxy behind HAProxy, which holds requests while there is no replica."""
    fallback_grpc: int
    autoscaler_metrics: int
    dashboard_metrics: int
    replica_http: int
    """First of `BLOCK` ports for the replicas' HTTP."""
    replica_grpc: int
    """First of `BLOCK` ports for the replicas' gRPC."""
    https: int = 0
    """The endpoint for other hosts, where it is open to them."""
    grpcs: int = 0
    """Its gRPC for them."""


def choose(wanted: PortSpec | Literal["auto"], listen: ListenSpec | None = None, *, seed: int | None = None) -> Ports:
    """The ports of a new session; `auto` picks the known ones free as well.

    Args:
        wanted: those that people know.
        listen: where other hosts come in; its ports are looked at if it names a host.
        seed: makes the choice repeatable.

    Raises:
        ClusterError: a port that was asked for is taken; names it and who holds it.
    """
    pick = picker(seed)
    if wanted == "auto":
        known = {name: pick(1) for name in PortSpec.model_fields}
    else:
        known = wanted.model_dump()
        if listen is not None and listen.host:
            known |= {"https": listen.https, "grpcs": listen.grpcs}
        check(known)
    blocks = {"replica_http": BLOCK, "replica_grpc": BLOCK}
    others = {f.name: pick(blocks.get(f.name, 1)) for f in fields(Ports) if f.name not in known}
    return Ports(**known, **others)


def check(ports: dict[str, int]) -> None:
    """Refuse ports that are taken.

    Raises:
        ClusterError: names every taken port and who holds it.
    """
    taken = [f"port {port} ({name}) is held by {holder_of(port)}" for name, port in ports.items() if not is_free(port)]
    if taken:
        raise ClusterError(
            "; ".join(taken) + ": stop that process, name other ports in cluster.toml [ports], or use --ports auto"
        )


def picker(seed: int | None = None) -> Callable[[int], int]:
    """Gives the first of so many free ports in a row, at each call others."""
    random_source, used = random.Random(seed), set[int]()

    def pick(count: int) -> int:
        for _ in range(500):
            first = random_source.randrange(PICK_FROM.start, PICK_FROM.stop - count)
            block = range(first, first + count)
            if used.isdisjoint(block) and all(map(is_free, block)):
                used.update(block)
                return first
        raise ClusterError(
            f"no {count} free ports between {PICK_FROM.start} and {PICK_FROM.stop}: see `raymill doctor`"
        )

    return pick
