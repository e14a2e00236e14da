"""What every benchmark shares: one measurement at a time on this machine, sides in turn, one JSON line at the end.

A claim's module ends with `if __name__ == "__main__": main("claim", body)`; `body(quick)` measures, by `alternate`,
and returns an `Outcome`. Invariants: no two measurements overlap (a lock of the whole machine); the sides of a
repetition run one after the other, in an order that turns round each time, so that a change of the machine hits all;
a ratio is the median of the repetitions' own ratios, bigger is better for us; the last line on stdout is the JSON.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

LOCK = Path("/tmp/raymill-bench.lock")
PEERS = Path(__file__).parent / "peers"
REPETITIONS = 3
_VERSIONS = ("ray", "torch", "numpy", "pyarrow", "deltalake", "lmdb", "numba", "uvicorn", "httptools")

Figures = dict[str, float]
"""Figure → value, of one side in one repetition."""
Side = Callable[[], Figures]


class NotInstalled(RuntimeError):
    """A peer or tool is missing."""


@dataclass
class Outcome:
    """What a claim's module measured."""

    ours: dict[str, Any]
    """Our figures and facts."""
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The peers' figures."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Bigger is better for us."""
    spread: dict[str, Any] = field(default_factory=dict)
    """Figure or ratio → [smallest, largest] over the repetitions."""
    repetitions: int = REPETITIONS
    notes: dict[str, Any] = field(default_factory=dict)
    """Whatever else a reader must know (lengths, what was left out and why)."""


@dataclass
class Measured:
    """Figures of every side, one dict a repetition, in the order of the repetitions."""

    runs: dict[str, list[Figures]]

    def figures(self, side: str) -> Figures:
        """The median of each figure of a side."""
        runs = self.runs[side]
        return {name: statistics.median(r[name] for r in runs) for name in runs[0]}

    def spread(self, side: str) -> dict[str, list[float]]:
        """[smallest, largest] of each figure of a side."""
        runs = self.runs[side]
        return {name: [min(r[name] for r in runs), max(r[name] for r in runs)] for name in runs[0]}

    def ratios(
        self, figure: str, ours: str, theirs: str, *, smaller_is_better: bool = False, their_figure: str | None = None
    ) -> list[float]:
        """One ratio a repetition, bigger is better for us."""
        pairs = zip(self.runs[ours], self.runs[theirs], strict=True)
        found = [(o[figure], t[their_figure or figure]) for o, t in pairs]
        return [t / o if smaller_is_better else o / t for o, t in found]


def alternate(
    sides: Mapping[str, Side], repetitions: int = REPETITIONS, *, say: Callable[[str], None] | None = None
) -> Measured:
    """Run every side once a repetition; every second repetition goes through them backwards."""
    say = say or progress
    runs: dict[str, list[Figures]] = {name: [] for name in sides}
    for repetition in range(repetitions):
        for name in list(sides)[:: 1 if repetition % 2 == 0 else -1]:
            figures = sides[name]()
            runs[name].append(figures)
            say(f"{repetition + 1}/{repetitions} {name}: " + ", ".join(f"{k} {_short(v)}" for k, v in figures.items()))
    return Measured(runs)


def compare(outcome: Outcome, name: str, ratios: Sequence[float]) -> None:
    """Enter a ratio: the median of the repetitions' own, and its spread."""
    outcome.ratios[name] = statistics.median(ratios)
    outcome.spread[name] = [min(ratios), max(ratios)]


def settle(share: float = 0.2, seconds: float = 60.0) -> None:
    """Wait until the machine's cores are used by less than a share of their time, or so long."""
    end = time.monotonic() + seconds
    while psutil.cpu_percent(2.0) > 100 * share and time.monotonic() < end:
        pass


def best_of(work: Callable[[], object], *, seconds: float, at_least: int = 5) -> Figures:
    """Call `work` again and again for so long; `p50_s`, `p99_s`, `mean_s` of a call, and how many."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < at_least or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    took.sort()
    p50, p99 = (took[min(len(took) - 1, int(q * len(took)))] for q in (0.5, 0.99))
    return {"p50_s": p50, "p99_s": p99, "mean_s": statistics.fmean(took), "calls": float(len(took))}


def peer_python(peer: str) -> Path:
    """Python of a peer's own venv (`benchmarks/peers/<peer>/requirements.txt`).

    Raises:
        NotInstalled: `make bench-peers` has not been run.
    """
    python = PEERS / peer / ".venv" / "bin" / "python"
    if not python.exists():
        raise NotInstalled(f"peer {peer!r} has no {python}: run `make bench-peers`")
    return python


def peer_environment(**more: str) -> dict[str, str]:
    """Variables for a peer's process: none of ours, of Ray's or of another Python's."""
    foreign = ("RAY_", "RAYMILL_", "PYTHON", "VIRTUAL_ENV")
    return {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | more


def progress(text: str) -> None:
    """One line for who waits; on stderr, since stdout ends with the JSON."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def machine_lock() -> Iterator[float]:
    """Wait until no other measurement runs; the seconds waited."""
    begun = time.monotonic()
    with open(LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another measurement holds {LOCK}: waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield time.monotonic() - begun


def host() -> dict[str, Any]:
    """Cores, Python and the versions that matter."""
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"cores": os.cpu_count(), "python": platform.python_version(), "versions": found}


def main(claim: str, body: Callable[..., Outcome], argv: Sequence[str] | None = None, **choices: Sequence[str]) -> None:
    """Command line of a claim: `--quick`; measures under the lock, prints a table and the JSON line.

    Each of `choices` is an option that takes some of its values, all by default, and an argument of `body`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{claim}")
    parser.add_argument("--quick", action="store_true", help="the shortest run that still means something")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", nargs="*", choices=values, default=values, help="some of these; else all")
    told = vars(parser.parse_args(argv))
    quick = told["quick"]
    with machine_lock() as waited_s:
        load = [round(x, 2) for x in os.getloadavg()]
        if load[0] > 0.5 * (os.cpu_count() or 1):
            progress(f"the machine is not idle: load {load}")
        begun = time.monotonic()
        outcome = body(**told)
        seconds = time.monotonic() - begun
    document = {
        "claim": claim,
        "ours": outcome.ours,
        "peers": outcome.peers,
        "ratios": outcome.ratios,
        "spread": outcome.spread,
        "host": {**host(), "load_found": load, "load_left": [round(x, 2) for x in os.getloadavg()]},
        "repetitions": outcome.repetitions,
        "seconds": round(seconds, 1),
        "waited_s": round(waited_s, 1),
        "quick": quick,
        **({"notes": outcome.notes} if outcome.notes else {}),
    }
    _print_table(outcome)
    print(json.dumps(_rounded(document)), flush=True)


def _print_table(outcome: Outcome) -> None:
    sides = {"ours": outcome.ours, **outcome.peers}
    rows = [(side, name, _short(v)) for side, f in sides.items() for name, v in f.items() if isinstance(v, int | float)]
    rows += [("ratio", name, f"{v:.2f} × {_span(outcome.spread.get(name))}") for name, v in outcome.ratios.items()]
    if rows:
        widths = [max(len(r[i]) for r in rows) for i in (0, 1)]
        for side, name, value in rows:
            print(f"{side:<{widths[0]}}  {name:<{widths[1]}}  {value}")


def _span(spread: object) -> str:
    return f"({spread[0]:.2f} … {spread[1]:.2f})" if isinstance(spread, list) and len(spread) == 2 else ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value
