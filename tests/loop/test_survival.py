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


pytestmark = pytest.mark.timeout(600)


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


def test_all_killed_in_mid_training_and_in_mid_replay_a_third_run_ends_as_if_nothing_had_been(place):
    host = place(until="2020-02-22", epochs=12)

    first = host.start()
    host.until_true(lambda: list((host.home.models / "checkpoints").glob("*.safetensors")), "a checkpoint")
    assert host.days_done() == 0
    host.kill_everything(first)

    second = host.start()
    host.until_true(lambda: host.days_done() >= 3, "three replayed days")
    host.kill_everything(second)
    at_kill = host.progress()
    assert not at_kill.finished and any("/haproxy" in p.command for p in host.members())

    summary = host.finish(host.start())
    assert summary["run"] == at_kill.run and len(list(host.home.runs.glob("*/loop.json"))) == 1
    assert_whole(host, summary, days=7)
    assert [v["kind"] for v in summary["versions"]] == ["baseline", "model"]
    assert host.members() == []


def test_a_job_takes_up_what_a_killed_driver_left_and_ends_well_though_every_actor_is_killed_under_it(place):
    host = place(until="2020-03-10")
    host.raymill("up", "--ports", "auto")
    driver = host.start()
    host.until_true(lambda: list((host.home.models / "checkpoints").glob("*.safetensors")), "a checkpoint")
    driver.kill()
    driver.wait()
    job = host.submit()
    host.until_true(lambda: host.days_done() >= 1, "a replayed day", 200)
    killed = []
    for name, title in ACTORS.items():
        killed += [name] if _kill(host, title) else []
        done = host.days_done()
        host.until_true(lambda done=done: host.days_done() > done, f"a day after {name} was killed")
    summary = host.finish(job)
    assert killed == list(ACTORS)
    assert summary["skipped"] == [] and len(list(host.home.runs.glob("*/loop.json"))) == 1
    host.raymill("down")
    assert host.members() == []
    assert_whole(host, summary, days=24)


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
