"""Raylets on this machine as nodes, behind Ray's own `NodeProvider`; it lives in the autoscaler's monitor process.

Invariants
- One raylet starts at a time: two at once may take each other's port, and the demand would never recover.
- A `ray start` that fails or hangs leaves nothing and raises: the autoscaler asks again.
- The node table on disk is written before a launch and after every change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

import raymill.runtime.errors
from raymill.cluster import processes
from raymill.cluster.environment import HEAD_INSTANCE, INSTANCE_LABEL, MARKET_LABEL
from raymill.cluster.node_table import NodeEntry, NodeState, NodeTable, read_table, write_table
from raymill.cluster.ports import picker
from raymill.cluster.providers import namespace
from raymill.cluster.spec import HEAD_TYPE
from raymill.cluster.spot_state import read_capacity
from raymill.runtime.errors import ClusterError
from raymill.runtime.home import Home
from raymill.runtime.ids import new_ids

NODE_FOLDER = "n-"
"""How the folder of a worker node begins, within the session's scratch folder."""
_HEAD_TAGS = {
    TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
    TAG_RAY_USER_NODE_TYPE: HEAD_TYPE,
    TAG_RAY_NODE_NAME: HEAD_INSTANCE,
    TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """All that one `ray start` of a worker node needs."""

    instance: str
    node_type: str
    market: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    object_store_bytes: int
    agent_port: int
    node_address: str
    """Own address, where the node has one of its own; empty: this machine's."""
    temp_dir: str
    """Own folder, where the node shares the machine's /tmp: of nodes that share one, each that starts lays a job's
    working directory anew, under the feet of those that work in it. Empty: Ray's default."""


def start_command(launch: Launch, address: str) -> list[str]:
    """The `ray start` of a worker node: every port its own, memory and object store said, no second log monitor."""
    resources = dict(launch.resources)
    custom = {k: v for k, v in resources.items() if k not in ("CPU", "GPU", "memory", "object_store_memory")}
    labels = {**launch.labels, INSTANCE_LABEL: launch.instance}
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}"),
        f"--num-cpus={int(resources.get('CPU', 0))}",
        f"--num-gpus={int(resources.get('GPU', 0))}",
        f"--memory={int(resources['memory'])}",
        f"--object-store-memory={launch.object_store_bytes}",
        f"--resources={json.dumps(custom)}",
        "--labels=" + ",".join(f"{k}={v}" for k, v in sorted(labels.items())),
        f"--dashboard-agent-listen-port={launch.agent_port}",
        *("--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"),
        *([f"--temp-dir={launch.temp_dir}"] if launch.temp_dir else []),
        *([f"--node-ip-address={launch.node_address}"] if launch.node_address else ["--include-log-monitor=false"]),
    ]


class LocalProvider(NodeProvider):
    """Launches and ends raylets on this machine; see the module's invariants."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._home = Home(Path(provider_config["home"]))
        self._address = str(provider_config["address"])
        self._scratch = Path(provider_config["scratch"])
        self._isolate = bool(provider_config.get("isolate", False))
        self._timeout_s = float(provider_config.get("launch_timeout_s", 60))
        self._launching = threading.Lock()
        self._table_lock = threading.RLock()
        self._table = read_table(self._home)

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        self._notice_the_dead()
        with self._table_lock:
            present = [HEAD_INSTANCE, *self._table.present]
        return [n for n in present if all(self.node_tags(n).get(k) == v for k, v in tag_filters.items())]

    def is_running(self, node_id: str) -> bool:
        entry = self._table.nodes.get(node_id)
        return node_id == HEAD_INSTANCE or (entry is not None and entry.state is NodeState.RUNNING)

    def is_terminated(self, node_id: str) -> bool:
        return node_id != HEAD_INSTANCE and node_id not in self._table.present

    def node_tags(self, node_id: str) -> dict[str, str]:
        return dict(_HEAD_TAGS) if node_id == HEAD_INSTANCE else dict(self._table.nodes[node_id].tags)

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self._table_lock:
            entry = self._table.nodes[node_id]
            self._write(self._table.put(replace(entry, tags={**entry.tags, **tags})))

    def external_ip(self, node_id: str) -> str:
        return self.internal_ip(node_id)

    def internal_ip(self, node_id: str) -> str:
        head = self._address.rpartition(":")[0]
        return head if node_id == HEAD_INSTANCE else self._table.nodes[node_id].address or head

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        for _ in range(count):
            with self._launching:
                self._launch(node_config, tags, resources, labels)

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        raise ClusterError("the local provider launches by node type: set RAY_enable_autoscaler_v2=1")

    def terminate_node(self, node_id: str) -> None:
        """End a node that the autoscaler has drained; idempotent."""
        with self._launching:
            self._end(node_id, "terminated")

    def terminate_nodes(self, node_ids: list[str]) -> None:
        for node_id in node_ids:
            self.terminate_node(node_id)

    def _launch(
        self, node_config: dict[str, Any], tags: dict[str, str], resources: dict[str, float], labels: dict[str, str]
    ) -> None:
        node_type, market = tags[TAG_RAY_USER_NODE_TYPE], str(node_config["market"])
        self._refuse_without_capacity(node_type, market)
        instance = f"{node_type}-{new_ids(1)[0].lower()}"
        entry = NodeEntry(
            instance=instance,
            node_type=node_type,
            market=market,
            state=NodeState.LAUNCHING,
            tags={**tags, TAG_RAY_NODE_NAME: instance},
            launched_s=time.time(),
        )
        node = self._open_namespace() if self._isolate else None
        if node:
            entry = replace(entry, namespace=node.namespace, address=node.address)
        with self._table_lock:
            self._write(self._table.put(entry))
        launch = Launch(
            instance=instance,
            node_type=node_type,
            market=market,
            resources=resources,
            labels={MARKET_LABEL: market, **labels},
            object_store_bytes=int(node_config["object_store_memory"]),
            agent_port=_free_port(),
            node_address=node.address if node else "",
            temp_dir="" if node else str(self._scratch / f"{NODE_FOLDER}{instance[-8:]}"),
        )
        try:
            raylet = self._start(launch, node)
        except ClusterError:
            self._end(instance, "launch failed")
            raise
        with self._table_lock:
            self._write(self._table.put(replace(entry, state=NodeState.RUNNING, raylet=raylet)))

    def _start(self, launch: Launch, node: namespace.Node | None) -> processes.Process:
        """Run `ray start` to its end; the raylet that it left running."""
        command = start_command(launch, self._address)
        if node:
            hide = [Path("/tmp"), Path("/dev/shm"), self._home.root]
            command = namespace.command_inside(node, hide, _installed(), command)
        environment = {
            **os.environ,
            processes.NODE_MARK: launch.instance,
            "RAY_CLOUD_INSTANCE_ID": launch.instance,
            "RAY_NODE_TYPE_NAME": launch.node_type,
        }
        log = self._home.cluster / "logs" / f"{launch.instance}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("wb") as output:
                done = subprocess.run(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    timeout=self._timeout_s,
                    start_new_session=True,
                    check=False,
                )
        except subprocess.TimeoutExpired as err:
            raise ClusterError(f"node {launch.instance} was not up after {self._timeout_s} s: see {log}") from err
        raylets = [p for p in processes.marked(processes.NODE_MARK, launch.instance) if "/raylet/raylet " in p.command]
        if done.returncode != 0 or not raylets:
            raise ClusterError(f"node {launch.instance}: `ray start` failed with {done.returncode}: see {log}")
        return raylets[0]

    def _end(self, instance: str, reason: str) -> None:
        """End every process of the node, then its namespace; a node that is gone stays as it is."""
        entry = self._table.nodes.get(instance)
        if entry is None:
            return
        end_node(entry)
        if entry.namespace:
            namespace.close_node(namespace.network_of(self._home.root).node(_index(entry.namespace)))
        with self._table_lock:
            self._write(self._table.end(instance, reason, time.time()))

    def _notice_the_dead(self) -> None:
        for entry in list(self._table.present.values()):
            if entry.state is NodeState.RUNNING and not (entry.raylet and entry.raylet.is_alive):
                self._end(entry.instance, "died")

    def _refuse_without_capacity(self, node_type: str, market: str) -> None:
        if market != "spot":
            return
        capacity = read_capacity(self._home)
        running = sum(e.market == "spot" for e in self._table.present.values())
        if running >= capacity:
            raise ClusterError(
                f"the spot market has room for {capacity} nodes and {running} run: no {node_type} node now"
            )

    def _open_namespace(self) -> namespace.Node:
        used = {e.namespace for e in self._table.present.values() if e.namespace}
        node = namespace.network_of(self._home.root).node(namespace.free_index(used))
        namespace.open_node(node)
        return node

    def _write(self, table: NodeTable) -> None:
        write_table(self._home, table)
        self._table = table


def end_node(entry: NodeEntry, term_wait_s: float = processes.TERM_WAIT_S) -> None:
    """End every process of a worker node; with `term_wait_s` 0 at once, as a spot market does."""
    ours = processes.marked(processes.NODE_MARK, entry.instance)
    if entry.raylet and entry.raylet.is_alive:
        ours.append(entry.raylet)
    processes.end(processes.with_descendants(ours), term_wait_s)


def _installed() -> list[Path]:
    """What a second host would have of its own: Python, the distribution, Ray's token."""
    checkout = Path(raymill.runtime.errors.__file__).parents[1]
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    prefixes = {Path(sys.prefix), Path(sys.base_prefix), Path(sysconfig.get_paths()["purelib"]), checkout, Path(token)}
    return sorted(p for p in prefixes if not any(q != p and p.is_relative_to(q) for q in prefixes))


def _index(name: str) -> int:
    return int(name.rpartition("-")[2])


def _free_port() -> int:
    """A free port for the node's dashboard agent, whose default is the same for every raylet."""
    return picker()(1)
