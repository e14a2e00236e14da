"""The servers that the serving benchmark compares, ours among them: each comes up, answers one request, and goes.

mosec, FastAPI, Ray Serve as it comes, and Ray Serve with HAProxy and throughput mode run in venvs of their own
(`benchmarks/peers/`); ours is Serve as `raymill up` sets it up.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks import grpc_load, harness, serving_online
from benchmarks.endpoint_host import hosted, process
from benchmarks.harness import peer_environment, peer_python
from benchmarks.serving_bodies import WIDTH
from raymill.actors.endpoint import Placement
from raymill.actors.rollout import ModelSpec, Role, Route
from raymill.cluster.environment import haproxy_files, serve_environment
from raymill.cluster.ports import choose, picker
from raymill.runtime.home import Home

PEERS = ("mosec", "fastapi", "serve_default", "serve_fast")
FAST_MODE = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
_PATH = {"mosec": "inference", "fastapi": "predict", "serve": ""}


@dataclass(frozen=True)
class Up:
    """A server that is up."""

    url: str
    """Where one row is sent to."""
    body: Path
    """One row as JSON."""
    grpc: str = ""
    """Host and port of its gRPC; empty: it has none."""


@contextmanager
def peer(name: str, folder: Path) -> Iterator[Up]:
    """A peer's server, by its name in `PEERS`; it serves the model and gets the bodies of `folder`."""
    mark = Path(tempfile.mkdtemp(prefix="rmp"))
    kind, is_serve = name.split("_")[0], name.startswith("serve")
    port, grpc_port = map(picker(), (1, 1))  # none that Ray's own processes take meanwhile
    server = harness.PEERS / kind / "server.py"
    command = [str(peer_python(kind)), str(server), str(port), str(folder / "model.ubj"), str(grpc_port)]
    variables = FAST_MODE if name == "serve_fast" else {}
    if is_serve:
        path = f"{server.parent}:{Path(__file__).parents[1] / 'actors'}"
        variables = {**variables, "PYTHONPATH": path, **_own_haproxy(mark)}
    environment = peer_environment(HOME=str(mark), RAY_TMPDIR=str(mark), RAY_USAGE_STATS_ENABLED="0", **variables)
    url, row = f"http://127.0.0.1:{port}/{_PATH[kind]}", folder / "peer.lines"
    try:
        with process(command, environment, mark):
            wait_for(url, row.read_bytes().splitlines()[0], mark)
            yield Up(url, row, _answering(grpc_port, folder) if is_serve else "")
    finally:
        shutil.rmtree(mark, ignore_errors=True)


@contextmanager
def endpoint(folder: Path, *, online: bool = False) -> Iterator[Up]:
    """Ours, on a cluster of its own, by its public ports; with the model `online` beside `bench` if it is wanted.

    Raises:
        RuntimeError: at the end, the fast lane was shut.
    """
    files = [folder / "model.ubj", *([folder / "online.ubj"] if online else [])]
    with hosted(files) as host:
        if online:
            serving_online.fill(Home(host.root / "home"))
        found = host.endpoint
        inputs = tuple(f"f{i}" for i in range(WIDTH))
        route = Route(version=1, digest=host.digests[0], role=Role.LIVE)
        models = [ModelSpec(name="bench", label="p", inputs=inputs, routes=(route,))]
        found.deploy([*models, *map(serving_online.spec, host.digests[1:])], Placement())
        url, row = f"{found.url}/v2/models/bench/infer", folder / "row.lines"
        wait_for(url, row.read_bytes().splitlines()[0], host.root)
        yield Up(url, row, _answering(host.grpc_port, folder))
        state = httpx.get(f"{found.url}/raymill/replica").json()["fast_lane"]
        if not state["open"]:
            raise RuntimeError(f"the fast lane was shut: {state['reason']}")


def wait_for(url: str, body: bytes, mark: Path, *, seconds: float = 90) -> None:
    """Until a request is answered with 200; what else the server's log in `mark` says."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.post(url, content=body, headers={"content-type": "application/json"}).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{url} did not come up:\n{(mark / 'log.txt').read_text()[-2000:]}")


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
