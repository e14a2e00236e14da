"""Claim: the endpoint is faster than model servers that do less: requests a second, latency, rows a second.

The model: XGBoost, 200 trees of depth 6, 30 inputs; one replica or worker each, one thread, on the same cores as the
load (wrk, one thread). Ours is Serve as `raymill up` sets it up, asked through its public port, with everything on
(limits, books of Serve, request ids, prediction log on disk before each answer). Whom a part needs stays up, idle,
while one of them is measured, and nobody else; before each measurement what was written before is brought to the disk.
The parts, each measured alone by `--only PART`:

- `rps`: a tensor of one row as JSON to `/v2/models/bench/infer`, another each time, by 1, 100 and 400 clients. The
  peers get the same 30 numbers as JSON and answer the same number: mosec at its own port (dynamic batching, orjson),
  FastAPI on uvicorn (no batching: one worker), Ray Serve as it comes (`@serve.batch`), and with HAProxy and throughput
  mode.
- `load`: one row as JSON at 70 % of the rate that 100 clients were answered at a moment before, arriving as from a
  crowd (`wrk.at_rate`); what it came to is `load70_share`. `p99_at_load70`: five times its p50, over its p99. mosec
  is measured likewise, at 70 % of its own rate; and a server that computes nothing behind the same proxy (`floor`,
  `serving_floor`) at half of its own, beyond which wrk is what can do no more: `floor_p99_at_load50`.
- `grpc`: one row as raw data, sent by h2load, to ours and to Serve's own of both kinds.
- `rows`: 64 rows a request as JSON and binary, by 8 clients, against the model called with 64 rows in a loop by one
  thread (`in_process`): by what the replica itself calls (`rows64_vs_in_process`), and by XGBoost's `inplace_predict`.
- `features`: `/predict/online` with the entities of a row, whose features the replica looks up (`serving_online`), by
  100 clients; `features_p99`: 50 ms over its p99, `features_rps_vs_vectors`: against ready vectors of the same model.

`--quick`: two repetitions of 2 s each.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import grpc_load, harness, serving_bodies, serving_online, wrk
from benchmarks.harness import Figures, Measured, Outcome, Side, compare
from benchmarks.serving_floor import floor
from benchmarks.serving_peers import PEERS, Up, endpoint, peer

CLIENTS = (1, 100, 400)
GRPC_CLIENTS = (1, 100)
BARS = {
    "rps_c100_vs_mosec": 1.3,
    "rps_c100_vs_serve_default": 40,
    "rps_c100_vs_serve_fast": 4,
    "p50_c1_vs_fastapi": 1,
    "p50_c1_vs_serve_default": 10,
    "rows64_vs_in_process": 0.5,
    "grpc_rps_vs_serve_grpc": 3,
    "grpc_rps_vs_serve_fast_grpc": 3,
    "p99_at_load70": 1,
    "features_p99": 1,
}
"""What is claimed."""


def measure_rps(up: Up, seconds: float) -> Figures:
    """One row as JSON, for each number of clients."""
    post = wrk.Post(up.url, up.body)
    wrk.closed(post, clients=100, seconds=1)  # warm
    found: Figures = {}
    for c in CLIENTS:
        found |= {f"{name}_c{c}": v for name, v in wrk.closed(post, clients=c, seconds=seconds).items()}
    return found


def measure_grpc(up: Up, folder: Path, seconds: float) -> Figures:
    """One row over gRPC, for each number of clients."""
    found: Figures = {}
    for c in GRPC_CLIENTS:
        figures = grpc_load.h2load(up.grpc, folder / "row.grpc", clients=c, seconds=seconds)
        found |= {f"grpc_{name}_c{c}": value for name, value in figures.items()}
    return found


def measure_rows(up: Up, folder: Path, seconds: float) -> Figures:
    """64 rows as JSON and binary by 8 clients."""
    found: Figures = {}
    json, binary = folder / "rows64.json", folder / "rows64.bin"
    for name, body, headers in (("json", json, wrk.JSON), ("binary", binary, serving_bodies.binary_headers(binary))):
        post = wrk.Post(up.url, body, headers)
        wrk.closed(post, clients=8, seconds=1)  # warm
        figures = wrk.closed(post, clients=8, seconds=seconds)
        found |= {f"rows64_{name}_rows_per_s": 64 * figures["rps"], f"rows64_{name}_p99_ms": figures["p99_ms"]}
    return found


def measure_load(up: Up, seconds: float, percent: int = 70) -> Figures:
    """One row as JSON at that part of what 100 clients get."""
    post = wrk.Post(up.url, up.body)
    most = wrk.closed(post, clients=100, seconds=seconds)["rps"]
    found = wrk.at_rate(post, rate=percent / 100 * most, seconds=seconds)
    figures = {f"load{percent}_{name}": value for name, value in found.items()}
    return {**figures, f"load{percent}_share": found["rps"] / most}


def measure_features(up: Up, folder: Path, seconds: float) -> Figures:
    """Rows with entities, and ready vectors of the same model, by 100 clients."""
    root = up.url.partition("/v2/")[0]
    urls = {"features": f"{root}/predict/online", "vectors": f"{root}/v2/models/online/infer"}
    bodies = {"features": folder / "online.lines", "vectors": folder / "vectors.lines"}
    found: Figures = {}
    for name, url in urls.items():
        post = wrk.Post(url, bodies[name])
        wrk.closed(post, clients=100, seconds=1)  # warm
        found |= {f"{name}_{f}_c100": v for f, v in wrk.closed(post, clients=100, seconds=seconds).items()}
    return found


def measure_in_process(folder: Path, seconds: float) -> Figures:
    """The limit: 64 rows a call, one thread; by the program that the replica asks, and by XGBoost's own call."""
    import xgboost

    from raymill.actors.surroundings import load_program

    file = folder / "model.ubj"
    booster = xgboost.Booster({"nthread": 1}, model_file=file)
    x = np.random.default_rng(1).normal(size=(64, serving_bodies.WIDTH)).astype(np.float32)
    found: Figures = {}
    for name, predict in (("rows64", load_program(file.read_bytes())), ("library", booster.inplace_predict)):
        calls = harness.best_of(partial(predict, x), seconds=seconds)
        found |= {f"{name}_rows_per_s": 64 / calls["mean_s"], f"{name}_p50_us": calls["p50_s"] * 1e6}
    return found


def enter_rps(outcome: Outcome, found: Measured, peers: Collection[str]) -> None:
    for theirs in peers:
        compare(outcome, f"rps_c100_vs_{theirs}", found.ratios("rps_c100", "ours", theirs))
        ratios = found.ratios("p50_ms_c1", "ours", theirs, smaller_is_better=True)
        compare(outcome, f"p50_c1_vs_{theirs}", ratios)


def enter_grpc(outcome: Outcome, found: Measured, peers: Collection[str]) -> None:
    for theirs, name in {"serve_default": "serve_grpc", "serve_fast": "serve_fast_grpc"}.items():
        if theirs in peers:
            compare(outcome, f"grpc_rps_vs_{name}", found.ratios("grpc_rps_c100", "ours", theirs))


def enter_rows(outcome: Outcome, found: Measured, _: Collection[str]) -> None:
    binary = found.ratios("rows64_binary_rows_per_s", "ours", "in_process", their_figure="rows64_rows_per_s")
    compare(outcome, "rows64_vs_in_process", binary)
    library = found.ratios("rows64_binary_rows_per_s", "ours", "in_process", their_figure="library_rows_per_s")
    compare(outcome, "rows64_vs_library_in_process", library)


def enter_load(outcome: Outcome, found: Measured, peers: Collection[str]) -> None:
    for name, side, load in (("p99_at_load70", "ours", "load70"), ("floor_p99_at_load50", "floor", "load50")):
        compare(outcome, name, [5 * r[f"{load}_p50_ms"] / r[f"{load}_p99_ms"] for r in found.runs[side]])
    for theirs in peers:
        ratios = found.ratios("load70_p99_ms", "ours", theirs, smaller_is_better=True)
        compare(outcome, f"p99_at_load70_vs_{theirs}", ratios)


def enter_features(outcome: Outcome, found: Measured, _: Collection[str]) -> None:
    runs = found.runs["ours"]
    compare(outcome, "features_p99", [50 / r["features_p99_ms_c100"] for r in runs])
    compare(outcome, "features_rps_vs_vectors", [r["features_rps_c100"] / r["vectors_rps_c100"] for r in runs])


@dataclass(frozen=True)
class Part:
    """A part of the claim."""

    sides: Callable[[Mapping[str, Up], Path, float], Mapping[str, Side]]
    """What measures each side; takes the servers by side, the folder of bodies, seconds of one measurement."""
    enter: Callable[[Outcome, Measured, Collection[str]], None]
    """Enters its ratios; takes the peers that were measured."""
    peers: tuple[str, ...] = ()
    """Peers whose servers it needs."""


def _rps_sides(up: Mapping[str, Up], _: Path, seconds: float) -> dict[str, Side]:
    return {name: partial(measure_rps, server, seconds) for name, server in up.items() if name != "floor"}


def _grpc_sides(up: Mapping[str, Up], folder: Path, seconds: float) -> dict[str, Side]:
    return {name: partial(measure_grpc, server, folder, seconds) for name, server in up.items() if server.grpc}


def _rows_sides(up: Mapping[str, Up], folder: Path, seconds: float) -> dict[str, Side]:
    ours = partial(measure_rows, up["ours"], folder, seconds)
    return {"ours": ours, "in_process": partial(measure_in_process, folder, seconds)}


def _load_sides(up: Mapping[str, Up], _: Path, seconds: float) -> dict[str, Side]:
    sides = {name: partial(measure_load, up[name], seconds) for name in ("ours", "mosec") if name in up}
    return {**sides, "floor": partial(measure_load, up["floor"], seconds, 50)}


def _features_sides(up: Mapping[str, Up], folder: Path, seconds: float) -> dict[str, Side]:
    return {"ours": partial(measure_features, up["ours"], folder, seconds)}


PARTS = {
    "rps": Part(_rps_sides, enter_rps, PEERS),
    "load": Part(_load_sides, enter_load, ("mosec",)),
    "grpc": Part(_grpc_sides, enter_grpc, ("serve_default", "serve_fast")),
    "rows": Part(_rows_sides, enter_rows),
    "features": Part(_features_sides, enter_features),
}


def body(quick: bool, only: Collection[str], against: Collection[str]) -> Outcome:
    """Measure those parts against those peers."""
    seconds, repetitions = (2.0, 2) if quick else (5.0, harness.REPETITIONS)
    outcome = Outcome({}, repetitions=repetitions, notes={"seconds_each": seconds, "bars": BARS})
    outcome.spread["ours"] = {}
    needed = {name: tuple(p for p in PARTS[name].peers if p in against) for name in only}
    for peers in dict.fromkeys(needed.values()):
        parts = [name for name in only if needed[name] == peers]
        found = _measured(parts, peers, seconds, repetitions)
        for side in found.runs:
            (outcome.ours if side == "ours" else outcome.peers.setdefault(side, {})).update(found.figures(side))
        outcome.spread["ours"] |= found.spread("ours")
        for name in parts:
            PARTS[name].enter(outcome, found, peers)
    return outcome


def _measured(parts: Collection[str], peers: Collection[str], seconds: float, repetitions: int) -> Measured:
    """These parts with nobody up but whom they need: an idle cluster of Ray's takes time of the cores."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rmbodies")))
        serving_bodies.write(folder)
        if online := "features" in parts:
            serving_online.write(folder)
        up = {name: stack.enter_context(peer(name, folder)) for name in peers}
        if "load" in parts:
            up["floor"] = stack.enter_context(floor(folder))
        up["ours"] = stack.enter_context(endpoint(folder, online=online))
        for server in up.values():
            wrk.closed(wrk.Post(server.url, server.body), clients=100, seconds=1)
        harness.settle()  # what a server does once, after its start or its first answers, is no part of a claim
        sides = _merged(PARTS[name].sides(up, folder, seconds) for name in parts)
        return harness.alternate(dict(sides), repetitions)


def _merged(parts: Iterator[Mapping[str, Side]]) -> Iterator[tuple[str, Side]]:
    """Each side once, with the figures of all parts."""
    sides: dict[str, list[Side]] = {}
    for part in parts:
        for name, side in part.items():
            sides.setdefault(name, []).append(side)
    for name, found in sides.items():
        yield name, partial(_all, found)


def _all(sides: list[Side]) -> Figures:
    found: Figures = {}
    for side in sides:
        os.sync()  # what one part has written, the kernel would bring to the disk during the next
        found |= side()
    return found


if __name__ == "__main__":
    harness.main("serving", body, only=tuple(PARTS), against=PEERS)
