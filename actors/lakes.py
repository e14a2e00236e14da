"""The lakes of a home: its own folder, and those that pipelines name; the ledger says which pipeline's is where."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from raymill.actors.lake import Lake
from raymill.runtime.expressions import digest
from raymill.runtime.home import Home
from raymill.runtime.messages import Event
from raymill.runtime.spec import Pipeline
from raymill.runtime.stores import Places, Stores, declared, places_of

_KIND = "stores.declared"


def stores_declared(pipeline: Pipeline, run: str) -> Event:
    """What the ledger is told when a run of the pipeline begins or goes on."""
    data = declared(pipeline.stores)
    key = f"{_KIND}/{pipeline.name}/{run}/{digest(data)}"
    return Event(
        kind=_KIND, subject=pipeline.name, pipeline=pipeline.name, run=run, wall_s=time.time(), data=data, key=key
    )


class Lakes:
    """Lakes of one home, each opened once."""

    def __init__(self, home: Home, events: Callable[..., list[dict[str, Any]]]) -> None:
        """`events` is the ledger's reading."""
        self._home = home
        self._events = events
        self._open: dict[str, Lake] = {}

    def at(self, stores: Stores) -> Lake:
        """The lake of these stores."""
        place = places_of(self._home, stores).lake
        return self._open.setdefault(str(place), Lake(place))

    def of(self, pipeline: str) -> Lake:
        """The lake that a pipeline's newest run declared; the home's own, if there was none."""
        return self.at(self._declared(pipeline))

    def places(self, pipeline: str) -> Places:
        """Where the stores are that a pipeline's newest run declared."""
        return places_of(self._home, self._declared(pipeline))

    def all(self) -> list[Lake]:
        """The home's own, and all that were declared."""
        declared = [Stores(lake=event["data"]["lake"]) for event in self._events(_KIND)]
        return list(dict.fromkeys(self.at(stores) for stores in (Stores(), *declared)))

    def _declared(self, pipeline: str) -> Stores:
        declared = self._events(_KIND, subject=pipeline)
        return Stores(**declared[-1]["data"]) if declared else Stores()
