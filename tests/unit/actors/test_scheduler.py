"""The scheduler on a cluster made of dicts: nodes that appear and vanish when the test says so."""

import threading
import time
from dataclasses import replace

import pytest

from raymill.actors.gang import Node, NodeKind
from raymill.actors.pool import Group
from raymill.actors.scheduler import GpuPoolScheduler
from raymill.runtime.errors import LeaseError, StoreError
from raymill.runtime.messages import Granted, LeaseRequest, Notice, Purpose, Queued
from raymill.runtime.records import RecordsActor

GPU = {"CPU": 1.0, "GPU": 1.0}
KINDS = (
    NodeKind(name="reserved", market="reserved", resources=GPU, max_nodes=1),
    NodeKind(name="spot", market="spot", resources=GPU, max_nodes=2),
)


class DictPool:
    """A cluster whose autoscaler launches a node per pending bundle, in the markets that deliver."""

    def __init__(self, *delivers: str) -> None:
        self.delivers, self.asked, self.dead, self.count = set(delivers), {}, set(), 0
        self.on: dict[str, str] = {}
        self.mutex = threading.RLock()
        self.up: dict[str, tuple[str, dict[str, float]]] = {"head": ("", {"CPU": 4.0})}

    def add(self, market: str, resources=GPU) -> str:
        self.count += 1
        name = f"{market or 'node'}-{self.count}"
        self.up[name] = (market, dict(resources))
        return name

    def kill(self, node: str) -> None:
        del self.up[node]
        self.on = {i: n for i, n in self.on.items() if n != node}

    def _free(self, name):
        total = dict(self.up[name][1])
        for lease_id, where in list(self.on.items()):
            if where == name and lease_id in self.asked:
                for r, amount in self.asked[lease_id][0].items():
                    total[r] -= amount
        return total

    def nodes(self):
        return [
            Node(node_id=n, node_type=m, market=m, total=r, free=self._free(n)) for n, (m, r) in list(self.up.items())
        ]

    def head(self):
        return "head"

    def create(self, lease_id, bundle, market, avoid):
        self.asked[lease_id] = (bundle, market, avoid)
        return lease_id

    def groups(self):
        with self.mutex:
            return self._placed()

    def _placed(self):
        for lease_id, (bundle, market, avoid) in list(self.asked.items()):
            if lease_id in self.on:
                continue
            for name in (*self.up, *([self.add(market)] if market in self.delivers else [])):
                free, its = self._free(name), self.up[name][0]
                if its == market and name not in avoid and all(free.get(r, 0) >= a for r, a in bundle.items()):
                    self.on[lease_id] = name
                    break
        return {
            i: Group(handle=i, node_id=self.on.get(i, ""), state="CREATED" if i in self.on else "PENDING")
            for i in self.asked
        }

    def remove(self, handle):
        with self.mutex:
            self.asked.pop(handle, None)
            self.on.pop(handle, None)

    def dead_jobs(self):
        return self.dead


@pytest.fixture
def records(tmp_path):
    actor = RecordsActor(tmp_path)
    actor.start()
    yield actor
    actor.stop()


@pytest.fixture
def make(records):
    made = []

    def scheduler(pool, kinds=KINDS, quotas=None):
        made.append(GpuPoolScheduler(records, kinds, quotas, pool))
        made[-1].start()
        return made[-1]

    yield scheduler
    for each in made:
        each.stop()


def ask(count=2, **fields):
    return LeaseRequest(**{
        "owner": "gang", "purpose": Purpose.TRAINING, "count": count, "resources": GPU, "spot": True, **fields
    })  # fmt: skip


def kinds_of(records):
    return [e["kind"] for e in records.events("lease.*")]


def test_a_gang_gets_one_group_per_rank_and_the_ledger_knows_where(make, records):
    pool = DictPool("reserved", "spot")
    granted = make(pool).acquire(ask(3, pipeline="p", run="r", tenant="team"), 5)
    assert isinstance(granted, Granted)
    assert [x.market for x in granted.leases] == ["reserved", "spot", "spot"]
    assert len({x.node_id for x in granted.leases}) == 3 == len(pool.asked)
    event = records.events("lease.granted")[0]
    assert (event["subject"], event["pipeline"], event["run"]) == (granted.leases[0].lease_id, "p", "r")
    assert event["data"]["node_id"] == granted.leases[0].node_id and event["data"]["share"] == 1.0
    assert event["data"]["purpose"] == "training" and event["data"]["tenant"] == "team"


def test_too_few_nodes_in_time_and_every_bundle_is_given_back(make, records, monkeypatch):
    monkeypatch.setattr("raymill.actors.scheduler._SETTLE_S", 0.05)
    pool = DictPool("reserved")
    answer = make(pool).acquire(ask(2, min_count=2), 0.2)
    assert isinstance(answer, Queued) and "only 1 of 2 nodes came up" in answer.reason
    assert pool.asked == {} and kinds_of(records) == []


def test_enough_nodes_in_time_are_kept_and_the_rest_given_back(make, records, monkeypatch):
    monkeypatch.setattr("raymill.actors.scheduler._SETTLE_S", 0.05)
    pool = DictPool("reserved")
    answer = make(pool).acquire(ask(3, min_count=1), 0.2)
    assert isinstance(answer, Granted) and [x.market for x in answer.leases] == ["reserved"]
    assert len(pool.asked) == 1 and kinds_of(records) == ["lease.granted"]


def test_who_waits_is_told_why_and_is_served_when_a_lease_is_released(make, records):
    pool = DictPool()
    pool.add("")
    scheduler = make(pool, kinds=())
    first = scheduler.acquire(ask(1, owner="first"), 5)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(scheduler.acquire(ask(1, owner="second"), 20)))
    waiting.start()
    while not records.events("lease.queued"):
        time.sleep(0.01)
    (queued,) = scheduler.status()["queue"]
    assert queued["owner"] == "second" and "0 of 1 bundles of {CPU: 1, GPU: 1} fit now" in queued["reason"]
    scheduler.release([x.lease_id for x in first.leases])
    waiting.join(20)
    assert isinstance(answers[0], Granted) and scheduler.status()["queue"] == []
    assert kinds_of(records) == ["lease.granted", "lease.queued", "lease.released", "lease.granted"]


def test_the_same_request_asked_again_gives_the_same_leases(make, records):
    pool = DictPool("reserved", "spot")
    scheduler = make(pool)
    first = scheduler.acquire(ask(2, request_id="once"), 5)
    assert scheduler.acquire(ask(2, request_id="once"), 5) == first
    assert kinds_of(records) == ["lease.granted"] * 2


def test_release_may_be_repeated_and_knows_no_unknown_id(make, records):
    scheduler = make(DictPool("reserved"))
    (lease,) = scheduler.acquire(ask(1), 5).leases
    for _ in range(2):
        scheduler.release([lease.lease_id, "nobody's"])
    assert kinds_of(records) == ["lease.granted", "lease.released"]
    assert scheduler.leases("gang") == [] and scheduler.status()["leases"] == []


def test_a_restarted_scheduler_has_the_same_leases_and_clears_what_nobody_was_told_of(make, records):
    pool = DictPool("reserved", "spot")
    granted = make(pool).acquire(ask(2), 5)
    pool.create("never-told.0", GPU, "spot", [])
    again = make(pool)
    assert {x.lease_id for x in again.leases("gang")} == {x.lease_id for x in granted.leases}
    assert again.leases("gang")[0] == granted.leases[0]
    assert "never-told.0" not in pool.asked and len(pool.asked) == 2
    again.release([x.lease_id for x in granted.leases])
    assert pool.asked == {}
    assert make(pool).leases("gang") == []


def test_leases_of_dead_nodes_and_dead_jobs_are_released_with_the_reason(make, records):
    pool = DictPool("reserved", "spot")
    scheduler = make(pool)
    reserved, spot = scheduler.acquire(ask(2, job_id="01"), 5).leases
    pool.kill(spot.node_id)
    scheduler.sweep()
    assert [x.lease_id for x in scheduler.leases("gang")] == [reserved.lease_id]
    assert spot.lease_id not in pool.asked  # or its pending group would buy a node
    pool.dead.add("01")
    scheduler.sweep()
    reasons = {e["subject"]: e["data"]["reason"] for e in records.events("lease.released")}
    assert reasons == {spot.lease_id: "its node is gone", reserved.lease_id: "its owner's job ended"}


def test_a_whole_cluster_that_died_leaves_no_lease_behind(make, records):
    scheduler = make(DictPool("reserved", "spot"))
    scheduler.acquire(ask(2), 5)
    scheduler.grant(LeaseRequest(owner="app", purpose=Purpose.SERVING, count=1))
    fresh = DictPool("reserved", "spot")
    fresh.up["other-head"] = fresh.up.pop("head")
    again = make(fresh)
    assert again.status()["leases"] == [] and kinds_of(records).count("lease.released") == 3


def test_a_notice_reaches_the_owner_and_keeps_new_bundles_away(make, records):
    pool = DictPool("reserved", "spot")
    scheduler = make(pool)
    _, spot = scheduler.acquire(ask(2), 5).leases
    notice = Notice(node_id=spot.node_id, deadline_s=9.0, reason="spot")
    for _ in range(2):
        scheduler.notice(notice)
    assert scheduler.notices("gang") == [notice] and scheduler.notices("other") == []
    assert make(pool).notices("gang") == [notice]
    assert len(records.events("node.noticed")) == 1
    scheduler.release([spot.lease_id])
    (replacement,) = scheduler.acquire(ask(1), 5).leases
    assert replacement.node_id != spot.node_id and scheduler.notices("gang") == []
    pool.kill(spot.node_id)
    scheduler.sweep()
    assert scheduler.status()["notices"] == []


def test_replicas_get_grants_up_to_a_count_on_the_head(make, records):
    scheduler = make(DictPool())
    app = LeaseRequest(owner="app", purpose=Purpose.SERVING, count=2)
    first = scheduler.grant(app)
    assert scheduler.grant(app) == first and len(first.leases) == 2
    assert all(x.placement_group is None and x.node_id == "" for x in first.leases)
    assert records.events("lease.granted")[0]["data"]["node_id"] == "head"
    assert records.events("lease.granted")[0]["data"]["share"] == 0.25
    assert len(scheduler.grant(LeaseRequest(owner="app", purpose=Purpose.SERVING, count=1)).leases) == 1
    assert len(scheduler.grant(LeaseRequest(owner="app", purpose=Purpose.SERVING, count=3)).leases) == 3
    assert len(records.events("lease.granted")) == 4 and len(records.events("lease.released")) == 1


def test_a_quota_refuses_replicas_with_figures(make):
    scheduler = make(DictPool(), quotas={"default": {"CPU": 2.0}})
    with pytest.raises(LeaseError, match="3 bundles of 1 CPU are over the quota"):
        scheduler.grant(LeaseRequest(owner="app", purpose=Purpose.SERVING, count=3, min_count=3))


def test_an_application_gets_as_many_replicas_as_quota_and_room_allow(make, records):
    app = LeaseRequest(owner="app", purpose=Purpose.SERVING, count=9, resources={"CPU": 1.5})
    assert len(make(DictPool(), quotas={"default": {"CPU": 4.6}}).grant(app).leases) == 3
    scheduler = make(DictPool())
    assert len(scheduler.grant(replace(app, owner="other")).leases) == 3, "the first is sure, the head has room for two"
    assert scheduler.grant(replace(app, owner="other", count=0)).leases == ()
    assert len(records.events("lease.released")) == 3


def test_who_waits_has_the_room_before_more_replicas(make):
    scheduler = make(DictPool(), kinds=())
    assert isinstance(scheduler.acquire(ask(2, min_count=2, resources={"CPU": 1.0}), 3.0), Granted)
    three = ask(3, min_count=3, resources={"CPU": 1.0}, owner="waits")
    waits = threading.Thread(target=scheduler.acquire, args=(three, 1.0))
    waits.start()
    while not scheduler.status()["queue"]:
        time.sleep(0.01)
    app = LeaseRequest(owner="app", purpose=Purpose.SERVING, count=3)
    assert len(scheduler.grant(app).leases) == 1
    waits.join()
    assert len(scheduler.grant(app).leases) == 3


def test_a_grant_that_could_not_be_written_down_is_taken_back(make, records, monkeypatch):
    pool = DictPool("reserved")
    scheduler = make(pool)

    def full(events):
        raise StoreError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(records, "append", full)
        with pytest.raises(StoreError):
            scheduler.acquire(ask(1), 5)
    assert pool.asked == {}
    scheduler.sweep()
    assert scheduler.status()["leases"] == [] and scheduler.status()["queue"] == []


def test_status_and_notices_answer_while_many_wait(make):
    pool = DictPool()
    pool.add("")
    scheduler = make(pool, kinds=())
    (first,) = scheduler.acquire(ask(1, owner="first"), 5).leases

    def wait(owner):
        answer = scheduler.acquire(ask(1, owner=owner), 60)
        scheduler.release([x.lease_id for x in answer.leases])

    waiting = [threading.Thread(target=wait, args=(f"g{i}",)) for i in range(8)]
    for each in waiting:
        each.start()
    while len(scheduler.status()["queue"]) < 8:
        time.sleep(0.01)
    assert scheduler.notices("g1") == [] and len(scheduler.leases("first")) == 1
    scheduler.release([first.lease_id])
    for each in waiting:
        each.join()
    assert scheduler.status()["queue"] == [] and pool.asked == {}


def test_when_too_many_wait_the_next_is_told_so_at_once(make, monkeypatch):
    monkeypatch.setattr("raymill.actors.scheduler._MAX_WAITING", 0)
    answer = make(DictPool("reserved")).acquire(ask(1), 60)
    assert isinstance(answer, Queued) and "wait already" in answer.reason


def test_many_gangs_at_once_never_share_a_gpu(make):
    pool = DictPool()
    for _ in range(3):
        pool.add("")
    scheduler, seen = make(pool, kinds=()), []

    def use(owner):
        for _ in range(4):
            answer = scheduler.acquire(ask(2, min_count=1, owner=owner), 0.4)
            if isinstance(answer, Granted):
                seen.append([x["node_id"] for x in scheduler.status()["leases"]])
                scheduler.release([x.lease_id for x in answer.leases])

    gangs = [threading.Thread(target=use, args=(f"g{i}",)) for i in range(4)]
    for each in gangs:
        each.start()
    for each in gangs:
        each.join()
    assert seen and all(len(nodes) == len(set(nodes)) for nodes in seen)
    assert pool.asked == {} and scheduler.status()["leases"] == []
