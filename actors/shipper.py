"""Ships segments of the prediction log in a process of its own, beside the replica and after it in turn for a core.

Turning a batch of answers into Arrow and Parquet holds Python for tens of milliseconds; in the replica's own process
callers would wait for that. The replica goes on deciding what is shipped and when (`PredictionLog`); here is only the
work. The process ends with its replica; one that dies is replaced at the next segment, which is sent again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raymill.actors import surroundings
from raymill.actors.lake import Lake
from raymill.actors.lakes import Lakes
from raymill.actors.prediction_sink import LakeSink
from raymill.actors.predictions import read_segment
from raymill.runtime.errors import Unavailable
from raymill.runtime.home import Home
from raymill.runtime.records import RemoteRecords
from raymill.runtime.stores import Stores, declared

NICE = 19
"""A replica and its proxy are asked by somebody who waits; the log is not. Under full load it gets a hundredth or
so of a core by this, and takes more rows at once the longer it has waited."""
PATIENCE_S = 300.0
"""For how long one segment may take, an object store far away included."""


class Shipper:
    """Of one replica; a plain class, made an actor by `Outside`."""

    def __init__(self, home: str) -> None:
        self._home = Home(Path(home))
        self._lakes = Lakes(self._home, lambda *what, **narrowed: RemoteRecords().events(*what, **narrowed))
        self._stores: dict[str, Stores] = {}
        lock = self._home.spool / "sink.lock"
        self._sink = LakeSink(self._lake_of, lock, surroundings.observe, vectors_are_new=True)

    def start(self) -> None:
        """Give way to who waits for an answer."""
        os.nice(NICE)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # nor does it interrupt anybody when it wakes up

    def ship(self, segment: str, path: str, stores: Mapping[str, Mapping[str, Any]]) -> int:
        """Take a segment, once however often it is sent; how many rows it has.

        Args:
            segment: its name, for ever.
            path: its file.
            stores: model → where its lake is, as `declared` writes it; the ledger knows it of the others.
        """
        self._stores = {model: Stores(**place) for model, place in stores.items()}
        rows = read_segment(Path(path))
        self._sink.ship(segment, rows)
        return rows.num_rows

    def _lake_of(self, model: str) -> Lake:
        place = self._stores.get(model)
        return self._lakes.of(model) if place is None else self._lakes.at(place)


class Outside:
    """The sink of a replica on Ray: hands files to the shipper."""

    def __init__(self, home: Home, stores: Callable[[], Mapping[str, Stores]]) -> None:
        """`stores` tells where the lakes of the models are that are served here now."""
        self._home, self._stores = home, stores
        self._shipper: Any = None

    def ship_file(self, segment: str, path: Path) -> int:
        """As `Shipper.ship`.

        Raises:
            Unavailable: the process has died; the next call has another one.
        """
        from raymill.runtime.spawn import ask, beside

        if self._shipper is None:
            self._shipper = beside(Shipper, str(self._home.root))
        stores = {model: declared(place) for model, place in self._stores().items()}
        try:
            return int(ask(self._shipper.ship.remote(segment, str(path), stores), timeout_s=PATIENCE_S))
        except Unavailable:
            self._shipper = None
            raise
