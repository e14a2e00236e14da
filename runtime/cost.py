"""What the nodes cost, split over what they were used for: a pure view of the ledger.

The bill is node-seconds × price. A lease has its share of its node while it is held; where leases overlap beyond
the whole node they share it in proportion. What nobody leased is idle.

Invariants
- Amounts are whole millionths of a dollar inside; idle is the bill minus the rest, so the parts sum to the bill.
- No part is negative, whatever the events: missing stops and releases, clocks that jump, leases of unknown nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

IDLE = "idle"
PURPOSES = ("training", "serving")
HEAD = "head"
"""Node type of the head, on which replicas run whose lease names no node."""
_MILLIONTHS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCost:
    """One node, from its start to its stop."""

    node_id: str
    """Ray node id."""
    node_type: str
    """Name in cluster.toml, or `head`."""
    market: str
    """`reserved` or `spot`."""
    price_usd_per_h: float
    """Its price."""
    started_s: float
    """Wall time at which it began to cost."""
    seconds: float
    """How long it cost."""
    running: bool
    """Whether it still does."""
    usd: float
    """What it cost."""
    parts: dict[str, float]
    """Purpose → USD, `idle` included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The bill and its parts, USD."""

    bill_usd: float
    """Node-seconds × price."""
    parts: dict[str, float]
    """`training`, `serving`, `idle`: they sum to the bill."""
    nodes: tuple[NodeCost, ...]
    """Every node, in the order in which they started."""
    by_run: dict[str, dict[str, float]]
    """Run → purpose → USD; idle belongs to nobody."""
    by_pipeline: dict[str, dict[str, float]]
    """Pipeline → purpose → USD."""
    by_tenant: dict[str, dict[str, float]]
    """Tenant → purpose → USD."""
    unpriced_leases: int
    """Leases on nodes that the ledger knows no price of."""

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(slots=True)
class _Span:
    """A node's time or a lease's time on it."""

    event: Mapping[str, Any]
    start: float
    end: float
    running: bool
    leases: list[_Span] = field(default_factory=list)
    seconds: float = 0.0  # of a lease: node-seconds that are its own

    @property
    def data(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.event["data"]
        return found


def split(events: Iterable[Mapping[str, Any]], now_s: float, *, since_s: float = -math.inf) -> Cost:
    """The bill of all nodes between two moments of wall time, and what it was spent on.

    Args:
        events: the ledger's, in its order; other kinds than `node.*` and `lease.*` are passed over.
        now_s: wall time up to which nodes cost that have not stopped.
        since_s: wall time before which nothing is counted.
    """
    nodes, leases = _spans(list(events), since_s, now_s)
    unpriced = 0
    for lease in leases:
        node = _node_of(lease, nodes)
        if node is None:
            unpriced += 1
        else:
            node.leases.append(lease)
    costs = []
    paid: list[tuple[_Span, int]] = []
    for node in nodes:
        bill, amounts = _price(node)
        paid += zip(node.leases, amounts, strict=True)
        costs.append(_node_cost(node, bill, amounts))
    bill_total = sum(round(c.usd * _MILLIONTHS) for c in costs)
    parts = dict.fromkeys(PURPOSES, 0)
    for lease, amount in paid:
        parts[_purpose(lease)] = parts.get(_purpose(lease), 0) + amount
    parts[IDLE] = bill_total - sum(parts.values())
    return Cost(
        bill_usd=bill_total / _MILLIONTHS,
        parts=_usd(parts),
        nodes=tuple(costs),
        by_run=_by(paid, lambda lease: lease.event["run"]),
        by_pipeline=_by(paid, lambda lease: lease.event["pipeline"]),
        by_tenant=_by(paid, lambda lease: lease.data.get("tenant", "")),
        unpriced_leases=unpriced,
    )


def _spans(events: Sequence[Mapping[str, Any]], since_s: float, now_s: float) -> tuple[list[_Span], list[_Span]]:
    """Nodes and leases with their times, cut to the window."""
    nodes: list[_Span] = []
    leases: list[_Span] = []
    open_: dict[tuple[str, str], _Span] = {}
    unheard: dict[tuple[str, str], _Span] = {}  # ended by inference; what the ledger says later is better
    last_s = -math.inf  # newest wall time seen: when a cluster that died without a word was last alive
    for event in events:
        thing, _, verb = event["kind"].partition(".")
        key = (thing, event["subject"])
        if (thing, verb) == ("node", "started") and event["data"].get("node_type") == HEAD:
            for old in [k for k in open_ if k[0] == "node" and k != key]:
                unheard[old] = open_.pop(old)
                _close(unheard[old], last_s)
        if verb in ("started", "granted") and thing in ("node", "lease") and key not in open_:
            span = _Span(event, event["wall_s"], now_s, running=True)
            open_[key] = span
            (nodes if thing == "node" else leases).append(span)
        elif verb in ("stopped", "released") and (key in open_ or key in unheard):
            _close(open_.pop(key) if key in open_ else unheard.pop(key), event["wall_s"])
        last_s = max(last_s, event["wall_s"])
    for span in (*nodes, *leases):
        span.start = min(max(span.start, since_s), now_s)
        span.end = max(span.start, min(span.end, now_s))
    return nodes, leases


def _close(span: _Span, end_s: float) -> None:
    span.end, span.running = max(span.start, end_s), False


def _node_of(lease: _Span, nodes: Sequence[_Span]) -> _Span | None:
    """The span of its node that a lease lies in; without a node id the head's."""
    node_id = lease.data.get("node_id", "")
    mine = [n for n in nodes if (n.event["subject"] == node_id if node_id else n.data.get("node_type") == HEAD)]
    over = [n for n in mine if n.start <= lease.start <= n.end]
    return over[-1] if over else (mine[-1] if mine else None)


def _price(node: _Span) -> tuple[int, list[int]]:
    """A node's bill and each of its leases' part of it, in millionths of a dollar."""
    price = max(0.0, float(node.data.get("price_usd_per_h") or 0.0))
    bill = round((node.end - node.start) * price / 3600 * _MILLIONTHS)
    _share_out(node)
    left, amounts = bill, []
    for lease in node.leases:
        amount = min(left, math.floor(lease.seconds * price / 3600 * _MILLIONTHS))
        amounts.append(amount)
        left -= amount
    return bill, amounts


def _share_out(node: _Span) -> None:
    """Give every lease its node-seconds: its share while it is held, less where the shares exceed the node."""
    changes: list[tuple[float, bool, int]] = []
    for i, lease in enumerate(node.leases):
        start, end = max(lease.start, node.start), min(lease.end, node.end)
        if end > start:
            changes += [(start, True, i), (end, False, i)]
    held: dict[int, float] = {}
    before = node.start
    for moment, begins, i in sorted(changes):
        total = max(1.0, sum(held.values()))
        for j, share in held.items():
            node.leases[j].seconds += (moment - before) * share / total
        before = moment
        if begins:
            held[i] = min(1.0, max(0.0, float(node.leases[i].data.get("share", 1.0))))
        else:
            del held[i]


def _node_cost(node: _Span, bill: int, amounts: Sequence[int]) -> NodeCost:
    parts = dict.fromkeys(PURPOSES, 0)
    for lease, amount in zip(node.leases, amounts, strict=True):
        parts[_purpose(lease)] = parts.get(_purpose(lease), 0) + amount
    parts[IDLE] = bill - sum(parts.values())
    return NodeCost(
        node_id=node.event["subject"],
        node_type=node.data.get("node_type", ""),
        market=node.data.get("market", ""),
        price_usd_per_h=float(node.data.get("price_usd_per_h") or 0.0),
        started_s=node.event["wall_s"],
        seconds=node.end - node.start,
        running=node.running,
        usd=bill / _MILLIONTHS,
        parts=_usd(parts),
    )


def _purpose(lease: _Span) -> str:
    return str(lease.data.get("purpose", "training"))


def _by(paid: Sequence[tuple[_Span, int]], name: Any) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, int]] = {}
    for lease, amount in paid:
        parts = found.setdefault(name(lease), {})
        parts[_purpose(lease)] = parts.get(_purpose(lease), 0) + amount
    return {key: _usd(parts) for key, parts in sorted(found.items())}


def _usd(parts: Mapping[str, int]) -> dict[str, float]:
    return {purpose: amount / _MILLIONTHS for purpose, amount in parts.items()}
