"""The actor `scheduler`: holds the pool of nodes, grants leases to gangs and replicas, says why others wait.

`gang.decide` decides; this file observes the cluster, asks it, and applies the answer.

Invariants
- A rank's lease is one single-bundle placement group, detached and named by the lease: a restarted scheduler finds it.
- A request gets at least `min_count` bundles or none: what came too late or too few is given back before the answer.
- A lease is in the ledger before its owner hears of it; a group without an open lease in the ledger is removed at
  the start, a lease without its group is released. So none is lost, none is doubled.
- `acquire` may wait; everything else answers in milliseconds (a threaded actor: the mutex is never held for a wait).
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import ray

from raymill.actors.gang import Asked, Facts, Grant, Node, NodeKind, Queue, Resources, decide
from raymill.actors.leases import Book, Ticket, replica_lease, replicas_allowed
from raymill.actors.pool import RayPool
from raymill.runtime.messages import Event, Granted, Lease, LeaseRequest, Notice, Queued
from raymill.runtime.spawn import Remote

NAME = "scheduler"
"""The actor's name in Ray."""

MAX_CONCURRENCY = 16
"""Threads the actor is spawned with; `_MAX_WAITING` of them may wait in `acquire`."""
_MAX_WAITING = MAX_CONCURRENCY - 4
_POLL_S = 0.1
_PLACED_POLL_S = 0.02
_SWEEP_S = 1.0
"""Between two looks for leases whose node or job is gone."""
_SETTLE_S = 3.0
"""After a request's time is up: for bundles on nodes that are there already to be placed."""
_HOPELESS_S = 5.0
"""How long a request that can never fit is kept: a cluster that is starting grows in that time."""

_log = logging.getLogger(__name__)


class Records(Protocol):
    """The ledger, as far as the scheduler needs it: `RecordsActor` or `RemoteRecords`."""

    def append(self, events: Sequence[Event]) -> None:
        """Write events; returns when they are durable."""

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Events of a kind, in order."""


class GpuPoolScheduler:
    """Grants leases on the nodes of a Ray cluster.

    Args:
        records: the ledger.
        kinds: what the autoscaler may launch; empty on a cluster without it.
        quotas: tenant → the most it may hold.
        pool: the cluster; another one in tests.
    """

    def __init__(
        self,
        records: Records,
        kinds: Sequence[NodeKind] = (),
        quotas: dict[str, Resources] | None = None,
        pool: RayPool | None = None,
    ) -> None:
        self._records, self._pool = records, pool or RayPool()
        self._kinds, self._quotas = tuple(kinds), dict(quotas or {})
        self._mutex = threading.Condition(threading.RLock())
        self._granting = threading.Lock()
        self._book = Book()
        self._stopped = threading.Event()
        self._sweeper: threading.Thread | None = None

    def start(self) -> None:
        """Rebuild the leases from ledger and placement groups, then watch for those that are lost."""
        groups = self._pool.groups()
        self._book.rebuild(self._records.events("lease.*"), self._records.events("node.noticed"), groups)
        for lease_id, group in groups.items():
            if lease_id not in self._book.leases:
                self._pool.remove(group.handle)
        self.sweep()
        self._sweeper = threading.Thread(target=self._sweep_on, name="scheduler-sweep", daemon=True)
        self._sweeper.start()

    def stop(self) -> None:
        """End the watching; leases stay."""
        self._stopped.set()
        if self._sweeper is not None:
            self._sweeper.join()
            self._sweeper = None

    def health(self) -> bool:
        """Whether lost leases are watched for."""
        return self._sweeper is not None and self._sweeper.is_alive()

    def acquire(self, request: LeaseRequest, timeout_s: float = 60.0) -> Granted | Queued:
        """Bundles for a gang: all within `timeout_s`, else at least `min_count`, else none and the reason.

        Pending bundles make the autoscaler launch nodes. The same `request_id` gives the same leases again.
        """
        request = request if request.request_id else replace(request, request_id=uuid.uuid4().hex[:12])
        ticket = Ticket(request=request, deadline=time.monotonic() + timeout_s)
        refused = self._enter(ticket)
        if refused is not None:
            return refused
        try:
            return self._wait_for(ticket)
        finally:
            with self._mutex:
                self._book.tickets.remove(ticket)
                self._mutex.notify_all()

    def grant(self, request: LeaseRequest) -> Granted:
        """Leases for an application's replicas, which Serve places itself: what it holds afterwards.

        That is `count`, or fewer, down to `min_count`, where the quota or the room on the nodes ends. Requests that
        wait have the room before replicas beyond `min_count`; those up to it wait in Serve until there is room.

        Raises:
            LeaseError: the tenant's quota does not allow `min_count`.
        """
        with self._granting:
            with self._mutex:
                mine = self._book.replicas_of(request.owner)
                queue = [Asked(request=t.request) for t in self._book.tickets if not t.markets]
            count = replicas_allowed(request, len(mine), queue, self._facts())
            head = self._pool.head()
            new = [replica_lease(request) for _ in range(count - len(mine))]
            self._write_down([(lease, head) for lease in new], request)
            self.release([x.lease_id for x in mine[count:]], reason="fewer replicas")
            with self._mutex:
                return Granted(leases=tuple(self._book.replicas_of(request.owner)))

    def release(self, lease_ids: Sequence[str], reason: str = "released") -> None:
        """Give bundles back; what runs in them is killed. An unknown or released id is no error."""
        with self._mutex:
            going = [self._book.leases[i] for i in lease_ids if i in self._book.leases]
            events = [self._book.released_event(x.lease_id, reason, time.time()) for x in going]
        if not going:
            return
        self._records.append(events)
        for lease in going:
            if lease.placement_group is not None:
                self._pool.remove(lease.placement_group)
        with self._mutex:
            for lease in going:
                self._book.drop(lease.lease_id)
            self._mutex.notify_all()

    def notice(self, notice: Notice) -> None:
        """A node will be taken away: nothing new goes there, and the owners of its leases are told when they ask."""
        data = {"node_id": notice.node_id, "deadline_s": notice.deadline_s, "reason": notice.reason}
        key = f"notice/{notice.node_id}/{notice.deadline_s}"
        self._records.append(
            [Event(kind="node.noticed", subject=notice.node_id, wall_s=time.time(), data=data, key=key)]
        )
        with self._mutex:
            self._book.notices[notice.node_id] = notice
            self._mutex.notify_all()

    def notices(self, owner: str) -> list[Notice]:
        """Notices of nodes that hold leases of this owner."""
        with self._mutex:
            nodes = {x.node_id for x in self._book.of(owner)}
            return [n for node_id, n in self._book.notices.items() if node_id in nodes]

    def leases(self, owner: str) -> list[Lease]:
        """Leases this owner holds."""
        with self._mutex:
            return self._book.of(owner)

    def status(self) -> dict[str, Any]:
        """Pool, leases and queue, as JSON values."""
        facts = self._facts()
        with self._mutex:
            return {
                "nodes": [
                    {"node_id": n.node_id, "node_type": n.node_type, "market": n.market, "draining": n.draining,
                     "total": n.total, "free": {r: n.free.get(r, 0.0) for r in n.total}}
                    for n in facts.nodes
                ],
                "markets": sorted(facts.markets),
                **self._book.as_json(),
            }  # fmt: skip

    def sweep(self) -> None:
        """Release the leases whose node or job is gone; forget notices of nodes that are gone."""
        with self._mutex:
            known = set(self._book.leases)  # before the look: a lease that is granted meanwhile is not in `groups`
        up = {n.node_id for n in self._pool.nodes()}
        groups, dead_jobs = self._pool.groups(), self._pool.dead_jobs()
        with self._mutex:
            lost = {i: why for i, why in self._book.lost(up, groups, dead_jobs).items() if i in known}
            self._book.notices = {node: n for node, n in self._book.notices.items() if node in up}
        for reason in sorted(set(lost.values())):
            self.release([i for i, why in lost.items() if why == reason], reason=reason)

    def _sweep_on(self) -> None:
        while not self._stopped.wait(_SWEEP_S):
            try:
                self.sweep()
            except Exception:  # noqa: BLE001  the edge of a loop: a ledger that restarts must not end the watching
                _log.exception("looking for lost leases failed; it is tried again in %s s", _SWEEP_S)

    def _enter(self, ticket: Ticket) -> Granted | Queued | None:
        """Stand in the queue; an answer if none is needed: this request was granted before, or too many wait."""
        request_id = ticket.request.request_id
        with self._mutex:
            while any(t.request.request_id == request_id for t in self._book.tickets):
                self._mutex.wait(_POLL_S)
            granted = self._book.granted_for(request_id)
            if granted:
                return Granted(leases=tuple(granted))
            if len(self._book.tickets) >= _MAX_WAITING:
                return Queued(reason=f"{_MAX_WAITING} requests wait already: come again later")
            self._book.tickets.append(ticket)
            return None

    def _wait_for(self, ticket: Ticket) -> Granted | Queued:
        began = time.monotonic()
        while True:
            last_chance = time.monotonic() >= ticket.deadline
            decision = self._ask(ticket, last_chance)
            if isinstance(decision, Grant):
                return self._place(ticket)
            self._tell_why(ticket, decision)
            if last_chance or (decision.hopeless and time.monotonic() > began + _HOPELESS_S):
                return Queued(reason=decision.reason)
            with self._mutex:
                self._mutex.wait(min(_POLL_S, max(0.0, ticket.deadline - time.monotonic())))

    def _ask(self, ticket: Ticket, last_chance: bool) -> Grant | Queue:
        """Decide for all that wait; a grant is put on the ticket, so that the next decision counts it in."""
        nodes = self._pool.nodes()
        with self._mutex:
            queue = [t for t in self._book.tickets if not t.markets]
            asked = [Asked(request=t.request, last_chance=last_chance and t is ticket) for t in queue]
            decision = decide(asked, self._facts(nodes))[queue.index(ticket)]
            if isinstance(decision, Grant):
                ticket.grant(decision.markets)
            return decision

    def _facts(self, nodes: Sequence[Node] | None = None) -> Facts:
        seen = self._pool.nodes() if nodes is None else nodes
        with self._mutex:
            held = self._book.held()
            return Facts(nodes=self._book.adjusted(seen), kinds=self._kinds, held=tuple(held), quotas=self._quotas)

    def _place(self, ticket: Ticket) -> Granted | Queued:
        """Make a grant real: groups, then wait for them; too few in time and all are given back."""
        request = ticket.request
        try:
            for lease_id, market in zip(ticket.lease_ids, ticket.markets, strict=True):
                avoid = sorted(self._book.notices)
                ticket.handles[lease_id] = self._pool.create(lease_id, request.resources, market, avoid)
            end = max(ticket.deadline, time.monotonic() + _SETTLE_S)
            while self._placed(ticket) < len(ticket.markets) and time.monotonic() < end:
                time.sleep(_PLACED_POLL_S)
            if len(ticket.nodes) >= request.min_count:
                self._write_down([(x, x.node_id) for x in ticket.leases()], request)
                self._give_back(ticket, [i for i in ticket.lease_ids if i not in ticket.nodes])
                return Granted(leases=tuple(ticket.leases()))
            reason = f"only {len(ticket.nodes)} of {request.min_count} nodes came up in time ({ticket.wanted()})"
            self._give_back(ticket, list(ticket.lease_ids))
            return Queued(reason=reason)
        except BaseException:
            self._give_back(ticket, list(ticket.lease_ids))
            raise

    def _placed(self, ticket: Ticket) -> int:
        groups = self._pool.groups()
        with self._mutex:
            ticket.nodes = {i: groups[i].node_id for i in ticket.lease_ids if i in groups and groups[i].node_id}
            return len(ticket.nodes)

    def _give_back(self, ticket: Ticket, lease_ids: list[str]) -> None:
        for lease_id in lease_ids:
            if lease_id in ticket.handles:
                self._pool.remove(ticket.handles[lease_id])
        with self._mutex:
            ticket.forget(lease_ids)

    def _write_down(self, leases: list[tuple[Lease, str]], request: LeaseRequest) -> None:
        """Ledger before answer: an owner hears only of what is durable. Pairs of lease and node that it costs."""
        if not leases:
            return
        nodes = {n.node_id: n for n in self._pool.nodes()}
        now = time.time()
        with self._mutex:
            for lease, node in leases:
                self._book.add(lease, request, node)
        try:
            self._records.append([self._book.granted_event(x, request, nodes.get(node), now) for x, node in leases])
        except BaseException:
            with self._mutex:  # it may be written or not: the sweep releases it, which is right in both cases
                self._book.unconfirmed.update(x.lease_id for x, _ in leases)
            raise

    def _tell_why(self, ticket: Ticket, decision: Queue) -> None:
        with self._mutex:
            first, ticket.reason = not ticket.reason, decision.reason
        if first:
            self._records.append([self._book.queued_event(ticket, time.time())])


class RemoteScheduler(Remote):
    """The actor `scheduler` by name, as a plain object with its methods; picklable; outlives the actor's restarts.

    Requests get an id and this process's Ray job, so that a call that is made again grants nothing twice and the
    leases end with the job.
    """

    def __init__(self, name: str = NAME, patience_s: float = 60.0) -> None:
        super().__init__(name, patience_s)

    def acquire(self, request: LeaseRequest, timeout_s: float = 60.0) -> Granted | Queued:
        """As the actor's."""
        found: Granted | Queued = self._call("acquire", _with_ids(request), timeout_s)
        return found


def _with_ids(request: LeaseRequest) -> LeaseRequest:
    return replace(
        request,
        job_id=request.job_id or ray.get_runtime_context().get_job_id(),
        request_id=request.request_id or uuid.uuid4().hex[:12],
    )
