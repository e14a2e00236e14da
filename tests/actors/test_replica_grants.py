"""Replicas that Serve scales by our policy, under grants of the real scheduler: its quota is the bound."""

import json
import os
import signal
import time

import pytest
import ray
from ray import serve

from raymill.actors.autoscaling import autoscaling_config
from raymill.actors.load_meter import as_stats
from raymill.actors.scaling import Load, Scaling
from raymill.actors.scheduler import MAX_CONCURRENCY, GpuPoolScheduler, RemoteScheduler
from raymill.actors.scheduler import NAME as SCHEDULER
from raymill.runtime.messages import LeaseRequest, Purpose
from raymill.runtime.records import NAME as RECORDS
from raymill.runtime.records import RecordsActor, RemoteRecords
from raymill.runtime.spawn import NAMESPACE, spawn

OWNER = "serve/told"
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


def test_a_replica_more_has_a_grant_before_it_starts_none_beyond_the_quota_and_it_is_given_back(scheduler, load):
    def held():
        return len(scheduler.leases(OWNER))

    scheduler.grant(WANTED)
    told = Told.options(autoscaling_config=autoscaling_config(SCALING, WANTED, leaving_s=3.0)).bind(load.file)
    handle = serve.run(told, name="told", route_prefix=None)
    assert (running(), held()) == (1, 1) and handle.remote().result() == "here"

    os.kill(ray.get(ray.get_actor(SCHEDULER).pid.remote()), signal.SIGKILL)  # asked again, when it is back
    load(HIGH)
    until(lambda: held() == 2 or running() > 1)
    assert held() == 2, "a replica runs that nothing was granted for"
    until(lambda: running() == 2)
    assert most_over(8) == (2, 2)  # a third is wanted all the time

    load(LOW)
    until(lambda: running() == 1)
    assert held() == 2, "it leaves, and may still work for a while"
    until(lambda: held() == 1)
    assert running() == 1
    events = RemoteRecords().events("lease.released")
    assert [e["data"]["reason"] for e in events] == ["fewer replicas"]
