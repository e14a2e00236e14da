"""Answers of the endpoint on a real Serve behind its own proxy, deployed by REST; what is counted."""

import json
import subprocess
import sys
import time
import venv
from pathlib import Path

import httpx
import numpy as np
import pytest

from raymill.runtime.client import Client
from tests.actors.serving.taxi import AT, counted, wait_until

pytestmark = pytest.mark.usefixtures("triton_install")  # so that it is under way while the cluster starts


def test_a_row_gets_its_features_and_the_live_version(cluster):
    endpoint, _, _ = cluster
    with Client(endpoint.url) as client:
        answer = client.predict("taxi", [{"trip": 7, "zone": "a", "miles": 1.5}], at=AT, ids=["first"]).to_pylist()
        features = client.features("taxi", [{"trip": 7, "zone": "a", "miles": 1.5}], at=AT).to_pylist()
        aged = client.features("taxi", [{"trip": 7, "zone": "a", "miles": 1.5}], at=AT, ages=True).to_pylist()[0]
        unseen = client.features("taxi", [{"trip": 8, "zone": "?", "miles": 1.5}], at=AT, ages=True).to_pylist()[0]
    assert aged.pop("age_us:zone") > 0 and aged.pop("id") and {**aged, "id": features[0]["id"]} == features[0]
    assert (unseen["age_us:zone"], unseen["trip.miles"]) == (None, 1.5)
    assert (features[0]["zone.miles_1d"], features[0]["trip.miles"]) == (2.0, 1.5)
    assert (answer[0]["id"], answer[0]["version"]) == ("first", 1)
    assert answer[0]["p"] == pytest.approx(0.1 + 0.001 * np.tanh(3.5), abs=1e-6)


def fast_lane_of(endpoint):
    return httpx.get(endpoint.url + "/raymill/replica").json()["fast_lane"]


def test_the_fast_lane_is_open_and_serves_own_counters_count_it(cluster):
    endpoint, _, _ = cluster

    def comes_by_the_fast_lane():
        before = fast_lane_of(endpoint)["requests"]
        httpx.post(endpoint.url + "/predict/taxi", json={"rows": [{"trip": 0, "zone": "a", "miles": 1.5}], "at": AT})
        return fast_lane_of(endpoint)["requests"] > before

    wait_until(comes_by_the_fast_lane)  # for a moment after the first deploy the proxy knows Serve's fallback alone
    state = fast_lane_of(endpoint)
    assert (state["open"], state["reason"]) == (True, "")
    names = ("serve_num_http_requests_total", "serve_deployment_request_counter_total")
    before = [counted(endpoint, name) for name in names]
    errors = counted(endpoint, "serve_num_http_error_requests_total")
    with httpx.Client(base_url=endpoint.url) as http:
        for n in range(300):
            row = {"trip": n, "zone": "a", "miles": 1.5}
            assert http.post("/predict/taxi", json={"rows": [row], "at": AT}).status_code == 200
            assert n % 10 or http.post("/predict/taxi", json={"rows": []}).status_code == 400
    assert fast_lane_of(endpoint)["requests"] >= state["requests"] + 330
    end = time.monotonic() + 30  # Ray's agent hands counters on every few seconds
    while time.monotonic() < end and counted(endpoint, names[0]) < before[0] + 330:
        time.sleep(0.5)
    assert [counted(endpoint, name) - b >= 330 for name, b in zip(names, before, strict=True)] == [True, True]
    assert counted(endpoint, "serve_num_http_error_requests_total") - errors == 30
    gauges = httpx.get(endpoint.metrics_url).text
    assert "raymill_version_batch_rows{" in gauges and "raymill_queue_delay_seconds{" in gauges


def test_open_inference_protocol_answers_through_the_proxy(cluster):
    endpoint, _, _ = cluster
    with httpx.Client(base_url=endpoint.url) as http:
        assert http.get("/v2/health/ready").json() == {"ready": True}
        assert http.get("/v2/models/taxi/versions/1/ready").json() == {"name": "taxi", "ready": True}
        tensor = {"name": "features", "shape": [1, 2], "datatype": "FP32", "data": [2.0, 1.5]}
        document = http.post("/v2/models/taxi/infer", json={"id": "q", "inputs": [tensor]}).json()
        assert http.post("/v2/models/taxi/infer", json={"inputs": []}).status_code == 400
    assert (document["model_version"], document["id"]) == ("1", "q")
    assert document["outputs"][0]["data"] == [pytest.approx(0.1 + 0.001 * np.tanh(3.5), abs=1e-6)]


@pytest.fixture(scope="session")
def triton_install(tmp_path_factory):
    """An environment that gets tritonclient, which wants another protobuf than Ray: its Python, and pip at work."""
    folder = tmp_path_factory.mktemp("triton")
    venv.create(folder, symlinks=True, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    command = [*pip, "tritonclient[grpc,http]==2.73.0"]
    installing = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    yield folder / "bin" / "python", installing
    installing.kill()
    installing.wait()


@pytest.fixture
def triton(triton_install):
    """Python of that environment."""
    python, installing = triton_install
    _, told = installing.communicate(timeout=200)
    if installing.returncode and "ConnectionError" in told:
        pytest.skip(f"LOUD: pip reaches no package index, tritonclient is not tested: {told[-300:]}")
    assert installing.returncode == 0, told
    return python


def test_tritonclient_gets_the_same_over_http_and_grpc(cluster, triton):
    endpoint, _, _ = cluster
    script = Path(__file__).with_name("triton_client.py")
    urls = [endpoint.url.removeprefix("http://"), endpoint.grpc_url]
    done = subprocess.run([triton, script, *urls, "taxi"], capture_output=True, text=True, timeout=60, env={})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["http"]["p"] == told["grpc"]["p"] and len(told["http"]["p"]) == 3
    for answers in told.values():
        assert (answers["live"], answers["ready"], answers["model_ready"]) == (True, True, True)
        assert (answers["server"], answers["inputs"], answers["id"]) == ("raymill", ["features"], "mine")
        assert "there is no model 'bus'" in answers["no_model"] and "version 9" in answers["no_version"]
        assert "takes [rows, 2]" in answers["narrow"]
    names = ("serve_num_grpc_requests_total", "serve_num_grpc_error_requests_total")
    end = time.monotonic() + 30
    while time.monotonic() < end and [counted(endpoint, n, "GRPCInferenceService") for n in names] != [4, 3]:
        time.sleep(0.5)
    assert [counted(endpoint, n, "GRPCInferenceService") for n in names] == [4, 3]  # Serve's health checks beside
