"""`watched.json`: the nodes whose start is in the ledger and whose stop is not, and when they were last seen.

Its writer is the cluster actor; when that is gone with its cluster, `down` closes the books from this file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from raymill.cluster.policy import WatchedNode, departures, started_event, stopped_event
from raymill.runtime.errors import ClusterError, StoreError
from raymill.runtime.home import Home
from raymill.runtime.ledger import Ledger
from raymill.runtime.whole_files import write_json

LEDGER_WAIT_S = 5.0
"""How long `down` waits for the ledger's lock, which the killed records actor held."""

log = logging.getLogger(__name__)


def watched_path(home: Home) -> Path:
    """Where the file lies."""
    return home.cluster / "watched.json"


def write_watched(home: Home, nodes: Mapping[str, WatchedNode], seen_s: float) -> None:
    """Write it, atomically."""
    write_json(watched_path(home), {"seen_s": seen_s, "nodes": [asdict(n) for n in nodes.values()]})


def read_watched(home: Home) -> tuple[dict[str, WatchedNode], float]:
    """The nodes by id, and the wall time at which they were last seen; nothing if there is no file.

    Raises:
        ClusterError: the file is damaged.
    """
    path = watched_path(home)
    try:
        document = json.loads(path.read_text())
        return {n["node_id"]: WatchedNode(**n) for n in document["nodes"]}, float(document["seen_s"])
    except FileNotFoundError:
        return {}, 0.0
    except (ValueError, KeyError, TypeError) as err:
        raise ClusterError(f"{path} is damaged ({err}): remove it; the cost of its nodes is then open-ended") from err


def close_books(home: Home, *, reason: str, stopped_s: float | None) -> int:
    """Write the stop of every watched node to the ledger, once no cluster runs; the number of nodes.

    Where the ledger can not be opened the file stays, and the next cluster actor does it.

    Args:
        home: whose books.
        reason: why they stopped.
        stopped_s: wall time of the stop; None: when they were last seen.
    """
    nodes, seen_s = read_watched(home)
    if nodes and home.record.exists():
        end_s = seen_s if stopped_s is None else stopped_s
        gone = departures(nodes, frozenset(), dict.fromkeys(nodes, reason), {}, end_s)
        try:
            ledger = Ledger(home.record, lock_wait_s=LEDGER_WAIT_S)
        except StoreError as err:
            log.warning("the books of %d nodes stay open for the next `up`: %s", len(nodes), err)
            return 0
        try:
            ledger.append([*map(started_event, nodes.values()), *map(stopped_event, gone)])
        finally:
            ledger.close()
    watched_path(home).unlink(missing_ok=True)
    return len(nodes)
