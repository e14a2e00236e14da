"""The provider's table of worker nodes, on disk: who runs, with which pids, and how the gone ones ended.

One writer: the provider, in the autoscaler's monitor process. Everybody else reads. Written by atomic rename, so a
reader never sees half a table, and a monitor that starts again finds its nodes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from raymill.cluster.processes import Process
from raymill.runtime.errors import ClusterError
from raymill.runtime.home import Home
from raymill.runtime.whole_files import write_json

KEPT_ENDED = 200
"""Ended nodes that the table remembers, so that a watcher can say why one went."""


class NodeState(StrEnum):
    """Life of a worker node, as its provider sees it."""

    LAUNCHING = "launching"
    RUNNING = "running"
    ENDED = "ended"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing follows."""
        return self is NodeState.ENDED


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEntry:
    """One worker node."""

    instance: str
    """Its id, never used again; the label `raymill.io/instance` in Ray."""
    node_type: str
    """Name in cluster.toml."""
    market: str
    """`reserved` or `spot`."""
    state: NodeState
    """Where in its life it is."""
    tags: dict[str, str]
    """Ray's own tags."""
    launched_s: float
    """Wall time at which the launch began."""
    raylet: Process | None = None
    """Its raylet, once it runs."""
    address: str = ""
    """Its IP."""
    namespace: str = ""
    """Its network namespace; empty: this machine's."""
    ended_s: float | None = None
    """Wall time at which it was gone."""
    reason: str = ""
    """Why it is gone: `terminated` by the autoscaler, `died`, `launch failed`."""


@dataclass(frozen=True, slots=True)
class NodeTable:
    """All nodes, by instance id."""

    nodes: dict[str, NodeEntry] = field(default_factory=dict)

    def put(self, entry: NodeEntry) -> NodeTable:
        """The table with that entry, its ended ones trimmed."""
        nodes = {**self.nodes, entry.instance: entry}
        ended = sorted((e for e in nodes.values() if e.state.is_terminal), key=lambda e: e.ended_s or 0.0)
        for old in ended[:-KEPT_ENDED]:
            del nodes[old.instance]
        return NodeTable(nodes)

    def end(self, instance: str, reason: str, now_s: float) -> NodeTable:
        """The table with that node ended; a node that has ended keeps its reason."""
        entry = self.nodes.get(instance)
        if entry is None or entry.state.is_terminal:
            return self
        return self.put(replace(entry, state=NodeState.ENDED, ended_s=now_s, reason=reason))

    @property
    def present(self) -> dict[str, NodeEntry]:
        """Those that run or are on their way."""
        return {k: e for k, e in self.nodes.items() if not e.state.is_terminal}


def table_path(home: Home) -> Path:
    """Where the table lies."""
    return home.cluster / "nodes.json"


def read_table(home: Home) -> NodeTable:
    """The table as it is on disk; empty if there is none.

    Raises:
        ClusterError: the file is damaged.
    """
    path = table_path(home)
    try:
        document = json.loads(path.read_text())
        return NodeTable({e["instance"]: _entry(e) for e in document["nodes"]})
    except FileNotFoundError:
        return NodeTable()
    except (ValueError, KeyError, TypeError) as err:
        raise ClusterError(f"node table {path} is damaged ({err}): `raymill down`, then `raymill up`") from err


def write_table(home: Home, table: NodeTable) -> None:
    """Write it, atomically."""
    write_json(table_path(home), {"nodes": [asdict(e) for e in table.nodes.values()]})


def _entry(document: dict[str, Any]) -> NodeEntry:
    raylet = document.pop("raylet")
    state = NodeState(document.pop("state"))
    return NodeEntry(**document, state=state, raylet=Process(**raylet) if raylet else None)
