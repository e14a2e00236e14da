"""What a look at the nodes means: which ones came, which went and why (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raymill.runtime.messages import Event

STARTED = "node.started"
STOPPED = "node.stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedNode:
    """A node as the ledger knows it."""

    node_id: str
    """Ray node id."""
    instance: str
    """The provider's id; empty on a cluster that has none."""
    node_type: str
    """Name in cluster.toml, `head`, or empty where nobody said."""
    market: str
    """`reserved` or `spot`."""
    price_usd_per_h: float
    """What one hour of it costs."""
    started_s: float
    """Wall time at which it began to cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """A node that went."""

    node: WatchedNode
    """Which."""
    stopped_s: float
    """Wall time at which it ceased to cost."""
    reason: str
    """Why it went."""


def departures(
    known: Mapping[str, WatchedNode],
    alive: frozenset[str],
    reasons: Mapping[str, str],
    gone_s: Mapping[str, float],
    now_s: float,
) -> list[Departure]:
    """Nodes that are known and no more alive.

    Args:
        known: node id → node.
        alive: node ids that Ray has.
        reasons: node id → why it went, where somebody knows.
        gone_s: node id → wall time at which it went, where somebody knows; else it is now.
        now_s: wall time.
    """
    return [
        Departure(
            node=node,
            stopped_s=max(node.started_s, min(now_s, gone_s.get(node_id, now_s))),
            reason=reasons.get(node_id, "lost"),
        )
        for node_id, node in known.items()
        if node_id not in alive
    ]


def started_event(node: WatchedNode) -> Event:
    """For the ledger: the node began to cost."""
    return Event(
        kind=STARTED,
        subject=node.node_id,
        wall_s=node.started_s,
        data={
            "node_id": node.node_id,
            "instance": node.instance,
            "node_type": node.node_type,
            "market": node.market,
            "price_usd_per_h": node.price_usd_per_h,
        },
        key=f"{STARTED}/{node.node_id}",
    )


def stopped_event(departure: Departure) -> Event:
    """For the ledger: the node ceased to cost."""
    node = departure.node
    return Event(
        kind=STOPPED,
        subject=node.node_id,
        wall_s=departure.stopped_s,
        data={
            "node_id": node.node_id,
            "instance": node.instance,
            "node_type": node.node_type,
            "market": node.market,
            "price_usd_per_h": node.price_usd_per_h,
            "seconds": departure.stopped_s - node.started_s,
            "reason": departure.reason,
        },
        key=f"{STOPPED}/{node.node_id}",
    )
