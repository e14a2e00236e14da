"""One cluster for all tests of this folder: it ends after the last of them, for it is the fixture of a package.

The files' names put them into the order in which one leaves the endpoint to the next: `test_answers.py` finds version 1
as it was first deployed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from benchmarks.endpoint_host import HostRecords
from raymill.actors.endpoint import Endpoint, Placement
from raymill.actors.online import OnlineStore
from raymill.cluster.environment import haproxy_files, serve_environment, serve_options
from raymill.cluster.ports import choose
from raymill.cluster.serve_proxy import lay_launcher
from raymill.runtime.home import Home
from tests.actors.serving.taxi import AT, PLAN, compiled, spec


@pytest.fixture(scope="package")
def cluster(kernels):
    root = Path(tempfile.mkdtemp(prefix="rmsv"))  # short: HAProxy's socket paths end at 107 characters
    ports = choose("auto")
    home = Home(root / "home")
    home.root.mkdir()
    home.kernels.symlink_to(kernels)
    events = {"trip": [1, 2], "zone": ["a", "a"], "miles": [1.0, 3.0]}
    OnlineStore(home.online, PLAN).ingest(
        "trips", pa.table(events | {"start": pa.array([AT - 5, AT - 4], pa.timestamp("us", "UTC"))})
    )
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        **serve_environment(ports),
        **haproxy_files(root),
        **lay_launcher(root / "ha"),
        "HOME": str(root),
        "PYTHONPATH": str(Path(__file__).parents[3]),  # the host is of one piece with that of the benchmarks
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(root / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    (root / "token").write_text("a-token-of-this-test-alone-0123456789")
    host = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("serving_host.py")), str(home.root), str(ports.dashboard)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        told = json.loads(host.stdout.readline())
        digests = told["digests"]["taxi"]
        endpoint = Endpoint(
            f"http://127.0.0.1:{ports.dashboard}",
            home,
            url=f"http://127.0.0.1:{ports.serve}",
            serve_options=serve_options(ports),
            headers=lambda: {"Authorization": "Bearer a-token-of-this-test-alone-0123456789"},
        )
        endpoint.deploy([spec(digests, v1=1.0)], Placement(env=compiled(home) | {"CODE": "old"}))
        endpoint.records = HostRecords(host)
        endpoint.grpc_url = f"127.0.0.1:{ports.grpc}"
        endpoint.metrics_url = f"http://127.0.0.1:{told['metrics_port']}/metrics"
        yield endpoint, digests, home
    finally:
        host.stdin.close()
        try:
            host.wait(40)
        finally:
            host.kill()
            left = [p for p in psutil.process_iter(["cmdline"]) if str(root) in " ".join(p.info["cmdline"] or [])]
            for process in left:
                process.kill()
            shutil.rmtree(root, ignore_errors=True)
