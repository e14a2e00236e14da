"""The endpoint loses its replica, has none, has too few: nothing is lost or doubled, and who must wait is told."""

import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import grpc
import httpx
import numpy as np
import psutil
import pytest

from benchmarks.open_loop import OpenLoop
from raymill.actors import oip
from raymill.actors import open_inference_pb2 as pb
from raymill.actors.autoscaling import autoscaling_config
from raymill.actors.endpoint import Placement
from raymill.actors.grpc_service import SERVICE
from raymill.actors.lake import Lake
from raymill.actors.rollout import reroute
from raymill.actors.scaling import Scaling
from raymill.runtime.client import Client
from tests.actors.serving.taxi import Load, compiled, spec, trips, wait_until


def logged(home):
    rows = Lake(home.lake).read("predictions", columns=["id", "version", "p", "key", "at", "role"])
    return rows.to_pylist()


def test_kill_9_under_retrying_clients_loses_and_doubles_nothing_and_answered_ids_keep_their_answers(cluster):
    """One kill for both: what is answered under load, and eight ids asked again over the kill and then a promotion."""
    endpoint, digests, home = cluster
    endpoint.set_models([spec(digests, v1=0.7, v2=0.3)])
    ids = [f"kept{i}" for i in range(8)]
    with Client(endpoint.url) as client, Load(endpoint.url) as load:
        first = client.predict("taxi", trips(1, 8), ids=ids)
        load.wait_for(500)
        victim = next(r for r in endpoint.replicas() if r.state == "RUNNING")
        os.kill(victim.pid, signal.SIGKILL)
        assert client.predict("taxi", trips(1, 8), ids=ids).equals(first)
        load.wait_for(500)
    assert load.errors == []  # what was under way was sent again, by the proxy or by the clients
    assert victim.pid not in {r.pid for r in endpoint.replicas() if r.state == "RUNNING"}
    endpoint.flush()
    found = logged(home)
    assert max(Counter(r["id"] for r in found).values()) == 1
    by_id = {r["id"]: (r["version"], r["p"]) for r in found}
    assert all(by_id[i] == answer for i, answer in load.answers.items())
    endpoint.set_models([spec(digests, v2=1.0)])
    with Client(endpoint.url) as client:
        assert client.predict("taxi", trips(1, 8), ids=ids).equals(first)


def test_requests_that_come_while_no_replica_runs_are_held_and_answered(cluster):
    endpoint, digests, home = cluster
    scaling = Scaling(fewest=0, most=1, p99_s=0.05, idle_s=0.5)
    placement = Placement(env=compiled(home), autoscaling=autoscaling_config(scaling, None))
    endpoint.deploy([spec(digests, v1=1.0)], placement)
    wait_until(lambda: not endpoint.replicas())
    refused = httpx.post(f"{endpoint.url}/predict/taxi", headers={"x-forwarded-for": "192.0.2.1"}, json={"rows": []})
    assert (refused.status_code, refused.json()["code"]) == (403, "closed")  # the fallback proxy asks the door, too
    with grpc.insecure_channel(endpoint.grpc_url) as channel, pytest.raises(grpc.RpcError) as caught:
        infer_by_grpc(channel, ["kept out"], metadata=(("x-forwarded-for", "192.0.2.1"),))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    time.sleep(1)
    assert not endpoint.replicas(), "who may not ask wakes nobody"
    found = Counter()

    def call(n):
        ids = [f"held{n}.{i}" for i in range(4)]
        if n % 3:
            with Client(endpoint.url) as client:
                answer = client.predict("taxi", trips(n, 4), ids=ids).to_pylist()
                found[tuple(r["id"] for r in answer) == tuple(ids), answer[0]["version"]] += 1
        else:
            with grpc.insecure_channel(endpoint.grpc_url) as channel:
                answer = infer_by_grpc(channel, ids)
                found[answer.id == ids[0], int(answer.model_version)] += 1

    callers = [threading.Thread(target=call, args=(n,)) for n in range(30)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == {(True, 1): 30}


def infer_by_grpc(channel, ids, **asked):
    request = pb.ModelInferRequest(model_name="taxi", id=ids[0])
    request.inputs.add(name=oip.INPUT, datatype="FP32", shape=(4, 2))
    request.raw_input_contents.append(np.ones((4, 2), "<f4").tobytes())
    ask = channel.unary_unary(
        f"/{SERVICE}/ModelInfer",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=pb.ModelInferResponse.FromString,
    )
    return ask(request, timeout=90, **asked)


def alone(cluster, name, **changes):
    """Have one replica serve this model only, of ready vectors; one that runs stays."""
    endpoint, digests, home = cluster
    endpoint.records.promote(name, 1, reason="test")
    live = replace(spec(digests, v1=1.0), name=name, plan=None, **changes)
    endpoint.deploy([reroute(live, endpoint.records.versions(name))], Placement(env=compiled(home)))


def refused(endpoint, model, tries=200):
    """The first answer that is none, of callers who come one after the other."""
    body = {"inputs": [{"name": "features", "shape": [1, 2], "datatype": "FP32", "data": [0.5, 0.0]}]}
    with httpx.Client(base_url=endpoint.url, timeout=30) as http:
        for _ in range(tries):
            answer = http.post(f"/v2/models/{model}/infer", json=body)
            if answer.status_code != 200:
                return answer
    raise AssertionError("nobody was refused")


def loaded(endpoint, rate, folder):
    """Goodput at this rate, how others failed, and the answer to one who was refused (at the overload).

    Counted from when the load shows: some are answered (its process has to start), or somebody is told to come again.
    """
    x = np.column_stack([np.arange(64) / 64, np.zeros(64)]).astype(np.float32)
    replica = psutil.Process(next(r.pid for r in endpoint.replicas() if r.state == "RUNNING"))
    requests = lambda: httpx.get(endpoint.url + "/raymill/replica").json()["fast_lane"]["requests"]  # noqa: E731
    load, sent_before = OpenLoop(endpoint.url, "slow", x, {1: x[:, 0]}, rate), requests()
    load.start(folder)
    wait_until(lambda: requests() > sent_before + rate)
    told = refused(endpoint, "slow") if rate > 100 else None
    before, begun = replica.memory_info().rss, time.monotonic()
    while time.monotonic() < begun + 3:
        assert httpx.get(endpoint.url + "/v2/health/ready", timeout=30).status_code == 200
        time.sleep(0.1)
    end = time.monotonic()
    assert replica.memory_info().rss - before < 100 << 20
    sent = load.stop().between(begun, end)
    failures = {reason.partition(" ")[0] for reason in sent.failures}
    return np.count_nonzero(sent.latency_s <= 0.6) / (end - begun), failures, told


def test_at_ten_times_the_load_as_many_are_answered_in_time_and_the_rest_told_to_come_again(cluster, tmp_path):
    """A model of some 100 rows a second, asked 70 and 1,000 times a second.

    The two are measured one after the other, on cores that others may use during one of them: up to three pairs, of
    which one has to show that as many are answered. All else has to hold in each.
    """
    endpoint, _, _ = cluster
    alone(cluster, "slow", p99_ms=300.0, max_batch_rows=4)
    pairs = []
    while len(pairs) < 3 and not any(over >= 0.6 * under > 0 for under, over in pairs):
        under, few, _ = loaded(endpoint, 70, tmp_path / f"under{len(pairs)}")
        over, most, told = loaded(endpoint, 1000, tmp_path / f"over{len(pairs)}")
        assert few <= most == {"429"}  # on cores that others use 70 may be too many, too
        assert (told.status_code, told.json()["code"]) == (429, "overloaded")
        assert 1 <= int(told.headers["retry-after"]) <= 30
        pairs.append((under, over))
    assert any(over >= 0.6 * under > 0 for under, over in pairs), pairs
    assert httpx.get(endpoint.url + "/v2/models/slow/ready", timeout=30).json() == {"name": "slow", "ready": True}


def test_a_model_that_raises_on_every_call_is_not_ready(cluster):
    endpoint, _, _ = cluster
    alone(cluster, "ill")
    assert httpx.get(endpoint.url + "/v2/health/ready").status_code == 200
    body = {"inputs": [{"name": "features", "shape": [1, 2], "datatype": "FP32", "data": [200.0, 0.0]}]}
    for _ in range(20):
        assert httpx.post(endpoint.url + "/v2/models/ill/infer", json=body).status_code == 500
    assert httpx.get(endpoint.url + "/v2/health/ready").status_code == 400
    assert httpx.get(endpoint.url + "/v2/models/ill/ready").json() == {"name": "ill", "ready": False}
    assert httpx.get(endpoint.url + "/v2/health/live").status_code == 200


@pytest.mark.soak
def test_replicas_come_with_the_load_and_go_with_it_and_no_request_fails(cluster):
    endpoint, digests, home = cluster
    scaling = Scaling(fewest=1, most=2, p99_s=0.002, cooldown_s=2.0)  # few callers are many
    placement = Placement(env=compiled(home), autoscaling=autoscaling_config(scaling, None))
    endpoint.deploy([spec(digests, v1=1.0)], placement)

    def running():
        return sum(r.state == "RUNNING" for r in endpoint.replicas())

    with Load(endpoint.url, clients=4) as load:
        wait_until(lambda: running() == 2)
        endpoint.set_models([spec(digests, v2=1.0)])
        assert running() == 2, "a change of versions keeps the number"
    assert load.errors == [] and load.retried == 0
    with Load(endpoint.url, clients=1, rows=1, pause_s=0.2) as load:
        wait_until(lambda: running() == 1)
    assert load.errors == [] and load.retried == 0
