"""The replayed spot market on disk: its steps, who was given notice, and so what room there is.

One writer: the cluster actor. The provider reads the capacity before each launch of a spot node.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from raymill.cluster.market import UNLIMITED, MarketStep, capacity_at
from raymill.cluster.notices import Reclaim
from raymill.runtime.errors import ClusterError
from raymill.runtime.home import Home
from raymill.runtime.messages import Notice
from raymill.runtime.whole_files import write_json


@dataclass(slots=True)
class SpotState:
    """All that a cluster actor must remember of the market."""

    steps: list[MarketStep] = field(default_factory=list)
    """The replay, in order; empty: there is enough, always."""
    done: int = 0
    """How many of them were applied."""
    reclaims: list[Reclaim] = field(default_factory=list)
    """Nodes given notice."""


def market_path(home: Home) -> Path:
    """Where the market's state lies."""
    return home.cluster / "market.json"


def write_spot(home: Home, state: SpotState) -> None:
    """Write it, atomically."""
    write_json(market_path(home), asdict(state))


def read_spot(home: Home) -> SpotState:
    """The state on disk; an untouched market if there is none.

    Raises:
        ClusterError: the file is damaged.
    """
    path = market_path(home)
    try:
        document = json.loads(path.read_text())
        return SpotState(
            steps=[MarketStep(**s) for s in document["steps"]],
            done=document["done"],
            reclaims=[Reclaim(**{**r, "notice": Notice(**r["notice"])}) for r in document["reclaims"]],
        )
    except FileNotFoundError:
        return SpotState()
    except (ValueError, KeyError, TypeError) as err:
        raise ClusterError(f"market file {path} is damaged ({err}): remove it, then `raymill up`") from err


def read_capacity(home: Home, now_s: float | None = None) -> int:
    """Room for spot nodes at this moment."""
    steps = read_spot(home).steps
    return capacity_at(steps, time.time() if now_s is None else now_s) if steps else UNLIMITED
