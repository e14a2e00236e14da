"""`ClusterActor`: watches the nodes, writes their cost-relevant life to the ledger, replays a spot market.

Invariants
- A node's start and stop are written once each, under keys; what could not be written is tried again at the next look.
- What it must not lose lies on disk (`watched.json`, `market.json`): killed and started again it goes on, and closes
  the books of nodes that went meanwhile.
- A spot node is reclaimed at its deadline whether or not anybody listened to the notice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raymill.cluster.books import read_watched, write_watched
from raymill.cluster.environment import INSTANCE_LABEL, TYPE_LABEL
from raymill.cluster.market import UNLIMITED, schedule, victims
from raymill.cluster.node_table import NodeEntry, read_table
from raymill.cluster.notices import SPOT_REASON, Reclaim, add, due, ledger_events, pending, untold
from raymill.cluster.policy import WatchedNode, departures, started_event, stopped_event
from raymill.cluster.processes import NODE_MARK, end, marked, with_descendants
from raymill.cluster.spec import HEAD_TYPE, ClusterConfig
from raymill.cluster.spot_state import SpotState, read_spot, write_spot
from raymill.runtime.errors import ClusterError, RaymillError
from raymill.runtime.home import Home
from raymill.runtime.messages import Event, Notice
from raymill.runtime.records import RemoteRecords

NAME = "cluster"
POLL_S = 1.0
"""Time between two looks at the nodes, and the most that a reclaim comes late."""
SEEN_EVERY_S = 5.0
"""How often it writes down that it still sees the nodes: how late the books of a killed cluster may be."""
KEPT_RECLAIMS = 200
_DRAINED_IDLE = 4  # NodeDeathInfo.AUTOSCALER_DRAIN_IDLE
_HEAD_RESOURCE = "node:__internal_head__"

log = logging.getLogger(__name__)

Record = Callable[[list[Event]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenNode:
    """A node as Ray shows it."""

    node_id: str
    instance: str
    node_type: str
    alive: bool = True
    drained: bool = False
    """Whether the autoscaler let it go for idleness."""


def nodes_of_ray() -> list[SeenNode]:
    """The nodes of the cluster that this process is connected to, those that are gone as well."""
    import ray

    return [
        SeenNode(
            node_id=node["NodeID"],
            instance=node["Labels"].get(INSTANCE_LABEL, ""),
            node_type=node["Labels"].get(TYPE_LABEL, HEAD_TYPE if _HEAD_RESOURCE in node["Resources"] else ""),
            alive=node["Alive"],
            drained=node.get("DeathReason") == _DRAINED_IDLE,
        )
        for node in ray.nodes()
    ]


def tell_scheduler(notice: Notice) -> None:
    """Give a notice to the scheduler.

    Raises:
        Unavailable: no scheduler runs.
    """
    import ray

    from raymill.runtime.spawn import find

    ray.get(find("scheduler").notice.remote(notice), timeout=10)


class ClusterActor:
    """The actor `cluster`; a plain class that also works without Ray."""

    def __init__(
        self,
        home: str | Path,
        config: ClusterConfig,
        record: Record | None = None,
        notify: Callable[[Notice], None] = tell_scheduler,
        look: Callable[[], Sequence[SeenNode]] = nodes_of_ray,
    ) -> None:
        """Store; nothing begins before `start`.

        Args:
            home: root of RAYMILL_HOME.
            config: prices and markets of the node types.
            record: takes events; the actor `records` if absent.
            notify: takes notices.
            look: shows the nodes.
        """
        self._home = Home(Path(home))
        self._config = config
        self._record: Record = record or RemoteRecords()
        self._notify = notify
        self._look = look
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._known: dict[str, WatchedNode] = {}
        self._seen_s = 0.0
        self._written: set[str] = set()
        self._spot = SpotState()
        self._fault = ""

    def start(self) -> None:
        """Read what is on disk, look once, then keep looking.

        Raises:
            Unavailable: the actor `records` does not run: a cluster without books is not watched.
        """
        self._record([])
        self._known, self._seen_s = read_watched(self._home)
        self._spot = read_spot(self._home)
        self.look()
        self._thread = threading.Thread(target=self._run, name="cluster-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cease to look; idempotent."""
        self._stopped.set()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def health(self) -> bool:
        """Whether it looks at the nodes and the last look succeeded."""
        return bool(self._thread and self._thread.is_alive()) and not self._fault

    def status(self) -> dict[str, Any]:
        """Living nodes, the market, nodes on their way out, and what went wrong last."""
        with self._lock:
            now_s = time.time()
            return {
                "nodes": [asdict(n) for n in self._known.values()],
                "usd_per_h": sum(n.price_usd_per_h for n in self._known.values()),
                "market": {
                    "capacity": self._capacity(),
                    "steps": len(self._spot.steps),
                    "steps_done": self._spot.done,
                    "reclaims": [asdict(r) for r in self._spot.reclaims],
                },
                "fault": self._fault,
                "wall_s": now_s,
            }

    def replay(self, trace: Sequence[Mapping[str, Any]], scale: float = 1.0) -> int:
        """Replay a spot market from now on, in place of any replay before; the number of its steps.

        Args:
            trace: `{at_s, available, notice_s}` each (see `market.schedule`); `[]` gives the market enough again.
            scale: wall seconds per second of the trace.

        Raises:
            SpecError: an entry of the trace is wrong.
        """
        with self._lock:
            steps = schedule(trace, time.time(), scale)
            self._spot = SpotState(steps=steps, done=0, reclaims=self._spot.reclaims)
            write_spot(self._home, self._spot)
            self.look()
            return len(steps)

    def reclaim(self, notice_s: float, node_id: str = "") -> Notice:
        """Take one spot node away after a notice, the newest if none is named; launches stay allowed.

        Raises:
            ClusterError: no spot node runs, or that one is none.
        """
        with self._lock:
            spot = self._spot_nodes()
            candidates = victims(spot, pending(self._spot.reclaims), 0)
            chosen = node_id or (candidates[-1] if candidates else "")
            if chosen not in spot:
                raise ClusterError(f"no spot node {chosen or 'at all'} runs: `raymill status` lists the nodes")
            self._give_notice([chosen], notice_s, time.time())
            return next(r.notice for r in self._spot.reclaims if r.notice.node_id == chosen)

    def look(self) -> None:
        """One look: nodes that came and went, the market's next steps, notices that are due."""
        with self._lock:
            now_s = time.time()
            self._watch(now_s)
            self._write(ledger_events(self._spot.reclaims))
            self._apply_steps(now_s)
            self._fault = self._tell()
            for reclaim in due(self._spot.reclaims, now_s):
                self._take(reclaim)

    def _run(self) -> None:
        while not self._stopped.wait(POLL_S):
            try:
                self.look()
            except Exception as err:
                self._fault = f"{type(err).__name__}: {err}"
                log.exception("the look at the nodes failed; the next one tries again")

    def _watch(self, now_s: float) -> None:
        shown = self._look()
        seen = {node.node_id: node for node in shown if node.alive}
        table = read_table(self._home)
        known = dict(self._known)
        for node in seen.values():
            if node.node_id not in known:
                known[node.node_id] = self._watched(node, table.nodes.get(node.instance), now_s)
        reasons, gone_s = self._why(known, table.nodes)
        for node in shown:
            if node.drained:
                reasons[node.node_id] = "idle"
        first_look = not self._written
        gone = departures(known, frozenset(seen), reasons, gone_s, self._seen_s if first_look else now_s)
        if known != self._known:  # on disk before the ledger: a node that has a start there gets its stop
            write_watched(self._home, known, now_s)
        self._write([*map(started_event, known.values()), *map(stopped_event, gone)])
        staying = {node_id: node for node_id, node in known.items() if node_id in seen}
        if staying != known or now_s - self._seen_s >= SEEN_EVERY_S:
            write_watched(self._home, staying, now_s)
            self._seen_s = now_s
        self._known = staying

    def _write(self, events: list[Event]) -> None:
        """Record what this actor has not recorded yet; the keys make it once in the ledger, whoever repeats it."""
        fresh = [e for e in events if e.key not in self._written]
        if fresh:
            self._record(fresh)
            self._written |= {e.key for e in fresh}

    def _watched(self, node: SeenNode, entry: NodeEntry | None, now_s: float) -> WatchedNode:
        return WatchedNode(
            node_id=node.node_id,
            instance=node.instance,
            node_type=node.node_type,
            market=self._config.market(node.node_type),
            price_usd_per_h=self._config.price(node.node_type),
            started_s=entry.launched_s if entry else now_s,
        )

    def _why(
        self, known: Mapping[str, WatchedNode], entries: Mapping[str, NodeEntry]
    ) -> tuple[dict[str, str], dict[str, float]]:
        """Node id → reason and wall time of its end, from what we took ourselves and what the provider saw."""
        reasons, gone_s = {}, {}
        for node_id, node in known.items():
            entry = entries.get(node.instance)
            if entry and entry.state.is_terminal and entry.ended_s is not None:
                reasons[node_id] = "idle" if entry.reason == "terminated" else entry.reason
                gone_s[node_id] = entry.ended_s
        for reclaim in self._spot.reclaims:
            if reclaim.reclaimed_s is not None:
                reasons[reclaim.notice.node_id] = SPOT_REASON
                gone_s[reclaim.notice.node_id] = reclaim.reclaimed_s
        return reasons, gone_s

    def _spot_nodes(self) -> dict[str, float]:
        return {n.node_id: n.started_s for n in self._known.values() if n.market == "spot"}

    def _capacity(self) -> int:
        return self._spot.steps[self._spot.done - 1].capacity if self._spot.done else UNLIMITED

    def _apply_steps(self, now_s: float) -> None:
        while self._spot.done < len(self._spot.steps) and self._spot.steps[self._spot.done].wall_s <= now_s:
            step = self._spot.steps[self._spot.done]
            going = victims(self._spot_nodes(), pending(self._spot.reclaims), step.capacity)
            self._spot.done += 1
            self._give_notice(going, step.notice_s, now_s)

    def _give_notice(self, node_ids: Sequence[str], notice_s: float, now_s: float) -> None:
        fresh = [
            Reclaim(notice=Notice(node_id=n, deadline_s=now_s + notice_s, reason=SPOT_REASON), noticed_s=now_s)
            for n in node_ids
        ]
        self._spot.reclaims = add(self._spot.reclaims, fresh)[-KEPT_RECLAIMS:]
        write_spot(self._home, self._spot)
        self._write(ledger_events(self._spot.reclaims))
        self._fault = self._tell()

    def _tell(self) -> str:
        """Give the scheduler what it has not been told; what failed, which the next look tries again."""
        fault = ""
        for reclaim in untold(self._spot.reclaims):
            try:
                self._notify(reclaim.notice)
            except (RaymillError, TimeoutError) as err:
                fault = f"notice for node {reclaim.notice.node_id} not delivered: {err}"
                log.error("%s", fault)
                continue
            self._put(replace(reclaim, told=True))
        return fault

    def _take(self, reclaim: Reclaim) -> None:
        """End every process of the node at once; one that went before its deadline was not reclaimed."""
        node_id = reclaim.notice.node_id
        node = self._known.get(node_id)
        if node is None:
            self._spot.reclaims = [r for r in self._spot.reclaims if r.notice.node_id != node_id]
            write_spot(self._home, self._spot)
            return
        entry = read_table(self._home).nodes.get(node.instance)
        if entry is None:
            raise ClusterError(f"spot node {node_id} is not in the provider's table: it can not be reclaimed")
        ours = marked(NODE_MARK, entry.instance) + ([entry.raylet] if entry.raylet else [])
        end(with_descendants(ours), term_wait_s=0)
        self._put(replace(reclaim, reclaimed_s=time.time()))
        self._write(ledger_events(self._spot.reclaims))

    def _put(self, reclaim: Reclaim) -> None:
        node_id = reclaim.notice.node_id
        self._spot.reclaims = [reclaim if r.notice.node_id == node_id else r for r in self._spot.reclaims]
        write_spot(self._home, self._spot)
