"""The scheduler on real raylets: labels are kept to, a dead node's lease ends, a killed scheduler loses nothing."""

import os
import signal
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from raymill.actors.pool import MARKET_LABEL
from raymill.actors.scheduler import MAX_CONCURRENCY, NAME, GpuPoolScheduler, RemoteScheduler
from raymill.runtime.messages import Granted, LeaseRequest, Notice, Purpose, Queued
from raymill.runtime.records import NAME as RECORDS
from raymill.runtime.records import RecordsActor, RemoteRecords
from raymill.runtime.spawn import NAMESPACE, in_lease, spawn


class SchedulerWithPid(GpuPoolScheduler):
    """The actor under test, which also tells its process."""

    def pid(self) -> int:
        return os.getpid()


class Where:
    """A rank that says where it is."""

    def start(self) -> None: ...

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False},
    )
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
    spawn(RecordsActor, str(home / "raymill"), name=RECORDS)
    spawn(SchedulerWithPid, RemoteRecords(), name=NAME, max_concurrency=MAX_CONCURRENCY)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def add(cluster, market):
    return cluster.add_node(
        num_cpus=1, num_gpus=1, object_store_memory=100 << 20, labels={MARKET_LABEL: market}, wait=True
    )


def ask(count, **fields):
    return LeaseRequest(**{
        "owner": "gang", "purpose": Purpose.TRAINING, "count": count, "spot": True,
        "resources": {"CPU": 1.0, "GPU": 1.0}, **fields,
    })  # fmt: skip


def until(true, patience_s=40.0):
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_life_of_a_gangs_leases(cluster):
    scheduler, records = RemoteScheduler(), RemoteRecords()
    refused = scheduler.acquire(ask(1), 0.1)
    assert isinstance(refused, Queued) and "never fits" in refused.reason
    add(cluster, "reserved")
    spot_node = add(cluster, "spot")

    granted = scheduler.acquire(ask(2), 20)
    assert isinstance(granted, Granted) and [x.market for x in granted.leases] == ["reserved", "spot"]
    reserved, spot = granted.leases
    ranks = [in_lease(Where, x) for x in granted.leases]
    assert ray.get([r.node.remote() for r in ranks]) == [reserved.node_id, spot.node_id]

    pid = ray.get(ray.get_actor(NAME).pid.remote())
    os.kill(pid, signal.SIGKILL)
    assert [x.lease_id for x in scheduler.leases("gang")] == [reserved.lease_id, spot.lease_id]
    assert ray.get(ray.get_actor(NAME).pid.remote()) != pid
    assert ray.get(ranks[0].node.remote()) == reserved.node_id

    notice = Notice(node_id=spot.node_id, deadline_s=time.time() + 60, reason="spot")
    scheduler.notice(notice)
    assert scheduler.notices("gang") == [notice]
    cluster.remove_node(spot_node, allow_graceful=False)
    until(lambda: [x.lease_id for x in scheduler.leases("gang")] == [reserved.lease_id])
    (released,) = records.events("lease.released")
    assert released["data"]["reason"] == "its node is gone" and released["data"]["market"] == "spot"

    scheduler.release([reserved.lease_id])
    again = scheduler.acquire(ask(1), 20)
    assert isinstance(again, Granted) and again.leases[0].market == "reserved"
    scheduler.release([x.lease_id for x in again.leases])
    assert scheduler.status()["leases"] == []


def test_replicas_are_granted_on_the_head(cluster):
    scheduler = RemoteScheduler()
    (lease,) = scheduler.grant(LeaseRequest(owner="app", purpose=Purpose.SERVING, count=1)).leases
    assert lease.placement_group is None
    event = RemoteRecords().events("lease.granted", subject=lease.lease_id)[0]
    assert event["data"]["node_id"] == ray.get_runtime_context().get_node_id() and event["data"]["share"] == 0.5
    scheduler.release([lease.lease_id])
