"""State survives: whatever is killed, at whatever moment, `raymill run` again ends as an undisturbed run would."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress

import pytest

from tests.loop.chaos_host import Host, assert_whole

ACTORS = {
    "records": "ray::RecordsActor",
    "data": "ray::DataActor",
    "features": "ray::FeatureActor",
    "drift": "ray::DriftMonitor",
    "scheduler": "ray::GpuPoolScheduler",
    "cluster": "ray::ClusterActor",
    "replica": "ray::ServeReplica",
    "controller": "ray::ServeController",
    "proxy": "ray::HAProxyManager",
    "haproxy": "/bin/haproxy",
}
"""What each is called among the processes of a cluster."""


pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def place(tmp_path, kernels):
    """Makes hosts; nothing of theirs is left running."""
    made = []

    def make(**how):
        made.append(Host(tmp_path, **how))
        made[-1].home.root.mkdir()
        made[-1].home.kernels.symlink_to(kernels)
        return made[-1]

    yield make
    for host in made:
        host.close()


def test_whatever_is_killed_in_training_and_replay_the_last_run_ends_as_if_nothing_had_been(place):
    """Everything, then a driver alone, in mid-training; each actor under a job that takes over; everything again."""
    host = place(until="2020-03-25", epochs=20)

    first = host.start()
    host.until_true(lambda: _checkpoint(host), "a checkpoint")
    assert host.days_done() == 0
    host.kill_everything(first)
    reached = _checkpoint(host)

    host.raymill("up", "--config", str(host.top / "cluster.toml"))
    driver = host.start()
    host.until_true(lambda: _checkpoint(host) > reached, "a later checkpoint")
    driver.kill()
    driver.wait()
    assert host.days_done() == 0

    job = host.submit()
    host.until_true(lambda: host.days_done() >= 1, "a replayed day", 200)
    killed = []
    for name, title in ACTORS.items():
        killed += [name] if _kill(host, title) else []
        done = host.days_done()
        host.until_true(lambda done=done: host.days_done() > done, f"a day after {name} was killed")
    host.kill_everything(job)
    at_kill = host.progress()
    assert killed == list(ACTORS) and not at_kill.finished
    assert any("/haproxy" in p.command for p in host.members())

    summary = host.finish(host.start())
    assert summary["run"] == at_kill.run and len(list(host.home.runs.glob("*/loop.json"))) == 1
    assert [v["kind"] for v in summary["versions"]] == ["baseline", "model"]
    assert summary["skipped"] == [] and host.members() == []
    assert_whole(host, summary, days=39)


def test_a_job_submitted_to_a_plain_cluster_runs_to_its_end_and_says_what_was_skipped(place):
    host = place(until="2020-02-18")
    with host.plain_cluster():
        summary = host.finish(host.submit())
    assert_whole(host, summary, days=3)
    skipped = dict(s.split(": ", 1) for s in summary["skipped"])
    assert skipped.keys() == {"nodes on demand", "cost", "Serve behind HAProxy, short drains", "spot drill"}
    assert all("`raymill up`" in why for why in skipped.values())


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_ten_random_moments_a_run_still_ends_as_if_nothing_had_been(place, seed):
    chance = random.Random(seed)
    host = place(until="2020-03-25", epochs=20, shift="costly")
    for _ in range(10):
        process = host.start()
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(5, 60))
            break
        host.kill_everything(process)
    else:
        process = host.start()
    summary = host.finish(process, timeout_s=600)
    assert_whole(host, summary, days=39)


def _checkpoint(host):
    """When the newest one was written, ns; 0 without one."""
    return max((p.stat().st_mtime_ns for p in (host.home.models / "checkpoints").glob("*.safetensors")), default=0)


def _kill(host, title):
    """SIGKILL to the actor of that class, waited for if it is just being started; to all of several HAProxies."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if found := [p for p in host.members() if title in p.command.split(" ")[0]]:
            for process in found:
                os.kill(process.pid, signal.SIGKILL)
            return True
        time.sleep(0.05)
    return False
