"""An endpoint of ours for benchmarks and tests: Ray, registry and Serve in a process, set up as by `raymill up`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import peer_environment
from raymill.actors.endpoint import Endpoint
from raymill.cluster.environment import haproxy_files, serve_environment, serve_options
from raymill.cluster.ports import choose
from raymill.cluster.serve_proxy import lay_launcher
from raymill.runtime.home import Home
from raymill.runtime.messages import ModelVersion, Stage

_TOKEN = "a-token-of-this-benchmark-alone-0123456789"


@dataclass(frozen=True)
class Hosted:
    """A cluster with nothing deployed."""

    endpoint: Endpoint
    digests: list[str]
    """Of the model files, versions 1, 2, … of the model `bench` in its registry."""
    process: subprocess.Popen[str]
    """What `serving_host` is."""
    grpc_port: int
    root: Path
    """Folder of its own, gone afterwards."""


@contextmanager
def hosted(files: Sequence[Path]) -> Iterator[Hosted]:
    """A cluster of its own, gone afterwards."""
    root = Path(tempfile.mkdtemp(prefix="rmb"))  # short: HAProxy's socket paths end at 107 characters
    ports, home = choose("auto"), Home(root / "home")
    environment = {
        **peer_environment(HOME=str(root), PYTHONPATH=str(Path(__file__).parents[1])),
        **serve_environment(ports),
        **haproxy_files(root),
        **lay_launcher(root / "ha"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(root / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    (root / "token").write_text(_TOKEN)
    host = Path(__file__).with_name("serving_host.py")
    command = [sys.executable, str(host), str(home.root), str(ports.dashboard), *map(str, files)]
    try:
        with process(command, environment, root) as started:
            assert started.stdout is not None
            digests = json.loads(started.stdout.readline())["digests"]
            endpoint = Endpoint(
                f"http://127.0.0.1:{ports.dashboard}",
                home,
                url=f"http://127.0.0.1:{ports.serve}",
                serve_options=serve_options(ports),
                headers=lambda: {"Authorization": f"Bearer {_TOKEN}"},
            )
            yield Hosted(endpoint, digests, started, ports.grpc, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def process(command: list[str], environment: Mapping[str, str], mark: Path) -> Iterator[subprocess.Popen[str]]:
    """A process; at the end its stdin closes, and what is still there of it, known by `mark`, is killed."""
    log = open(mark / "log.txt", "a")  # noqa: SIM115
    started = subprocess.Popen(
        command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=mark
    )
    try:
        yield started
    finally:
        family = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
        assert started.stdin is not None
        started.stdin.close()
        try:
            started.wait(40 if "serving_host" in " ".join(command) or "/serve/" in " ".join(command) else 0.2)
        except subprocess.TimeoutExpired:
            started.terminate()
        marked = [p for p in psutil.process_iter(["cmdline"]) if str(mark) in " ".join(p.info["cmdline"] or [])]
        for left in {*family, *marked}:
            with suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
                if left.is_running() and left.pid != os.getpid():
                    left.kill()
        started.kill()
        started.wait()
        log.close()


class HostRecords:
    """The actor `records` of a host's process."""

    def __init__(self, host: Any) -> None:
        self._host = host

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self._host.stdin.write(json.dumps([method, arguments, named]) + "\n")
            self._host.stdin.flush()
            answer = json.loads(self._host.stdout.readline())
            return [_version(v) for v in answer] if isinstance(answer, list) else _version(answer)

        return call


def _version(told: dict[str, Any]) -> ModelVersion:
    return ModelVersion(**{**told, "stage": Stage(told["stage"]), "history": tuple(told["history"])})
