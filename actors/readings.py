"""What a notebook may read over HTTP: models, drift, cost, status, lineage; each from the actor that knows it.

Everything here blocks (calls to actors) and is run in a thread. What does not run gives `Unavailable`, which the
endpoint tells as 503.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from raymill.actors.feature_readings import FeatureReadings
from raymill.actors.lakes import Lakes
from raymill.runtime import cost, lineage
from raymill.runtime.errors import UnknownModel, UnknownPrediction
from raymill.runtime.spawn import ask, find

_PATIENCE_S = 10.0

Reading = Callable[[Mapping[str, str]], Any]


class Readings:
    """Read-only views; `records` is the records actor or what stands for it."""

    def __init__(self, records: Any, lakes: Lakes) -> None:
        self._records = records
        self._lakes = lakes
        self._features = FeatureReadings(records, lakes)

    def find(self, what: str) -> Reading | None:
        """The reading of that name, if there is one; called with the query it gives a JSON value."""
        own = {"models": self.models, "drift": self.drift, "cost": self.cost, "status": self.status}.get(what)
        return own or self._features.find(what)

    def models(self, query: Mapping[str, str]) -> Any:
        """Every version of every model, or of `?model=`.

        Raises:
            UnknownModel: there is no such model.
        """
        known = self._known(query)
        return [asdict(version) for name in known for version in self._records.versions(name)]

    def drift(self, query: Mapping[str, str]) -> Any:
        """The verdicts so far, oldest first; those of `?model=`, if one is named.

        Raises:
            UnknownModel: there is no such model.
        """
        self._known(query)
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
        *others, last = self._lakes.all()
        for lake in others:
            with suppress(UnknownPrediction):
                return lineage.trace(prediction, lake.read, self._records).to_json()
        return lineage.trace(prediction, last.read, self._records).to_json()

    def _known(self, query: Mapping[str, str]) -> list[str]:
        """Names of all models, or the one that the query names."""
        names = list(self._records.models())
        model = query.get("model")
        if model is None:
            return names
        if model not in names:
            raise UnknownModel(f"there is no model {model!r}; there are {names}")
        return [model]
