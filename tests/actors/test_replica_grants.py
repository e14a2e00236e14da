"""Replicas that Serve scales by our policy, under grants of the real scheduler: its quota is the bound.

The second one comes up in a process that was prepared for it.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import ray
from ray import serve

from raymill.actors.autoscaling import autoscaling_config
from raymill.actors.endpoint import Placement, number
from raymill.actors.load_meter import as_stats
from raymill.actors.scaling import Load, Scaling
from raymill.actors.scheduler import MAX_CONCURRENCY, GpuPoolScheduler, RemoteScheduler
from raymill.actors.scheduler import NAME as SCHEDULER
from raymill.runtime.messages import LeaseRequest, Purpose
from raymill.runtime.records import NAME as RECORDS
from raymill.runtime.records import RecordsActor, RemoteRecords
from raymill.runtime.spawn import NAMESPACE, spawn

OWNER = "serve/told"
LEAVES_A_MARK = "import os, pathlib; pathlib.Path(__file__).with_name(f'prepared.{os.getpid()}').touch()"
LOW = Load(delay_s=0.0, service_s=0.0, rows_per_s=1.0, busy=0.01, idle_s=0.0)
HIGH = Load(delay_s=1.0, service_s=0.0, rows_per_s=100.0, busy=0.9, idle_s=0.0)
WANTED = LeaseRequest(owner=OWNER, purpose=Purpose.SERVING, count=1, min_count=1, resources={"CPU": 1.0})
SCALING = Scaling(fewest=1, most=4, p99_s=0.1, cooldown_s=1.0)


class SchedulerWithPid(GpuPoolScheduler):
    """The scheduler, which also tells its process."""

    def pid(self):
        return os.getpid()


@serve.deployment(name="Told", ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_timeout_s=1)
class Told:
    """A replica whose load is what a file says."""

    def __init__(self, file):
        self._file = file
        Path(file).with_name(f"replica.{os.getpid()}").touch()

    def record_autoscaling_stats(self):
        with open(self._file) as opened:
            return json.load(opened)

    def __call__(self):
        return "here"


@pytest.fixture
def load(tmp_path):
    """Says what all replicas tell of their load, from now on."""
    file = tmp_path / "load.json"

    def say(now):
        (tmp_path / "next").write_text(json.dumps(as_stats(now)))
        (tmp_path / "next").rename(file)

    say(LOW)
    say.file = str(file)
    return say


@pytest.fixture
def scheduler(tmp_path):
    """The scheduler, on a head with four processors of which two are the tenant's."""
    ray.init(address="local", namespace=NAMESPACE, num_cpus=4, include_dashboard=False, log_to_driver=False)
    spawn(RecordsActor, str(tmp_path / "raymill"), name=RECORDS)
    quotas = {"default": {"CPU": 2.0}}
    spawn(SchedulerWithPid, RemoteRecords(), (), quotas, name=SCHEDULER, max_concurrency=MAX_CONCURRENCY)
    serve.start(proxy_location="Disabled")
    yield RemoteScheduler()
    serve.shutdown()
    ray.shutdown()


def running():
    replicas = serve.status().applications["told"].deployments["Told"].replica_states
    return sum(count for state, count in replicas.items() if state == "RUNNING")


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, (running(), RemoteScheduler().leases(OWNER))
        time.sleep(0.1)


def most_over(seconds):
    """The most replicas and leases that are seen for some time."""
    end, most = time.monotonic() + seconds, (0, 0)
    while time.monotonic() < end:
        most = max(most[0], running()), max(most[1], len(RemoteScheduler().leases(OWNER)))
        time.sleep(0.1)
    return most


def test_the_next_replica_is_prepared_and_has_a_grant_before_it_starts_none_beyond_the_quota_and_it_is_given_back(
    scheduler, load, tmp_path
):
    def pids(what):
        return {int(path.suffix[1:]) for path in tmp_path.glob(f"{what}.*")}

    def held():
        return len(scheduler.leases(OWNER))

    scheduler.grant(WANTED)
    scaled = autoscaling_config(SCALING, WANTED, leaving_s=3.0)
    placement = Placement(cpus=0.1, env={"PYTHONPATH": str(tmp_path)}, autoscaling=scaled, prepare=("leaves_a_mark",))
    (tmp_path / "leaves_a_mark.py").write_text(LEAVES_A_MARK)
    told = Told.options(
        autoscaling_config=number(placement)["autoscaling_config"],
        ray_actor_options={"num_cpus": placement.cpus, "runtime_env": {"env_vars": placement.variables}},
    )
    handle = serve.run(told.bind(load.file), name="told", route_prefix=None)
    assert (running(), held()) == (1, 1) and handle.remote().result() == "here"
    until(lambda: len(pids("prepared")) == 2)  # the replica's own, and that of the next one
    (spare,) = pids("prepared") - pids("replica")

    os.kill(ray.get(ray.get_actor(SCHEDULER).pid.remote()), signal.SIGKILL)  # asked again, when it is back
    load(HIGH)
    until(lambda: held() == 2 or running() > 1)
    assert held() == 2, "a replica runs that nothing was granted for"
    until(lambda: running() == 2)
    assert spare in pids("replica"), "the process that was prepared was not used"
    assert most_over(8) == (2, 2)  # a third is wanted all the time

    load(LOW)
    until(lambda: running() == 1)
    assert held() == 2, "it leaves, and may still work for a while"
    until(lambda: held() == 1)
    assert running() == 1
    events = RemoteRecords().events("lease.released")
    assert [e["data"]["reason"] for e in events] == ["fewer replicas"]
