"""How many replicas an endpoint needs: pure, from what each of them tells of its line and its work.

A replica is added as soon as rows wait too long for the latency that is wanted; one is taken away only after the load
has been low for a while, and only if the others can carry it.

Invariants
- The answer lies between the bounds; it is 0 only after nobody has asked for `idle_s`, where that is allowed.
- While replicas are on their way nothing is added; figures from before a change of their number count for nothing.
- At most one replica is taken away at a time. Whenever that had to be taken back, the next one waits twice as long:
  a load that swings about a threshold does not make the number swing with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

UP_AFTER_S = 1.0
"""For how long rows must have waited too long."""
SETTLE_S = 3.0
"""After a change of the number of replicas: until their figures are those of the new number."""
HIGH = 0.5
"""Share of the time that a row may wait from which on a replica is added."""
LOW = 0.25
"""Share below which one may be spared."""
FULL = 0.7
"""Share of its time that a replica is to work, where there are enough of them."""
SPARE = 0.5
"""Share that the others may come to when one is taken away."""
MOST_PATIENCE = 16.0
"""Largest factor on the time that the load must have been low."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What the owner of an endpoint allows and wants."""

    fewest: int
    """Fewest replicas; 0: none while nobody asks."""
    most: int
    """Most replicas."""
    p99_s: float
    """Latency that 99 of 100 requests are to have."""
    cooldown_s: float = 30.0
    """How long the load must have been low before a replica is taken away."""
    idle_s: float = 300.0
    """How long nobody must have asked before the last one is."""
    spare: int = 0
    """Replicas beyond those that the load needs."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a replica tells of its last seconds."""

    delay_s: float
    """95 of 100 rows waited no longer than this before their batch began."""
    service_s: float
    """Time that a batch took, on the average."""
    rows_per_s: float
    """Rows that came."""
    busy: float
    """Share of the time in which it worked: CPU of its process."""
    idle_s: float
    """Since somebody last asked for a prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a decision is made from."""

    now_s: float
    """Any clock that goes on evenly."""
    loads: tuple[Load, ...]
    """Of the replicas that run; those that have not told anything yet are missing."""
    running: int
    """Replicas that run."""
    target: int
    """Replicas that were decided last: those that are missing are starting."""
    waiting: float = 0.0
    """Requests that are held, or under way."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What is kept between two decisions."""

    running: int = 0
    changed_s: float = -math.inf
    """When the number of running replicas was last seen to change."""
    high_since_s: float | None = None
    low_since_s: float | None = None
    shrunk_s: float = -math.inf
    """When a replica was last taken away."""
    patience: float = 1.0
    """Factor on the time that the load must have been low."""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Memory:
        """What `asdict` gave; nothing remembered where nothing is."""
        return cls(**{k: document[k] for k in cls.__dataclass_fields__ if k in document})


@dataclass(frozen=True, slots=True)
class Wanted:
    """A decision."""

    replicas: int
    reason: str
    """In words, with figures; empty: nothing changes."""
    memory: Memory = field(default_factory=Memory)


def decide(seen: Seen, scaling: Scaling, memory: Memory) -> Wanted:
    """How many replicas there are to be."""
    floor = min(max(scaling.fewest, 1) + scaling.spare, scaling.most)
    if seen.running != memory.running:
        memory = replace(memory, running=seen.running, changed_s=seen.now_s, high_since_s=None, low_since_s=None)
    if seen.target == 0:
        wake = floor if scaling.fewest or seen.waiting else 0
        return Wanted(wake, f"{seen.waiting:g} requests wait and no replica runs" if wake else "", memory)
    if not floor <= seen.target <= scaling.most:
        bounded = min(max(seen.target, floor), scaling.most)
        return Wanted(bounded, f"{seen.target} is not between {floor} and {scaling.most}", memory)
    if not seen.loads or len(seen.loads) < seen.running or seen.now_s - memory.changed_s < SETTLE_S:
        return Wanted(seen.target, "", memory)
    idle_s = min(load.idle_s for load in seen.loads)
    if scaling.fewest == 0 and idle_s >= scaling.idle_s and not seen.waiting:
        return Wanted(0, f"nobody has asked for {idle_s:.0f} s", Memory(seen.running, memory.changed_s))
    up = _up(seen, scaling, memory) if seen.running >= seen.target else None
    return up or _down(seen, scaling, memory, floor)


def _up(seen: Seen, scaling: Scaling, memory: Memory) -> Wanted | None:
    """More replicas, or that their time has not come; None: there are enough."""
    worst = max(seen.loads, key=lambda load: load.delay_s / _may_wait(load, scaling))
    work = sum(load.busy for load in seen.loads)
    late = worst.delay_s > HIGH * _may_wait(worst, scaling)
    if not late and not (scaling.spare and work > FULL * max(1, seen.running - scaling.spare)):
        return None
    since = seen.now_s if memory.high_since_s is None else memory.high_since_s
    memory = replace(memory, high_since_s=since, low_since_s=None)
    if seen.now_s - since < UP_AFTER_S or seen.target >= scaling.most:
        return Wanted(seen.target, "", memory)
    needed = math.ceil(work / FULL) + scaling.spare
    replicas = min(max(seen.target + 1, min(needed, 2 * seen.target)), scaling.most)
    if seen.now_s - memory.shrunk_s < _regretted_s(scaling, memory):
        memory = replace(memory, patience=min(2 * memory.patience, MOST_PATIENCE), shrunk_s=-math.inf)
    may = _may_wait(worst, scaling)
    reason = (
        f"rows wait {worst.delay_s * 1e3:.1f} ms for their batch, {HIGH * may * 1e3:.1f} ms leave room for the p99"
        if late
        else f"the replicas work {work:.2f} of {seen.running - scaling.spare}, and {scaling.spare} are to be spare"
    )
    return Wanted(replicas, f"{reason}: {seen.target} → {replicas}", replace(memory, high_since_s=None))


def _down(seen: Seen, scaling: Scaling, memory: Memory, floor: int) -> Wanted:
    """One replica less where the load has been low for long enough."""
    work = sum(load.busy for load in seen.loads)
    others = min(seen.running, seen.target - 1) - scaling.spare
    low = all(load.delay_s < LOW * _may_wait(load, scaling) for load in seen.loads) and work <= SPARE * others
    if seen.target <= floor or not low:
        return Wanted(seen.target, "", replace(memory, high_since_s=None, low_since_s=None))
    since = seen.now_s if memory.low_since_s is None else memory.low_since_s
    memory = replace(memory, high_since_s=None, low_since_s=since)
    if seen.now_s - since < scaling.cooldown_s * memory.patience:
        return Wanted(seen.target, "", memory)
    kept = seen.now_s - memory.shrunk_s > _regretted_s(scaling, memory)
    patience = max(1.0, memory.patience / 2) if kept and memory.shrunk_s > -math.inf else memory.patience
    reason = f"the load of {work:.2f} has been low for {seen.now_s - since:.0f} s: {seen.target} → {seen.target - 1}"
    return Wanted(seen.target - 1, reason, replace(memory, low_since_s=None, shrunk_s=seen.now_s, patience=patience))


def _may_wait(load: Load, scaling: Scaling) -> float:
    """How long a row may wait: what the batch leaves of the latency wanted, at least a quarter of it."""
    return max(scaling.p99_s - load.service_s, scaling.p99_s / 4)


def _regretted_s(scaling: Scaling, memory: Memory) -> float:
    """For how long after a replica was taken away a new one means that this was wrong."""
    return max(2 * scaling.cooldown_s * memory.patience, 2 * SETTLE_S)
