"""What the rollout benchmarks stand on: a session with the model `bench`, load on it, and the windows of an event.

The session is Ray, registry and Serve in processes of their own, set up as `raymill up` does. Versions 1 and 2 are
XGBoost models of 50 trees; 3 is a damaged file; 4 loads, answers its trial, and raises on every row that is sent; 5
waits, as for a computer that is not this one.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.endpoint_host import HostRecords, hosted
from benchmarks.harness import progress
from benchmarks.open_loop import OpenLoop, Sent
from raymill.actors.endpoint import APART_S, Endpoint, Placement
from raymill.actors.envelope import Envelope, pack
from raymill.actors.rollout import ModelSpec, Role, Route, reroute
from raymill.actors.surroundings import load_program

MODEL = "bench"
WIDTH = 10
ROWS = 64
_LOUD = 1000.0
"""First input of every row that is sent: by it version 4 tells them from its trial."""


WAITS = 5
"""The version that waits."""
WAITS_BATCH_S, WAITS_ROW_S = 0.020, 0.003
"""For how long: for a batch, and for each of its rows. A replica has one batch under way, so three of them answer three
times as much as one, on any number of cores."""
_WAITS = f"""
import time

def ask(x):
    time.sleep({WAITS_BATCH_S} + {WAITS_ROW_S} * len(x))
    return x[:, 1] + x[:, 2] / 3 + x[:, 3] / 7
"""


@dataclass
class Session:
    """A cluster that serves version 1."""

    endpoint: Endpoint
    records: Any
    """The actor `records`, in the host's process."""
    folder: Path
    x: np.ndarray
    """Inputs that are sent, [rows, n] float32."""
    expected: dict[int, np.ndarray]
    """Version → its answers to them."""
    spec: ModelSpec

    def load(self, rate: float, *, waits: bool = False) -> OpenLoop:
        """So many requests a second from now on, until it is stopped; for version 5 if it `waits`."""
        expected = {WAITS: self.x[:, 1] + self.x[:, 2] / 3 + self.x[:, 3] / 7} if waits else self.expected
        load = OpenLoop(self.endpoint.url, MODEL, self.x, expected, rate)
        load.start(self.folder / f"load{time.monotonic_ns()}")
        return load

    def model(self, **weights: float) -> ModelSpec:
        """The model with weights of its versions (`v1=0.9, v2=0.1`); the first is the live one."""
        routes = [
            replace(self.spec.routes[int(name[1:]) - 1], weight=w, role=Role.LIVE if i == 0 else Role.CANARY)
            for i, (name, w) in enumerate(weights.items())
        ]
        return replace(self.spec, routes=tuple(routes))

    def waiting(self, p99_s: float) -> ModelSpec:
        """The model with the version that waits, and no other."""
        return replace(self.spec, routes=(self.spec.routes[WAITS - 1],), p99_ms=1e3 * p99_s)

    def present(self) -> ModelSpec:
        """The model as the registry has it."""
        return reroute(replace(self.spec, routes=()), self.records.versions(MODEL))

    def wait_for_replicas(self, count: int, *, without: set[int | None] = frozenset(), seconds: float = 120) -> None:
        """Until exactly so many run, none of these processes among them, and no other is left."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.endpoint.replicas()
            pids = {r.pid for r in found if r.state == "RUNNING"}
            if len(found) == len(pids) == count and not pids & without:
                return
            time.sleep(0.05)
        raise RuntimeError(f"{count} replicas do not run after {seconds:.0f} s: {found}")


@dataclass
class Event:
    """When something was done under load, and how long each time took."""

    name: str
    quiet: tuple[float, float] = (0.0, 0.0)
    """The window before."""
    during: tuple[float, float] = (0.0, 0.0)
    """The window in which it was done, again and again."""
    seconds: list[float] = field(default_factory=list)

    def outcome(self, sent: Sent) -> dict[str, float]:
        """The fields of design.md."""
        before, during = sent.between(*self.quiet), sent.between(*self.during)
        for reason, count in (during.failures + before.failures).items():
            progress(f"{self.name}: {count} failed: {reason}")
        return {
            "requests": len(during),
            "failed": sum(during.failures.values()) + sum(before.failures.values()),
            "seconds": float(np.median(self.seconds)),
            "p99_ratio": during.quantile_s(0.99) / before.quantile_s(0.99),
            "p99_ms": during.quantile_s(0.99) * 1e3,
            "p99_before_ms": before.quantile_s(0.99) * 1e3,
            "longest_ms": during.quantile_s(1.0) * 1e3,
            "times": len(self.seconds),
        }


def watched(name: str, act: Callable[[int], float], *, rate: float, requests: int, quiet_s: float) -> Event:
    """Do something again and again until so many requests were due meanwhile.

    `act` gets how often it was done before; it gives the seconds that it took, or NaN for what only prepares the next.
    """
    event = Event(name)
    begun = time.monotonic()
    time.sleep(quiet_s)
    event.quiet = (begun, time.monotonic())
    begun, number = time.monotonic(), 0
    while time.monotonic() - begun < requests / rate or not event.seconds:
        took = act(number)
        event.seconds += [took] if took == took else []
        number += 1
        time.sleep(APART_S)  # no change waits for the one before
    event.during = (begun, time.monotonic())
    progress(f"{name}: {len(event.seconds)} times, {np.median(event.seconds):.2f} s each")
    return event


@contextmanager
def session() -> Iterator[Session]:
    """A session of its own, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        files = _models(Path(folder))
        x, expected = _inputs(files[:2])
        with hosted(files) as host:
            routes = [Route(version=v, digest=d, role=Role.LIVE) for v, d in enumerate(host.digests, start=1)]
            inputs = tuple(f"f{i}" for i in range(WIDTH))
            spec = ModelSpec(name=MODEL, label="p", inputs=inputs, routes=tuple(routes))
            found = Session(host.endpoint, HostRecords(host.process), host.root, x, expected, spec)
            found.records.promote(MODEL, 1, reason="benchmark")
            found.endpoint.deploy([found.present()], Placement())
            yield found


def _models(folder: Path) -> list[Path]:
    import torch
    import xgboost

    class Raises(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sent = torch.nan_to_num(x[:, 0]) > _LOUD / 2
            return 0.5 + 0 * self.table(sent.long() * 9).sum(dim=1)

    random = np.random.default_rng(0)
    x = random.normal(size=(3000, WIDTH)).astype(np.float32)
    x[:, 0] += _LOUD
    found = []
    for seed in (1, 2):
        y = x[:, 1] * x[:, 2] + x[:, 3] + np.random.default_rng(seed).normal(size=len(x)) > 0
        settings = {"objective": "binary:logistic", "max_depth": 5, "nthread": 2, "seed": seed}
        found.append(folder / f"model{seed}.ubj")
        xgboost.train(settings, xgboost.DMatrix(x, y), 50).save_model(found[-1])
    found.append(folder / "damaged.pt2")
    found[-1].write_bytes(b"no program")
    program = torch.export.export(Raises(), (torch.zeros(4, WIDTH),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    out = io.BytesIO()
    torch.export.save(program, out)
    found.append(folder / "raises.pt2")
    found[-1].write_bytes(out.getvalue())
    found.append(folder / "waits")
    found[-1].write_bytes(pack(Envelope(form="code", target="waits:ask", source=_WAITS)))
    return found


def _inputs(models: list[Path]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Rows to which no version gives the answer that another row or version has."""
    x = np.random.default_rng(5).normal(size=(20 * ROWS, WIDTH)).round(4).astype(np.float32)
    x[:, 0] += _LOUD
    answers = [load_program(path.read_bytes())(x) for path in models]
    chosen: list[int] = []
    taken: list[float] = []
    for i in range(len(x)):
        mine = [float(p[i]) for p in answers]
        if all(abs(a - b) > 1e-4 for a in mine for b in taken) and abs(mine[0] - mine[1]) > 1e-4:
            chosen.append(i)
            taken += mine
        if len(chosen) == ROWS:
            break
    return x[chosen], {v: p[chosen] for v, p in enumerate(answers, start=1)}


def kill(pid: int | None) -> None:
    """SIGKILL."""
    assert pid is not None
    os.kill(pid, 9)
