"""What a notebook may read over HTTP: models, drift, cost, status, lineage; each from the actor that knows it.

Everything here blocks (calls to actors) and is run in a thread. What does not run gives `Unavailable`, which the
endpoint tells as 503.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from raymill.actors.lake import Lake
from raymill.runtime import cost, lineage
from raymill.runtime.home import Home
from raymill.runtime.spawn import ask, find

_PATIENCE_S = 10.0

Reading = Callable[[Mapping[str, str]], Any]


class Readings:
    """Read-only views; `records` is the records actor or what stands for it."""

    def __init__(self, home: Home, records: Any) -> None:
        self._home = home
        self._records = records

    def find(self, what: str) -> Reading | None:
        """The reading of that name, if there is one; called with the query it gives a JSON value."""
        return {"models": self.models, "drift": self.drift, "cost": self.cost, "status": self.status}.get(what)

    def names(self) -> list[str]:
        """Names of the registered models."""
        return list(self._records.models())

    def models(self, query: Mapping[str, str]) -> Any:
        """Every version of every model, or of `?model=`."""
        names = [query["model"]] if "model" in query else self._records.models()
        return [asdict(version) for name in names for version in self._records.versions(name)]

    def drift(self, query: Mapping[str, str]) -> Any:
        """The verdicts so far, oldest first."""
        events = self._records.events("drift.judged", pipeline=query.get("model"))
        return [e["data"] for e in events]

    def cost(self, query: Mapping[str, str]) -> Any:
        """What was spent, by purpose."""
        return cost.split(self._records.events(), time.time()).to_json()

    def status(self, query: Mapping[str, str]) -> Any:
        """The pool: leases, and the queue with its reasons."""
        return ask(find("scheduler").status.remote(), timeout_s=_PATIENCE_S)

    def lineage(self, prediction: str) -> Any:
        """The way back from a prediction to its rows.

        Raises:
            UnknownPrediction: no such prediction is in the lake.
        """
        return lineage.trace(prediction, Lake(self._home.lake).read, self._records).to_json()
