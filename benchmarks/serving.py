"""Claim: the endpoint is faster than model servers that do less: requests a second, latency, rows a second.

The model: XGBoost, 200 trees of depth 6, 30 inputs; one replica or worker each, one thread, on the same cores as the
load (wrk, one thread). Ours is Serve as `raymill up` sets it up, asked through its public port, with everything on
(limits, books of Serve, request ids, prediction log on disk before each answer): a tensor of one row as JSON to
`/v2/models/bench/infer`. The peers get the same 30 numbers as JSON and answer the same number: mosec at its own port
(dynamic batching, orjson), FastAPI on uvicorn (no batching: one worker), Ray Serve as it comes (`@serve.batch`), and
with HAProxy and throughput mode. `grpc_*`: one row as raw data, sent by h2load, to ours and to Serve's own of both
kinds. All sides stay up, idle, while one is measured. `in_process`: the model called with 64 rows in a loop by one
thread. `--quick`: two repetitions of 2 s each, without 400 clients.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import orjson

from benchmarks import grpc_load, harness
from benchmarks.endpoint_host import hosted, process
from benchmarks.harness import Figures, Outcome, compare, peer_environment, peer_python
from raymill.actors.endpoint import Placement
from raymill.actors.open_inference_pb2 import ModelInferRequest
from raymill.actors.rollout import ModelSpec, Role, Route
from raymill.cluster.environment import haproxy_files, serve_environment
from raymill.cluster.ports import choose

WIDTH = 30
FAST_MODE = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
BARS = {
    "rps_c100_vs_mosec": 1.3,
    "rps_c100_vs_serve_default": 40,
    "rps_c100_vs_serve_fast": 4,
    "p50_c1_vs_fastapi": 1,
    "p50_c1_vs_serve_default": 10,
    "rows64_vs_in_process": 0.5,
    "grpc_rps_vs_serve_grpc": 3,
    "grpc_rps_vs_serve_fast_grpc": 3,
}
"""What is claimed."""
_DURATION_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


@dataclass(frozen=True)
class Up:
    """A server that is up."""

    url: str
    grpc: str = ""
    """Host and port of its gRPC; empty: it has none."""


def trained(path: Path) -> None:
    """The model all sides serve."""
    import xgboost

    random = np.random.default_rng(0)
    x = random.normal(size=(5000, WIDTH)).astype(np.float32)
    y = x[:, 0] * x[:, 1] + x[:, 2] + random.normal(size=5000) > 0
    settings = {"objective": "binary:logistic", "max_depth": 6, "nthread": 2, "seed": 0}
    xgboost.train(settings, xgboost.DMatrix(x, y), 200).save_model(path)


def wrk(url: str, body: Path, headers: Mapping[str, str], *, clients: int, seconds: float) -> Figures:
    """Closed loop of so many clients; requests a second, p50 and p99 in ms. Every answer must be 200."""
    script = body.with_suffix(".lua")
    lines = [f'wrk.headers["{k}"] = "{v}"' for k, v in headers.items()]
    lines += ['wrk.method = "POST"', f'local f = io.open("{body}", "rb")', 'wrk.body = f:read("*a")', "f:close()"]
    script.write_text("\n".join(lines))
    command = [
        "wrk",
        "-t1",
        f"-c{clients}",
        f"-d{seconds:.0f}s",
        "--timeout",
        "10s",
        "--latency",
        "-s",
        str(script),
        url,
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"{url} did not answer every request of {clients} clients:\n{said}")
    percentiles = {
        q: float(v) * _DURATION_S[u] * 1e3 for q, v, u in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s|m)", said)
    }
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    assert rate is not None
    return {"rps": float(rate[1]), "p50_ms": percentiles["50"], "p99_ms": percentiles["99"]}


def measured(url: str, body: Path, clients: tuple[int, ...], seconds: float) -> Figures:
    """One side in one repetition: one row, JSON, for each number of clients."""
    found: Figures = {}
    for c in clients:
        wrk(url, body, {"Content-Type": "application/json"}, clients=c, seconds=1)  # warm
        figures = wrk(url, body, {"Content-Type": "application/json"}, clients=c, seconds=seconds)
        found |= {f"{name}_c{c}": value for name, value in figures.items()}
    return found


def grpc_measured(address: str, body: Path, seconds: float) -> Figures:
    """One side's gRPC in one repetition: one row, 1 and 100 clients."""
    found: Figures = {}
    for c in (1, 100):
        figures = grpc_load.h2load(address, body, clients=c, seconds=seconds)
        found |= {f"grpc_{name}_c{c}": value for name, value in figures.items()}
    return found


def serve_measured(up: Up, folder: Path, clients: tuple[int, ...], seconds: float) -> Figures:
    """Serve as a peer: HTTP and gRPC."""
    return measured(up.url, folder / "peer.json", clients, seconds) | grpc_measured(
        up.grpc, folder / "row.grpc", seconds
    )


def ours(up: Up, folder: Path, clients: tuple[int, ...], seconds: float) -> Figures:
    """Ours: one row as JSON and over gRPC, and 64 rows as JSON and binary by 8 clients."""
    at = f"{up.url}/v2/models/bench/infer"
    found = measured(at, folder / "row.json", clients, seconds)
    found |= grpc_measured(up.grpc, folder / "row.grpc", seconds)
    head = (folder / "rows64.bin").read_bytes().index(b"}]}") + 3
    for name, body, headers in (
        ("json", folder / "rows64.json", {"Content-Type": "application/json"}),
        ("binary", folder / "rows64.bin", {"Inference-Header-Content-Length": str(head)}),
    ):
        wrk(at, body, headers, clients=8, seconds=1)
        figures = wrk(at, body, headers, clients=8, seconds=seconds)
        found |= {f"rows64_{name}_rows_per_s": 64 * figures["rps"], f"rows64_{name}_p99_ms": figures["p99_ms"]}
    return found


def in_process(model: Path, seconds: float) -> Figures:
    """The limit: 64 rows a call, one thread."""
    from raymill.actors.surroundings import load_program

    predict = load_program(model.read_bytes())
    x = np.random.default_rng(1).normal(size=(64, WIDTH)).astype(np.float32)
    calls = harness.best_of(lambda: predict(x), seconds=seconds)
    return {"rows64_rows_per_s": 64 / calls["mean_s"], "rows64_p50_us": calls["p50_s"] * 1e6}


def write_bodies(folder: Path) -> None:
    """What is sent."""
    x = np.round(np.random.default_rng(2).normal(size=(64, WIDTH)), 4).astype(np.float32)

    def tensor(rows: int, **more: object) -> dict[str, object]:
        return {"name": "features", "shape": [rows, WIDTH], "datatype": "FP32", **more}

    numbers = x.astype(float).round(4).tolist()
    (folder / "row.json").write_bytes(orjson.dumps({"inputs": [tensor(1, data=numbers[0])]}))
    (folder / "peer.json").write_bytes(orjson.dumps({"data": numbers[0]}))
    (folder / "rows64.json").write_bytes(orjson.dumps({"inputs": [tensor(64, data=numbers)]}))
    parameters = {"parameters": {"binary_data_size": x.nbytes}}
    request = ModelInferRequest(model_name="bench", raw_input_contents=[x[0].tobytes()])
    request.inputs.add(name="features", datatype="FP32", shape=[1, WIDTH])
    grpc_load.write_message(folder / "row.grpc", request.SerializeToString())
    outputs = [{"name": "p", "parameters": {"binary_data": True}}]
    head = orjson.dumps({"outputs": outputs, "inputs": [tensor(64, **parameters)]})
    (folder / "rows64.bin").write_bytes(head + x.tobytes())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(url: str, body: bytes, mark: Path, *, seconds: float = 90) -> None:
    """Until a request is answered with 200."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.post(url, content=body, headers={"content-type": "application/json"}).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{url} did not come up:\n{(mark / 'log.txt').read_text()[-2000:]}")


@contextmanager
def peer(name: str, folder: Path, **variables: str) -> Iterator[Up]:
    """A peer's server."""
    mark = Path(tempfile.mkdtemp(prefix="rmp"))
    port, grpc_port = free_port(), free_port()
    server = harness.PEERS / name / "server.py"
    command = [str(peer_python(name)), str(server), str(port), str(folder / "model.ubj"), str(grpc_port)]
    if name == "serve":
        variables["PYTHONPATH"] = f"{server.parent}:{Path(__file__).parents[1] / 'actors'}"
    variables |= _own_haproxy(mark) if name == "serve" else {}
    environment = peer_environment(HOME=str(mark), RAY_TMPDIR=str(mark), RAY_USAGE_STATS_ENABLED="0", **variables)
    url = f"http://127.0.0.1:{port}" + ("/" if name == "serve" else "/inference" if name == "mosec" else "/predict")
    try:
        with process(command, environment, mark):
            wait_for(url, (folder / "peer.json").read_bytes(), mark)
            yield Up(url, _answering(grpc_port, folder) if name == "serve" else "")
    finally:
        shutil.rmtree(mark, ignore_errors=True)


@contextmanager
def endpoint(folder: Path) -> Iterator[Up]:
    """Ours, on a cluster of its own; its public ports."""
    with hosted([folder / "model.ubj"]) as host:
        found = host.endpoint
        inputs = tuple(f"f{i}" for i in range(WIDTH))
        route = Route(version=1, digest=host.digests[0], role=Role.LIVE)
        found.deploy([ModelSpec(name="bench", label="p", inputs=inputs, routes=(route,))], Placement())
        wait_for(f"{found.url}/v2/models/bench/infer", (folder / "row.json").read_bytes(), host.root)
        yield Up(found.url, _answering(host.grpc_port, folder))
        state = httpx.get(f"{found.url}/raymill/replica").json()["fast_lane"]
        if not state["open"]:
            raise RuntimeError(f"the fast lane was shut: {state['reason']}")


def body(quick: bool) -> Outcome:
    """Measure."""
    if shutil.which("wrk") is None:
        raise harness.NotInstalled("wrk is not installed: run `make bench-peers`")
    clients, seconds, repetitions = ((1, 100), 2.0, 2) if quick else ((1, 100, 400), 5.0, harness.REPETITIONS)
    with ExitStack() as up:
        folder = Path(up.enter_context(tempfile.TemporaryDirectory(prefix="rmbodies")))
        write_bodies(folder)
        trained(folder / "model.ubj")
        row = folder / "peer.json"
        peers = {
            "mosec": up.enter_context(peer("mosec", folder)),
            "fastapi": up.enter_context(peer("fastapi", folder)),
            "serve_default": up.enter_context(peer("serve", folder)),
            "serve_fast": up.enter_context(peer("serve", folder, **FAST_MODE)),
        }
        sides = {"ours": partial(ours, up.enter_context(endpoint(folder)), folder, clients, seconds)}
        for name, found_up in peers.items():
            if found_up.grpc:
                sides[name] = partial(serve_measured, found_up, folder, clients, seconds)
            else:
                sides[name] = partial(measured, found_up.url, row, clients, seconds)
        sides["in_process"] = partial(in_process, folder / "model.ubj", seconds)
        found = harness.alternate(sides, repetitions)
    outcome = Outcome(found.figures("ours"), {name: found.figures(name) for name in sides if name != "ours"})
    outcome.repetitions = repetitions
    outcome.spread["ours"] = found.spread("ours")
    for theirs in ("mosec", "serve_default", "serve_fast", "fastapi"):
        compare(outcome, f"rps_c100_vs_{theirs}", found.ratios("rps_c100", "ours", theirs))
    for theirs in ("fastapi", "serve_default", "mosec"):
        ratios = found.ratios("p50_ms_c1", "ours", theirs, smaller_is_better=True)
        compare(outcome, f"p50_c1_vs_{theirs}", ratios)
    for theirs, name in {"serve_default": "serve_grpc", "serve_fast": "serve_fast_grpc"}.items():
        compare(outcome, f"grpc_rps_vs_{name}", found.ratios("grpc_rps_c100", "ours", theirs))
    binary = found.ratios("rows64_binary_rows_per_s", "ours", "in_process", their_figure="rows64_rows_per_s")
    compare(outcome, "rows64_vs_in_process", binary)
    outcome.notes = {"seconds_each": seconds, "bars": BARS}
    return outcome


def _answering(port: int, folder: Path) -> str:
    """Host and port of a gRPC server that answers the message which is sent."""
    address = f"127.0.0.1:{port}"
    grpc_load.wait_for(address, (folder / "row.grpc").read_bytes()[5:])
    return address


def _own_haproxy(folder: Path) -> dict[str, str]:
    """Ports and files apart from those of the other HAProxy on this host; nothing else of our tuning."""
    kept = ("_PORT", "DRAINING")
    return {k: v for k, v in serve_environment(choose("auto")).items() if any(w in k for w in kept)} | haproxy_files(
        folder
    )


if __name__ == "__main__":
    harness.main("serving", body)
