import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raymill.cluster import lifecycle, ports, processes, session
from raymill.cluster.providers import namespace
from raymill.cluster.spec import load_config, parse_config
from raymill.runtime.errors import ClusterError
from raymill.runtime.home import Home
from raymill.runtime.ledger import Ledger


def config(**provider):
    document = load_config().model_dump()
    document["provider"] |= {"idle_timeout_s": 6, **provider}
    document["head"] |= {"object_store_mb": 200, "memory_mb": 2000}
    for kind in document["node_types"].values():
        kind |= {"object_store_mb": 100, "memory_mb": 1000}
    return parse_config(document, "test")


def left(home):
    return processes.marked(processes.SESSION_MARK, str(home.root))


def drive(script, home):
    done = subprocess.run([sys.executable, *script, str(home.root)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    top = tmp_path_factory.mktemp("cluster")
    before = {name: os.environ.get(name) for name in ("HOME", "RAYMILL_HOME")}
    os.environ["HOME"] = str(top)
    home = Home(top / "state")
    yield home
    lifecycle.down(home)
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module")
def scenario(home, tmp_path_factory):
    """What became of the nodes; and what was asked for beside it, since most of it is waiting."""
    lifecycle.up(home, config(), ports="auto")
    with ThreadPoolExecutor() as beside:
        submitted = beside.submit(submit_job, home)
        plain = beside.submit(attach_to_plain, tmp_path_factory.mktemp("plain"))
        told = drive([str(Path(__file__).with_name("drive_cluster.py"))], home)
    return {**told, "submitted": submitted, "plain": plain}


def submit_job(home):
    """The output of a job of this cluster."""
    known = session.load(home)
    code = "import shutil; from raymill.cluster.attach import current as c; print(shutil.which('raymill'), c().managed)"
    ray = Path(sys.executable).with_name("ray")
    submitted = subprocess.run(
        [ray, "job", "submit", "--address", known.dashboard_url, "--", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
        timeout=120,
    )
    return submitted.stdout + submitted.stderr


ATTACH = """
import json, os, sys
os.environ.pop("RAY_AUTH_MODE")
from raymill.cluster.attach import attach, current
found = attach(sys.argv[1])
assert current(sys.argv[1]) == found
print(json.dumps({**found.document(), "token": len(found.token), "environment": found.environment()}))
"""


def attach_to_plain(folder):
    """Start a cluster without us, attach to it: what was found, and its two ports."""
    plain = {**os.environ, "RAY_AUTH_MODE": "token", processes.SESSION_MARK: str(folder)}
    plain.pop("RAYMILL_HOME", None)
    port, dashboard = ports.picker()(1), ports.picker()(1)
    scratch = f"/tmp/raymill-test-{os.getpid()}"
    command = ["-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", f"--temp-dir={scratch}"]
    command += [f"--dashboard-port={dashboard}", "--num-cpus=1", "--object-store-memory=100000000"]
    try:
        subprocess.run([sys.executable, *command], env=plain, check=True, capture_output=True, timeout=120)
        done = subprocess.run(
            [sys.executable, "-c", ATTACH, f"127.0.0.1:{port}"], env=plain, capture_output=True, text=True, timeout=120
        )
    finally:
        processes.end(processes.marked(processes.SESSION_MARK, str(folder)))
        shutil.rmtree(scratch, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), port, dashboard


def test_a_placement_group_with_a_spot_label_gets_a_spot_node(scenario):
    started = {subject: data for kind, subject, data in scenario["events"] if kind == "node.started"}
    first = started[scenario["nodes"][0]]
    assert (first["node_type"], first["market"], first["price_usd_per_h"]) == ("spot", "spot", 0.3)
    assert sorted(d["node_type"] for d in started.values()) == ["head", "spot", "spot"]


def test_a_cluster_without_a_records_actor_is_not_watched(scenario):
    assert scenario["refused_without_records"]


def test_a_reclaimed_node_goes_after_its_notice_and_none_comes_while_the_market_is_shut(scenario):
    assert scenario["noticed"] and scenario["alive_at_notice"] and scenario["refused_while_closed"]
    kinds = [kind for kind, subject, _ in scenario["events"] if subject == scenario["nodes"][0]]
    assert sorted(kinds) == ["node.started", "node.stopped", "spot.noticed", "spot.reclaimed"]


def test_the_ledger_says_why_each_node_went_and_says_it_once_over_a_restart_of_the_actor(scenario):
    stopped = [(subject, data["reason"]) for kind, subject, data in scenario["events"] if kind == "node.stopped"]
    assert stopped == [(scenario["nodes"][0], "spot reclaim"), (scenario["nodes"][1], "idle")]


def test_up_on_a_running_session_gives_it_back(scenario, home):
    known = session.load(home)
    assert lifecycle.up(home, config()).pids == known.pids


def test_a_second_session_beside_it_is_refused_its_ports_with_the_holder_named(scenario, home, tmp_path):
    taken = session.load(home).ports
    wanted_ports = {name: getattr(taken, name) for name in ("gcs", "dashboard", "serve", "grpc")}
    wanted = parse_config({**config().model_dump(), "ports": wanted_ports}, "test")
    with pytest.raises(ClusterError, match=rf"port {taken.serve} \(serve\) is held by pid \d+ \(.*haproxy"):
        lifecycle.up(Home(tmp_path / "other"), wanted)
    assert session.load(Home(tmp_path / "other")) is None


def test_the_token_is_readable_by_its_owner_only_and_the_dashboard_wants_it(scenario, home):
    known = session.load(home)
    assert Path(known.token_path).stat().st_mode & 0o777 == 0o600
    assert Path(known.scratch).stat().st_mode & 0o777 == 0o700
    said = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{known.dashboard_url}/api/serve/applications/"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "401"


def test_a_submitted_job_finds_raymill_on_its_path_and_the_session_it_runs_in(scenario):
    said = scenario["submitted"].result()
    assert f"{Path(sys.executable).with_name('raymill')} True" in said, said


def test_a_plain_cluster_is_described_with_what_it_lacks(scenario):
    told, port, dashboard = scenario["plain"].result()
    assert (told["managed"], told["has_autoscaler"], told["ports"]) == (False, False, None)
    assert (
        told["dashboard_url"].endswith(f":{dashboard}") and told["address"].endswith(f":{port}") and told["token"] == 64
    )
    assert told["root"] == str(Path.home() / ".raymill") and told["serve_url"] == "http://127.0.0.1:8000"


def test_after_sigkill_of_everything_but_haproxy_up_works_again_on_the_same_ports(scenario, home):
    before = session.load(home)
    for process in left(home):
        if "/bin/haproxy" not in process.command:
            os.kill(process.pid, signal.SIGKILL)
    assert not session.load(home).is_alive
    wanted_ports = {name: getattr(before.ports, name) for name in ("gcs", "dashboard", "serve", "grpc")}
    again = lifecycle.up(home, parse_config({**config().model_dump(), "ports": wanted_ports}, "test"))
    assert again.is_alive and again.started_s > before.started_s
    assert again.serve_url == before.serve_url


def test_down_leaves_no_process_closes_the_books_and_may_be_repeated(scenario, home):
    scratch = session.scratch_path(home)
    assert lifecycle.down(home) > 0
    assert (home.cluster / "logs" / "ray" / "gcs_server.out").exists()
    assert left(home) == [] and not scratch.exists() and session.load(home) is None
    ledger = Ledger(home.record, lock_wait_s=5)
    events = ledger.events()
    ledger.close()
    started = {e["subject"] for e in events if e["kind"] == "node.started"}
    assert started == {e["subject"] for e in events if e["kind"] == "node.stopped"}
    assert lifecycle.down(home) == 0


def test_an_up_that_was_killed_half_way_leaves_nothing_that_down_does_not_find(home, tmp_path):
    half = Home(tmp_path / "half")
    code = "from raymill.cluster import lifecycle; from raymill.runtime.home import Home; from pathlib import Path; "
    code += f"lifecycle.up(Home(Path({str(half.root)!r})), ports='auto', serve=False)"
    process = subprocess.Popen([sys.executable, "-c", code])
    while not any("gcs_server" in p.command for p in left(half)):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert session.load(half).state == "starting" and not session.load(half).is_alive
    assert lifecycle.down(half) > 0 and left(half) == [] and session.load(half) is None


PROBE = """
import json, os, sys
from pathlib import Path
from raymill.cluster import session
from raymill.runtime.home import Home
found = session.load(Home(Path(sys.argv[1])))
found.enter()
import numpy, ray
ray.init(address=found.address, log_to_driver=False)
name = f"witness-{os.getpid()}"
witnesses = [Path("/tmp", name), Path("/dev/shm", name), Path(sys.argv[1], name)]
for path in witnesses:
    path.write_text("here")
@ray.remote(num_cpus=1, num_gpus=1, label_selector={"raymill.io/market": "spot"})
def probe(block):
    import raymill.actors
    seen = [str(p) for p in witnesses if p.exists()]
    info = {"seen": seen, "sum": int(block.sum()), "net": os.listdir("/sys/class/net")}
    return info, numpy.ones(20 << 20, numpy.uint8)
info, back = ray.get(probe.remote(ray.put(numpy.ones(1 << 20, numpy.uint8))), timeout=120)
for path in witnesses:
    path.unlink()
addresses = sorted({n["NodeManagerAddress"] for n in ray.nodes()})
print(json.dumps({**info, "back": back.nbytes, "addresses": addresses}))
"""


@pytest.mark.root
@pytest.mark.skipif(namespace.can_isolate() != "", reason=f"LOUD: no second host here: {namespace.can_isolate()}")
def test_an_isolated_worker_shares_no_disk_and_no_network_and_gives_back_20_mb(home, tmp_path):
    apart = Home(tmp_path / "apart")
    found = lifecycle.up(apart, config(isolate=True), ports="auto", serve=False)
    try:
        told = drive(["-c", PROBE], apart)
    finally:
        lifecycle.down(apart)
    bridge = namespace.network_of(apart.root)
    assert told["seen"] == [] and told["sum"] == 1 << 20 and told["back"] == 20 << 20
    assert told["addresses"] == [bridge.head, bridge.node(0).address] and found.address.startswith(bridge.head)
    assert sorted(told["net"]) == sorted(["lo", bridge.name])
    assert (
        not Path("/sys/class/net", bridge.name).exists() and not Path("/run/netns", bridge.node(0).namespace).exists()
    )
    assert left(apart) == []
