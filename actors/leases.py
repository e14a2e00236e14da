"""The scheduler's book: leases that are held, requests that wait, nodes that will go; and their ledger events.

Plain state without Ray, clock or lock: the scheduler guards it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raymill.actors.gang import Asked, Facts, Grant, Held, Node, Resources, decide
from raymill.actors.pool import Group
from raymill.runtime.errors import LeaseError
from raymill.runtime.messages import Event, Lease, LeaseRequest, Notice, Purpose


@dataclass(eq=False)
class Ticket:
    """A request in the queue, and what was made for it so far."""

    request: LeaseRequest
    """What is wanted."""
    deadline: float
    """Monotonic time at which it gives up."""
    reason: str = ""
    """Why it waits; empty before the first decision."""
    markets: tuple[str, ...] = ()
    """Market of each granted bundle; empty: nothing is granted yet."""
    lease_ids: tuple[str, ...] = ()
    """Id of each granted bundle."""
    handles: dict[str, Any] = field(default_factory=dict)
    """Lease id → placement group that was asked for."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Lease id → node, for the bundles that are placed."""

    def grant(self, markets: tuple[str, ...]) -> None:
        """Bundles in these markets are on their way."""
        self.markets = markets
        self.lease_ids = tuple(f"{self.request.request_id}.{i}" for i in range(len(markets)))

    def forget(self, lease_ids: Sequence[str]) -> None:
        """These bundles were given back."""
        kept = [(i, m) for i, m in zip(self.lease_ids, self.markets, strict=True) if i not in lease_ids]
        self.lease_ids, self.markets = tuple(i for i, _ in kept), tuple(m for _, m in kept)
        self.nodes = {i: n for i, n in self.nodes.items() if i not in lease_ids}

    def leases(self) -> list[Lease]:
        """The bundles that are placed."""
        return [
            Lease(
                lease_id=lease_id,
                owner=self.request.owner,
                purpose=self.request.purpose,
                node_id=self.nodes[lease_id],
                market=market,
                placement_group=self.handles[lease_id],
                resources=dict(self.request.resources),
            )
            for lease_id, market in zip(self.lease_ids, self.markets, strict=True)
            if lease_id in self.nodes
        ]

    def wanted(self) -> str:
        """Markets that were asked, for a reason in words."""
        return ", ".join(market or "any node" for market in self.markets)


@dataclass(frozen=True, slots=True)
class _Terms:
    """What the book knows of a lease beyond the lease itself."""

    tenant: str
    request_id: str
    job_id: str
    node_id: str  # the node it costs: for a replica's grant the head
    pipeline: str
    run: str
    bundle: bool  # whether it is a placement group, not a replica's grant


class Book:
    """What is granted, what waits, what will go."""

    def __init__(self) -> None:
        self.leases: dict[str, Lease] = {}
        self.tickets: list[Ticket] = []
        self.notices: dict[str, Notice] = {}
        self.unconfirmed: set[str] = set()
        self._terms: dict[str, _Terms] = {}

    def add(self, lease: Lease, request: LeaseRequest, node_id: str) -> None:
        """A lease is held."""
        self.leases[lease.lease_id] = lease
        self._terms[lease.lease_id] = _Terms(
            tenant=request.tenant,
            request_id=request.request_id,
            job_id=request.job_id,
            node_id=node_id,
            pipeline=request.pipeline,
            run=request.run,
            bundle=lease.purpose is Purpose.TRAINING or lease.placement_group is not None,
        )

    def drop(self, lease_id: str) -> None:
        """A lease is no longer held."""
        self.leases.pop(lease_id, None)
        self._terms.pop(lease_id, None)
        self.unconfirmed.discard(lease_id)

    def of(self, owner: str) -> list[Lease]:
        """Leases of one owner, in the order in which they were granted."""
        return [x for x in self.leases.values() if x.owner == owner]

    def replicas_of(self, owner: str) -> list[Lease]:
        """Grants for an application's replicas."""
        return [x for x in self.of(owner) if not self._terms[x.lease_id].bundle]

    def granted_for(self, request_id: str) -> list[Lease]:
        """Leases that a request got."""
        return [x for i, x in self.leases.items() if self._terms[i].request_id == request_id]

    def held(self) -> list[Held]:
        """All granted bundles: leases, and what is on its way."""
        placed = [
            Held(owner=x.owner, tenant=self._terms[i].tenant, market=x.market, resources=x.resources)
            for i, x in self.leases.items()
        ]
        coming = [
            Held(owner=t.request.owner, tenant=t.request.tenant, market=market, resources=t.request.resources,
                 placed=lease_id in t.nodes)
            for t in self.tickets
            for lease_id, market in zip(t.lease_ids, t.markets, strict=True)
            if lease_id not in self.leases
        ]  # fmt: skip
        return placed + coming

    def adjusted(self, nodes: Sequence[Node]) -> tuple[Node, ...]:
        """Nodes without what we granted on them (Ray's own figures lag), and with those that will go marked."""
        ours: dict[str, list[Resources]] = {}
        for lease_id, lease in self.leases.items():
            if self._terms[lease_id].bundle:
                ours.setdefault(lease.node_id, []).append(lease.resources)
        for ticket in self.tickets:
            for lease_id, node_id in ticket.nodes.items():
                if lease_id not in self.leases:
                    ours.setdefault(node_id, []).append(ticket.request.resources)
        found = []
        for node in nodes:
            taken = ours.get(node.node_id, [])
            left = {r: amount - sum(t.get(r, 0.0) for t in taken) for r, amount in node.total.items()}
            free = {r: min(left[r], node.free.get(r, 0.0)) for r in left}
            found.append(replace(node, free=free, draining=node.draining or node.node_id in self.notices))
        return tuple(found)

    def lost(self, up: set[str], groups: dict[str, Group], dead_jobs: set[str]) -> dict[str, str]:
        """Lease id → why it is lost."""
        found = {}
        for lease_id in self.leases:
            terms, group = self._terms[lease_id], groups.get(lease_id)
            if lease_id in self.unconfirmed:
                found[lease_id] = "its grant was never confirmed"
            elif terms.node_id and terms.node_id not in up:
                found[lease_id] = "its node is gone"
            elif terms.bundle and (group is None or group.state != "CREATED"):
                found[lease_id] = "its placement group is gone" if group is None else "its node is gone"
            elif terms.job_id and terms.job_id in dead_jobs:
                found[lease_id] = "its owner's job ended"
        return found

    def rebuild(
        self, leases: Sequence[dict[str, Any]], notices: Sequence[dict[str, Any]], groups: dict[str, Group]
    ) -> None:
        """Take over what the ledger says is granted and not released."""
        released = {e["subject"] for e in leases if e["kind"] == "lease.released"}
        for event in leases:
            if event["kind"] != "lease.granted" or event["subject"] in released:
                continue
            lease, request, node_id = _from_event(event, groups.get(event["subject"]))
            self.add(lease, request, node_id)
        for event in notices:
            self.notices[event["subject"]] = Notice(**event["data"])

    def granted_event(self, lease: Lease, request: LeaseRequest, node: Node | None, wall_s: float) -> Event:
        """What the ledger is told of a grant: enough to rebuild it and to price it (`share` of its node)."""
        data = {
            "owner": lease.owner, "purpose": lease.purpose.value, "node_id": node.node_id if node else lease.node_id,
            "market": lease.market, "resources": lease.resources, "share": share(lease.resources, node),
            "tenant": request.tenant, "request_id": request.request_id, "job_id": request.job_id,
            "bundle": lease.placement_group is not None,
        }  # fmt: skip
        return Event(
            kind="lease.granted", subject=lease.lease_id, pipeline=request.pipeline, run=request.run, wall_s=wall_s,
            data=data, key=f"lease.granted/{lease.lease_id}",
        )  # fmt: skip

    def released_event(self, lease_id: str, reason: str, wall_s: float) -> Event:
        """What the ledger is told when a held lease ends."""
        lease, terms = self.leases[lease_id], self._terms[lease_id]
        data = {"owner": lease.owner, "purpose": lease.purpose.value, "node_id": terms.node_id, "market": lease.market,
                "tenant": terms.tenant, "reason": reason}  # fmt: skip
        return Event(
            kind="lease.released", subject=lease_id, pipeline=terms.pipeline, run=terms.run, wall_s=wall_s,
            data=data, key=f"lease.released/{lease_id}",
        )  # fmt: skip

    def queued_event(self, ticket: Ticket, wall_s: float) -> Event:
        """What the ledger is told when a request has to wait."""
        request = ticket.request
        data = {"owner": request.owner, "purpose": request.purpose.value, "count": request.count,
                "min_count": request.min_count, "resources": request.resources, "tenant": request.tenant,
                "reason": ticket.reason}  # fmt: skip
        return Event(
            kind="lease.queued", subject=request.request_id, pipeline=request.pipeline, run=request.run,
            wall_s=wall_s, data=data,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Leases, queue and notices for `raymill status`."""
        return {
            "leases": [
                {"lease_id": i, "owner": x.owner, "purpose": x.purpose.value, "node_id": self._terms[i].node_id,
                 "market": x.market, "resources": x.resources, "tenant": self._terms[i].tenant}
                for i, x in self.leases.items()
            ],
            "queue": [
                {"request_id": t.request.request_id, "owner": t.request.owner, "purpose": t.request.purpose.value,
                 "count": t.request.count, "min_count": t.request.min_count, "tenant": t.request.tenant,
                 "reason": f"{len(t.nodes)} of {len(t.markets)} bundles are placed ({t.wanted()})" if t.markets
                 else t.reason or "it was just asked for"}
                for t in self.tickets
                if not t.lease_ids or any(i not in self.leases for i in t.lease_ids)
            ],
            "notices": [
                {"node_id": n.node_id, "deadline_s": n.deadline_s, "reason": n.reason} for n in self.notices.values()
            ],
        }  # fmt: skip


def share(resources: Resources, node: Node | None) -> float:
    """Part of a node that a bundle takes up: its largest share of any resource, at most 1; 1 on an unknown node."""
    if node is None:
        return 1.0
    shares = [amount / node.total[r] for r, amount in resources.items() if amount > 0 and node.total.get(r, 0.0) > 0]
    return min(1.0, max(shares, default=1.0))


def _from_event(event: dict[str, Any], group: Group | None) -> tuple[Lease, LeaseRequest, str]:
    data = event["data"]
    lease = Lease(
        lease_id=event["subject"],
        owner=data["owner"],
        purpose=Purpose(data["purpose"]),
        node_id=data["node_id"] if data["bundle"] else "",
        market=data["market"],
        placement_group=group.handle if group else None,
        resources=data["resources"],
    )
    request = LeaseRequest(
        owner=data["owner"], purpose=lease.purpose, count=1, resources=data["resources"], tenant=data["tenant"],
        pipeline=event["pipeline"], run=event["run"], request_id=data["request_id"], job_id=data["job_id"],
    )  # fmt: skip
    return lease, request, data["node_id"]


def replica_lease(request: LeaseRequest) -> Lease:
    """A new grant for one replica; Serve chooses its node."""
    return Lease(
        lease_id=f"{request.purpose}-{uuid.uuid4().hex[:12]}",
        owner=request.owner,
        purpose=request.purpose,
        node_id="",
        market="",
        placement_group=None,
        resources=dict(request.resources),
    )


def replicas_allowed(request: LeaseRequest, mine: int, queue: Sequence[Asked], facts: Facts) -> int:
    """How many of `count` replicas an application may have that holds `mine`: at least `min_count`.

    What waits in the queue has the room before those beyond `min_count` and `mine`.

    Raises:
        LeaseError: the tenant's quota does not allow `min_count`.
    """
    quota = facts.quotas.get(request.tenant)
    others = [h for h in facts.held if h.owner != request.owner]
    least = min(request.min_count, request.count)
    if over := over_quota(replace(request, count=least), quota, others):
        raise LeaseError(over)
    counts = range(request.count, least - 1, -1)
    count = next(n for n in counts if not over_quota(replace(request, count=n), quota, others))
    sure = min(max(least, mine), count)
    if count == sure:
        return count
    more = Asked(request=replace(request, count=count - sure, min_count=1), last_chance=True)
    decision = decide([*queue, more], facts)[-1]
    return sure + (len(decision.markets) if isinstance(decision, Grant) else 0)


def over_quota(request: LeaseRequest, quota: Resources | None, others: Sequence[Held]) -> str:
    """Why the tenant may not hold `count` such bundles beside what `others` hold; empty: it may."""
    for r, amount in request.resources.items():
        used = sum(h.resources.get(r, 0.0) for h in others if h.tenant == request.tenant)
        if quota is not None and r in quota and used + amount * request.count > quota[r]:
            return (
                f"{request.owner}: {request.count} bundles of {amount:g} {r} are over the quota of tenant "
                f"{request.tenant!r}, {quota[r]:g} ({used:g} held by others): raise it, or ask for fewer"
            )
    return ""
