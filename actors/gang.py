"""Who gets bundles, in which market, and what the others are told: pure, the scheduler applies it.

Invariants
- What is granted fits, together with all that was granted before, on nodes that are there or may be launched.
- Requests are served in order; one that does not fit yet holds what it could use, so that smaller later ones can
  not starve it. One that can never fit, or is over its tenant's quota, holds nothing.
- An owner's first bundle lies on a reserved node where the cluster has such; only the others may lie on spot.
- No bundle goes to a node that will be taken away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from raymill.runtime.messages import LeaseRequest, Purpose

RESERVED = "reserved"
SPOT = "spot"
Resources = dict[str, float]
_SMALL = 1e-6
"""Ray counts resources in ten-thousandths; below this a difference is rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node as it was observed."""

    node_id: str
    """Ray node id."""
    node_type: str = ""
    """Node type that the autoscaler launched it as; empty: none."""
    market: str = ""
    """`reserved`, `spot`, or empty: none."""
    total: Resources
    """What it has."""
    free: Resources
    """What nobody holds."""
    draining: bool = False
    """Whether it will be taken away: nothing new goes there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKind:
    """A kind of node that the autoscaler may launch."""

    name: str
    """Node type's name."""
    market: str
    """Market of its nodes."""
    resources: Resources
    """What one has."""
    max_nodes: int
    """Most of them at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A bundle that is granted; `free` of its node is already without it."""

    owner: str
    """Who holds it."""
    tenant: str
    """Who pays."""
    market: str
    """Where it lies."""
    resources: Resources
    """What it holds."""
    placed: bool = True
    """Whether it lies on a node yet; otherwise a node is being launched for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a decision is made from."""

    nodes: tuple[Node, ...]
    """Nodes that are up."""
    kinds: tuple[NodeKind, ...] = ()
    """Kinds that may be launched."""
    held: tuple[Held, ...] = ()
    """All bundles that are granted."""
    quotas: dict[str, Resources] = field(default_factory=dict)
    """Tenant → the most it may hold at a time; not named: no bound."""

    @property
    def markets(self) -> frozenset[str]:
        """Markets of this cluster; empty where nodes are just nodes."""
        return frozenset({n.market for n in self.nodes} | {k.market for k in self.kinds}) - {""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request in the queue."""

    request: LeaseRequest
    """What is wanted."""
    last_chance: bool = False
    """Whether its time is up: from `min_count` on will do, on nodes that are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Yes: one market per bundle, in order (empty: any node)."""

    markets: tuple[str, ...]
    """Market of each bundle."""
    launches: int
    """Of them, those that wait for a node to be launched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """Not now."""

    reason: str
    """Why, in words."""
    hopeless: bool = False
    """Whether waiting can not help."""


def decide(queue: Sequence[Asked], facts: Facts) -> list[Grant | Queue]:
    """One decision per request, in the queue's order."""
    room = _Room(facts)
    for held in facts.held:
        if not held.placed:
            room.place(held.resources, [held.market], launch=True)
    used = {t: _sum(h.resources for h in facts.held if h.tenant == t) for t in {a.request.tenant for a in queue}}
    return [_decide_one(asked, facts, room, used) for asked in queue]


def _decide_one(asked: Asked, facts: Facts, room: _Room, used: dict[str, Resources]) -> Grant | Queue:
    request = asked.request
    if not _ever_fits(request, facts):
        return Queue(reason=_why_never(request, facts), hopeless=True)
    wanted = _within_quota(request, facts.quotas.get(request.tenant), used[request.tenant])
    if wanted < (request.min_count if asked.last_chance else request.count):
        return Queue(reason=_why_quota(request, facts.quotas[request.tenant], used[request.tenant]))
    before = room.as_words(request.resources)
    markets: list[str] = []
    launches = 0
    holds_reserved = any(h.owner == request.owner and h.market == RESERVED for h in facts.held)
    for i in range(wanted):
        found = room.place(
            request.resources,
            _markets_for(request, facts.markets, first=i == 0 and not holds_reserved),
            launch=not asked.last_chance,
        )
        if found is None:
            break
        markets.append(found[0])
        launches += found[1]
    if len(markets) >= (request.min_count if asked.last_chance else request.count):
        used[request.tenant] = _sum([used[request.tenant], *[request.resources] * len(markets)])
        return Grant(markets=tuple(markets), launches=launches)
    return Queue(
        reason=f"{len(markets)} of {request.count} bundles of {_words(request.resources)} fit now"
        f"{'' if request.min_count == request.count else f' ({request.min_count} would do)'}: {before}"
    )


def _markets_for(request: LeaseRequest, markets: frozenset[str], *, first: bool) -> list[str]:
    """Markets a bundle may lie in, the wanted one first."""
    if not markets:
        return [""]
    if request.purpose is Purpose.SERVING:  # on the head too, which is of no market
        return [*sorted(markets - {SPOT}), ""]
    may_be_spot = request.spot and SPOT in markets and not (first and RESERVED in markets)
    return ([SPOT] if may_be_spot else []) + [m for m in sorted(markets) if m != SPOT]


class _Room:
    """Capacity that is left while decisions are made one after the other."""

    def __init__(self, facts: Facts) -> None:
        self._slots = [(n.market, dict(n.free)) for n in facts.nodes if not n.draining]
        self._launched: list[tuple[str, Resources]] = []
        self._facts = facts
        self._left = {k.name: k.max_nodes - sum(n.node_type == k.name for n in facts.nodes) for k in facts.kinds}

    def place(self, bundle: Resources, markets: list[str], *, launch: bool) -> tuple[str, bool] | None:
        """Take room for a bundle; the market it lies in and whether its node must be launched, or None."""
        for market in markets:
            for slots, new in ((self._slots, False), (self._launched, True)):
                fitting = [free for m, free in slots if market in ("", m) and _fits(bundle, free)]
                if fitting and (launch or not new):
                    _take(bundle, min(fitting, key=lambda free: sum(free.values())))
                    return market, new
            kind = self._launchable(bundle, market) if launch else None
            if kind is not None:
                self._left[kind.name] -= 1
                free = dict(kind.resources)
                _take(bundle, free)
                self._launched.append((kind.market, free))
                return market, True
        return None

    def _launchable(self, bundle: Resources, market: str) -> NodeKind | None:
        for kind in self._facts.kinds:
            if market in ("", kind.market) and self._left[kind.name] > 0 and _fits(bundle, kind.resources):
                return kind
        return None

    def as_words(self, bundle: Resources) -> str:
        """How much of what a bundle wants is free, by market."""
        said = []
        for market in sorted(self._facts.markets) or [""]:
            nodes = [n for n in self._facts.nodes if n.market == market]
            free = sum(_fits(bundle, f) for m, f in self._slots if m == market)
            draining = sum(n.draining for n in nodes)
            more = sum(max(0, self._left[k.name]) for k in self._facts.kinds if k.market == market)
            said.append(
                f"{market or 'the cluster'} has {free} of {len(nodes)} nodes with room"
                f"{f', {draining} going away' if draining else ''}{f', {more} to launch' if more else ''}"
            )
        return "; ".join(said)


def _within_quota(request: LeaseRequest, quota: Resources | None, used: Resources) -> int:
    if quota is None:
        return request.count
    bounds = [
        int((quota[r] - used.get(r, 0.0) + _SMALL) / amount)
        for r, amount in request.resources.items()
        if r in quota and amount > 0
    ]
    return max(0, min([request.count, *bounds]))


def _ever_fits(request: LeaseRequest, facts: Facts) -> bool:
    """Whether an otherwise empty cluster with all its nodes launched could hold `min_count` bundles."""
    empty = Facts(
        nodes=tuple(Node(node_id=n.node_id, node_type=n.node_type, market=n.market, total=n.total, free=n.total)
                    for n in facts.nodes),
        kinds=facts.kinds,
    )  # fmt: skip
    room = _Room(empty)
    return all(
        room.place(request.resources, _markets_for(request, facts.markets, first=i == 0), launch=True) is not None
        for i in range(request.min_count)
    )


def _why_never(request: LeaseRequest, facts: Facts) -> str:
    if not _markets_for(request, facts.markets, first=True):
        return f"{request.owner} does not allow spot, and this cluster has spot nodes only: set spot=True"
    places = [(f"node type {k.name} (at most {k.max_nodes})", k.resources) for k in facts.kinds]
    places += [(f"node {n.node_id[:8]}", n.total) for n in facts.nodes if not n.node_type]
    has = "; ".join(f"{name} has {_words({r: v.get(r, 0.0) for r in request.resources})}" for name, v in places)
    return (
        f"{request.min_count} × {_words(request.resources)} never fits this cluster: {has or 'it has no node'}. "
        "Ask for less, or for another node type in cluster.toml"
    )


def _why_quota(request: LeaseRequest, quota: Resources, used: Resources) -> str:
    held = {r: used.get(r, 0.0) for r in quota}
    return (
        f"tenant {request.tenant!r} holds {_words(held)} of its {_words(quota)}; "
        f"{request.count} × {_words(request.resources)} more do not fit"
    )


def _fits(bundle: Resources, free: Resources) -> bool:
    return all(free.get(r, 0.0) + _SMALL >= amount for r, amount in bundle.items())


def _take(bundle: Resources, free: Resources) -> None:
    for r, amount in bundle.items():
        free[r] = free.get(r, 0.0) - amount


def _sum(all_of: Iterable[Resources]) -> Resources:
    total: Resources = {}
    for resources in all_of:
        for r, amount in resources.items():
            total[r] = total.get(r, 0.0) + amount
    return total


def _words(resources: Resources) -> str:
    return "{" + ", ".join(f"{r}: {amount:g}" for r, amount in resources.items()) + "}"
