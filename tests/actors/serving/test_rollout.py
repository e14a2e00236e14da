"""What is served is changed under load: promotion, canaries, roll back, new code."""

import threading
import time
from collections import Counter
from dataclasses import replace

import httpx
import psutil
import pytest

from raymill.actors.endpoint import Placement
from raymill.actors.rollout import Role, Route, reroute
from raymill.runtime.client import Client
from raymill.runtime.errors import ModelError
from raymill.runtime.messages import Stage
from tests.actors.serving.taxi import AT, Load, compiled, spec, trips


def test_promotion_under_load_drops_no_request_and_keeps_the_replica(cluster):
    endpoint, digests, _ = cluster
    before = endpoint.replicas()
    with Load(endpoint.url) as load:
        load.wait_for(500)
        endpoint.set_models([spec(digests, v1=0.5, v2=0.5)])
        load.wait_for(500)
        endpoint.set_models([spec(digests, v2=1.0)])
        load.wait_for(500)
    assert load.errors == []
    assert set(Counter(v for v, _ in load.answers.values())) == {1, 2}
    assert [r.pid for r in endpoint.replicas()] == [r.pid for r in before]
    with Client(endpoint.url) as client:
        assert set(client.predict("taxi", trips(1, 64)).column("version").to_pylist()) == {2}


def test_a_version_that_does_not_load_takes_no_traffic(cluster):
    endpoint, digests, _ = cluster
    before = endpoint.config()["applications"][0]["deployments"][0]["user_config"]["models"]["taxi"]["versions"]
    with Load(endpoint.url) as load:
        load.wait_for(200)
        with pytest.raises(ModelError, match="version 3 of taxi"):
            endpoint.set_models([spec(digests, v3=1.0)])
        load.wait_for(200)
    assert load.errors == []
    assert {str(v) for v, _ in load.answers.values()} == set(before) and "3" not in before
    deployed = endpoint.config()["applications"][0]["deployments"][0]["user_config"]
    assert deployed["models"]["taxi"]["versions"] == before
    assert endpoint.remembered() == endpoint.models(), "not what would come back after a crash"


def test_a_canary_whose_load_ends_the_process_ends_one_and_is_refused_and_live_goes_on(cluster):
    """No replica after the first dies of it, so what is live is back as soon as that one is replaced."""
    endpoint, digests, home = cluster
    [served] = endpoint.models()
    canary = Route(version=4, digest=digests[3], role=Role.CANARY, weight=0.2)
    with Load(endpoint.url) as load:
        load.wait_for(200)
        with pytest.raises(ModelError, match=r"version 4 of taxi: DeadlyModel: .* alone: SIGABRT, at .*code .*line 2"):
            endpoint.set_models([replace(served, routes=(*served.routes, canary))])
        load.wait_for(200)
    assert load.errors == []
    assert {v for v, _ in load.answers.values()} == {r.version for r in served.routes}
    assert len(list((home.loads / digests[3]).glob("*.loading"))) == 1, "more than one process began to load it"
    assert endpoint.models() == endpoint.remembered() == [served]


@pytest.fixture(scope="module")
def bus(cluster):
    """A model whose versions the registry knows: 1 is live; 2 raises, 3 is not finite, 4 is slow, 5 raises again."""
    endpoint, digests, _ = cluster
    endpoint.records.promote("bus", 1, reason="test")
    live = replace(spec(digests, v1=1.0), name="bus", plan=None, canary_weight=0.5)
    endpoint.set_models([spec(digests, v1=1.0), reroute(live, endpoint.records.versions("bus"))])
    return endpoint


def asked(endpoint, until, seconds=30):
    """Answers (status, version) to one caller after the other, until it is so."""
    found = Counter()
    with httpx.Client(base_url=endpoint.url, timeout=30) as http:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, found
            for _ in range(10):
                tensor = {"name": "features", "shape": [1, 2], "datatype": "FP32", "data": [200.0, 1.5]}
                answer = http.post("/v2/models/bus/infer", json={"inputs": [tensor]})
                found[answer.status_code, answer.json().get("model_version")] += 1
    return found


@pytest.mark.parametrize("version, why", [(2, "it errs"), (3, "it errs"), (4, "it is slow")])
def test_a_canary_that_errs_or_is_slow_is_taken_out_and_no_caller_is_told(bus, version, why):
    bus.records.start_canary("bus", version, reason="test")
    assert bus.follow(bus.records, "bus")
    stage = lambda: bus.records.get("bus", version).stage  # noqa: E731
    served = lambda: [r.version for m in bus.models() if m.name == "bus" for r in m.routes]  # noqa: E731
    found = asked(bus, lambda: stage() is Stage.REJECTED and served() == [1])
    assert set(found) <= {(200, "1"), (200, str(version))}
    assert (200, str(version)) not in found or version == 4  # one that fails gives no answer at all
    reason = bus.records.get("bus", version).history[-1]["reason"]
    assert reason.startswith(f"automatic: {why}")


def test_a_promoted_version_that_errs_is_rolled_back_by_itself_and_not_further(bus):
    bus.records.promote("bus", 5, reason="test")
    assert bus.follow(bus.records, "bus")
    found = asked(bus, lambda: bus.records.get("bus", 1).stage is Stage.LIVE)
    assert set(found) <= {(200, "1"), (500, None)}
    assert bus.records.get("bus", 5).stage is Stage.RETIRED
    assert bus.records.get("bus", 5).history[-1]["reason"].startswith("automatic: it errs")
    assert bus.follow(bus.records, "bus")  # the replicas were told already; now all of them have said so
    assert asked(bus, iter([False, True]).__next__) == {(200, "1"): 10}


def test_new_code_comes_up_beside_the_old_and_no_request_is_dropped(cluster):
    """Callers who never retry, on kept connections and new ones, while one replica takes the place of another."""
    endpoint, digests, home = cluster
    before = {r.pid for r in endpoint.replicas() if r.state == "RUNNING"}
    found, ends = Counter(), threading.Event()

    def call(headers):
        with httpx.Client(base_url=endpoint.url, timeout=30) as http:
            while not ends.is_set():
                body = {"rows": [{"trip": 1, "zone": "a", "miles": 1.5}], "at": AT}
                try:
                    answer = http.post("/predict/taxi", json=body, headers=headers)
                    found[answer.status_code] += 1
                except httpx.HTTPError as err:
                    found[repr(err)] += 1

    callers = [threading.Thread(target=call, args=({"connection": "close"} if n % 2 else {},)) for n in range(4)]
    for caller in callers:
        caller.start()
    try:
        endpoint.deploy([spec(digests, v1=1.0)], Placement(env=compiled(home)))
        end = time.monotonic() + 40
        while time.monotonic() < end and any(psutil.pid_exists(pid) for pid in before):
            time.sleep(0.2)
        assert not any(psutil.pid_exists(pid) for pid in before)
    finally:
        ends.set()
        for caller in callers:
            caller.join()
    assert set(found) == {200}
    assert found[200] > 500
    assert httpx.get(endpoint.url + "/raymill/replica").json()["fast_lane"]["open"]
