"""TrainerActor: one rank of a gang, a process that stays warm from one training to the next.

The driver forms the group (`listen`, `join`), gives every rank the tables (`load`) and the state (`begin`), and
lets all of them run to a common step (`advance`). A step that fails, because a neighbour died or the user's net
raised, ends `advance` with the reason; the rank keeps its state and leaves the group.

Invariant: after every call the rank's state is that of a whole number of global steps.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from raymill.actors.data_order import Schedule
from raymill.actors.training_data import columns_of
from raymill.runtime.errors import TrainingError
from raymill.runtime.spec import Train

if TYPE_CHECKING:
    from raymill.actors.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank's place in a process group."""

    rank: int
    """Its number, from 0."""
    ranks: int
    """Ranks of the group."""
    host: str
    """Address of rank 0."""
    port: int
    """Port of the rendezvous there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a rank is, and how it got there."""

    step: int
    """Global steps done."""
    order: str
    """Digest, in hex, of the row order up to there."""
    failed: str = ""
    """Why it did not come further; empty: it came as far as it was told to."""
    finite: bool = True
    """Whether the loss is finite."""
    first_s: float = 0.0
    """Wall time at which its first step of this call ended; 0: none did."""
    last_s: float = 0.0
    """Wall time at which its last step ever ended; 0: none did."""


class TrainerActor:
    """One rank."""

    def __init__(self, train: Train, declared: dict[str, Any], node_ip: str, timeout_s: float) -> None:
        self._train, self._declared, self._node_ip, self._timeout_s = train, declared, node_ip, timeout_s
        self._engine: Engine | None = None
        self._store: Any = None
        self._tables: tuple[Any, ...] = ()
        self._last_s = 0.0

    def start(self) -> None:
        """Set what torch and DeepSpeed read from the environment, then import them (seconds)."""
        import torch

        torch.set_num_threads(1)
        os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
        os.environ["LOCAL_RANK"] = "0"
        interface = _interface(self._node_ip)
        if interface:  # else gloo takes the address that the host's name stands for, which may be another machine's
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        import torch._dynamo  # the first optimizer would import it (2 s)

        import raymill.actors.engine  # noqa: F401

    def health(self) -> int:
        """The process id, as soon as the rank is ready."""
        return os.getpid()

    def listen(self, ranks: int) -> tuple[str, int]:
        """Leave the old group and open the rendezvous of a new one, of which this is rank 0: its address."""
        from raymill.actors import engine

        self._leave()
        self._store = engine.listen(ranks)
        return self._node_ip, self._store.port

    def join(self, place: Place) -> None:
        """Leave the old group, if any, and take the place in the new one."""
        from datetime import timedelta

        import torch.distributed as dist

        from raymill.actors import engine

        if place.rank:
            self._leave()
            timeout = timedelta(seconds=self._timeout_s)
            self._store = dist.TCPStore(place.host, place.port, place.ranks, is_master=False, timeout=timeout)
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(place.rank), str(place.ranks)
        engine.join(place.rank, place.ranks, self._store, self._timeout_s)

    def load(self, train_table: Any, evaluate_table: Any) -> tuple[int, int]:
        """Take the tables (Arrow, zero-copy) and forget the last training's net: rows and columns of the first."""
        self._engine = None
        self._tables = (*columns_of(train_table, self._train), *columns_of(evaluate_table, self._train))
        return self._tables[0].shape

    def begin(self, schedule: Schedule, state: bytes | None) -> Position:
        """Build the engine in the present group, from a state or anew."""
        from raymill.actors.engine import Engine

        if not self._tables:
            raise TrainingError("a rank was told to begin without tables: call load first")
        x, y = self._tables[:2]
        self._engine = Engine(self._train, self._declared, schedule, x, y, state)
        return self._position()

    def advance(self, until: int) -> Position:
        """Run to step `until`, or as far as it goes."""
        engine = self._running()
        first_s = 0.0
        try:
            while engine.step_done < until:
                engine.step()
                self._last_s = time.time()
                first_s = first_s or self._last_s
            finite = engine.share_loss()
        except Exception as err:  # noqa: BLE001 the edge of the loop: the driver decides what a failure means
            self._leave()
            engine.keep_own_loss()
            return self._position(failed=f"{type(err).__name__}: {err}", first_s=first_s)
        return self._position(finite=finite, first_s=first_s)

    def position(self) -> Position:
        """How far this rank is; step -1 if it holds no state."""
        return self._position() if self._engine is not None else Position(step=-1, order="")

    def evaluate(self) -> tuple[float, float, float]:
        """The present epoch's mean training loss, log-loss and AUC on the held-out table."""
        engine = self._running()
        return engine.epoch_loss(), *engine.evaluate(self._tables[2], self._tables[3])

    def state(self, facts: dict[str, Any]) -> bytes:
        """The checkpoint at the present step, with the driver's facts in it."""
        return self._running().state(facts)

    def program(self) -> bytes:
        """The trained net, exported."""
        return self._running().program()

    def stop(self) -> None:
        """Leave the group and forget tables and net."""
        self._leave()
        self._engine, self._tables = None, ()

    def _running(self) -> Engine:
        if self._engine is None:
            raise TrainingError("a rank was asked for a training that it never began: start the training again")
        return self._engine

    def _position(self, *, failed: str = "", finite: bool = True, first_s: float = 0.0) -> Position:
        engine = self._running()
        return Position(
            step=engine.step_done,
            order=engine.order.hex(),
            failed=failed,
            finite=finite,
            first_s=first_s,
            last_s=self._last_s,
        )

    def _leave(self) -> None:
        from raymill.actors import engine

        if self._engine is not None:
            self._engine.destroy()
        engine.leave()
        self._store = None


def _interface(address: str) -> str:
    """Name of the network interface that has this address; empty if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            return name
    return ""
