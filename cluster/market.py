"""A spot market that can be replayed: a trace becomes a schedule of wall times (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymill.runtime.errors import SpecError

UNLIMITED = 1_000_000
"""Capacity of a market that has enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarketStep:
    """From `wall_s` on the market has room for `capacity` spot nodes; those above it go `notice_s` later."""

    wall_s: float
    """Wall time of the change."""
    capacity: int
    """Spot nodes that the market has room for."""
    notice_s: float
    """Seconds between the notice and the end of a node that must go."""


def schedule(trace: Sequence[Mapping[str, Any]], start_s: float, scale: float = 1.0) -> list[MarketStep]:
    """When the market changes, in order.

    Args:
        trace: `{at_s, available, notice_s}` each; `available` is a bool or the number of nodes there is room for,
            `notice_s` may be absent (0).
        start_s: wall time of the trace's second 0.
        scale: wall seconds per second of the trace; notices are scaled alike.

    Raises:
        SpecError: an entry lacks a field, or one is out of range; names it.
    """
    if not scale > 0:
        raise SpecError(f"market replay: scale is {scale}, and must be above 0")
    steps = []
    for index, entry in enumerate(trace):
        at_s, available, notice_s = entry.get("at_s"), entry.get("available"), entry.get("notice_s", 0.0)
        for name, value in (("at_s", at_s), ("available", available), ("notice_s", notice_s)):
            if not isinstance(value, int | float) or not 0 <= value < 1e12:
                raise SpecError(f"market replay: entry {index}: {name} is {value!r}, and must be a number from 0 on")
        capacity = (UNLIMITED if available else 0) if isinstance(available, bool) else int(available)  # type: ignore[arg-type]
        steps.append(
            MarketStep(wall_s=start_s + float(at_s) * scale, capacity=capacity, notice_s=float(notice_s) * scale)  # type: ignore[arg-type]
        )
    return sorted(steps, key=lambda step: step.wall_s)


def capacity_at(steps: Sequence[MarketStep], now_s: float) -> int:
    """Room for spot nodes at a moment; before the first step there is enough."""
    passed = [step.capacity for step in steps if step.wall_s <= now_s]
    return passed[-1] if passed else UNLIMITED


def victims(spot_nodes: Mapping[str, float], already_noticed: frozenset[str], capacity: int) -> list[str]:
    """Spot nodes to take away: the newest ones above the capacity.

    Args:
        spot_nodes: node id → wall time of its start, of those that run.
        already_noticed: those of them that are to go anyway.
        capacity: how many may stay.
    """
    staying = sorted((node for node in spot_nodes if node not in already_noticed), key=lambda n: (spot_nodes[n], n))
    return staying[max(0, capacity) :]
