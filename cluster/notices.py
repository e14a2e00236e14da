"""Notices of nodes that will be taken away: what is pending, what is due, what the ledger says of it (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymill.runtime.messages import Event, Notice

NOTICED = "spot.noticed"
RECLAIMED = "spot.reclaimed"
SPOT_REASON = "spot reclaim"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reclaim:
    """One node on its way out."""

    notice: Notice
    """What its users were told."""
    noticed_s: float
    """Wall time at which they were told."""
    told: bool = False
    """Whether the scheduler took the notice."""
    reclaimed_s: float | None = None
    """Wall time at which the node was ended; None: not yet."""


def add(reclaims: Sequence[Reclaim], fresh: Iterable[Reclaim]) -> list[Reclaim]:
    """All of them; for a node noticed twice the earlier deadline holds, and what was done stays done."""
    by_node = {r.notice.node_id: r for r in reclaims}
    for new in fresh:
        old = by_node.get(new.notice.node_id)
        if old is None:
            by_node[new.notice.node_id] = new
        elif old.reclaimed_s is None and new.notice.deadline_s < old.notice.deadline_s:
            by_node[new.notice.node_id] = replace(old, notice=new.notice, told=False)
    return list(by_node.values())


def due(reclaims: Sequence[Reclaim], now_s: float) -> list[Reclaim]:
    """Those whose deadline has passed and that still run."""
    return [r for r in reclaims if r.reclaimed_s is None and r.notice.deadline_s <= now_s]


def untold(reclaims: Sequence[Reclaim]) -> list[Reclaim]:
    """Those that the scheduler does not know of."""
    return [r for r in reclaims if not r.told and r.reclaimed_s is None]


def pending(reclaims: Sequence[Reclaim]) -> frozenset[str]:
    """Node ids that will go."""
    return frozenset(r.notice.node_id for r in reclaims if r.reclaimed_s is None)


def ledger_events(reclaims: Iterable[Reclaim]) -> list[Event]:
    """What the ledger says of them: the notices that went out, the nodes that were taken."""
    events = []
    for reclaim in reclaims:
        notice = reclaim.notice
        data = {"node_id": notice.node_id, "deadline_s": notice.deadline_s, "reason": notice.reason}
        events.append(_event(NOTICED, notice.node_id, reclaim.noticed_s, data))
        if reclaim.reclaimed_s is not None:
            late = {"late_s": max(0.0, reclaim.reclaimed_s - notice.deadline_s)}
            events.append(_event(RECLAIMED, notice.node_id, reclaim.reclaimed_s, {**data, **late}))
    return events


def _event(kind: str, node_id: str, wall_s: float, data: dict[str, Any]) -> Event:
    return Event(kind=kind, subject=node_id, wall_s=wall_s, data=data, key=f"{kind}/{node_id}")
