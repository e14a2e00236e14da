"""`raymill serve` as a user types it: on a bare machine, models beside each other, away with Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import psutil
import pytest
import xgboost

from raymill.cluster.ports import picker
from raymill.cluster.processes import SESSION_MARK, marked

pytestmark = pytest.mark.soak

X = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
CALLABLE = "def ask(x):\n    return x.sum(axis=1)\n"


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user's folder with files, and `raymill` called there."""
    monkeypatch.chdir(tmp_path)
    data = xgboost.DMatrix(X, X[:, 0] > 0, feature_names=["a", "b", "c"])
    for name, trees in (("one", 2), ("two", 4)):
        xgboost.train({"objective": "binary:logistic", "nthread": 1}, data, trees).save_model(f"{name}.ubj")
    (tmp_path / "mine.py").write_text(CALLABLE)
    env = os.environ | {"RAYMILL_HOME": str(tmp_path / "mill"), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", "from raymill.jobs.cli.main import main; main()"]

    def raymill(*words, wait=True):
        started = subprocess.Popen([*command, *words], env=env, stdout=subprocess.PIPE, text=True)
        return started.communicate(timeout=120)[0] if wait else started

    yield raymill
    raymill("down")


def test_a_user_serves_files_and_code_from_nothing_and_ctrl_c_takes_all_of_it_away(user, tmp_path):
    port = picker()(1)
    first = user("serve", "one.ubj", "--port", str(port), "--json", wait=False)
    told = json.loads("".join(iter(first.stdout.readline, "}\n")) + "}")
    booster = xgboost.Booster(model_file="one.ubj")
    with httpx.Client(base_url=told["url"]) as client:
        rows = [dict(zip("abc", map(float, row), strict=True)) for row in X[:50]]
        answers = client.post("/predict/one", json={"rows": rows}).json()["predictions"]
        assert np.allclose([a["prediction"] for a in answers], booster.inplace_predict(X[:50]), atol=1e-7)
        assert client.post("/predict/one", json={"rows": [{"a": 1}]}).status_code == 422

        assert json.loads(user("serve", "two.ubj", "--name", "one", "--json"))["stage"] == "canary"
        assert json.loads(user("promote", "one", "2", "--json"))["version"] == 2
        assert json.loads(user("serve", "mine:ask", "--features", "3", "--json"))["version"] == 1
        after = client.post("/predict/one", json={"rows": rows}).json()
        newer = xgboost.Booster(model_file="two.ubj").inplace_predict(X[:50])
        assert after["version"] == 2
        assert np.allclose([a["prediction"] for a in after["predictions"]], newer, atol=1e-7)
        tensor = {"name": "features", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
        assert client.post("/v2/models/ask/infer", json={"inputs": [tensor]}).json()["outputs"][0]["data"] == [6.0]
        lineage = client.get(f"/raymill/lineage/{after['predictions'][0]['id']}").json()
        assert lineage["version"]["kind"] == "xgboost" and lineage["prediction"]["version"] == 2

        assert json.loads(user("unserve", "one", "--json"))["served"] == ["ask"]
        gone = client.post("/predict/one", json={"rows": rows})
        assert (gone.status_code, gone.json()["code"]) == (404, "unknown_model")
        assert client.post("/v2/models/ask/infer", json={"inputs": [tensor]}).status_code == 200
        assert json.loads(user("serve", "two.ubj", "--name", "one", "--json"))["stage"] == "live"
        assert client.post("/predict/one", json={"rows": rows}).json()["predictions"][0]["prediction"] == pytest.approx(
            float(newer[0]), abs=1e-7
        )
        assert [json.loads(user("unserve", name, "--json"))["served"] for name in ("ask", "one")] == [["one"], []]
        assert json.loads(user("serve", "one.ubj", "--name", "new", "--json"))["version"] == 1
        assert client.post("/predict/new", json={"rows": rows}).status_code == 200
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 0
    end_s = time.monotonic() + 10
    while marked(SESSION_MARK, str(tmp_path / "mill")) and time.monotonic() < end_s:
        time.sleep(0.2)
    left = [psutil.Process(p.pid).cmdline() for p in marked(SESSION_MARK, str(tmp_path / "mill"))]
    assert not left


def test_what_was_served_comes_back_after_a_crash_of_everything_and_not_after_down(user, tmp_path):
    port = picker()(1)
    told = json.loads(user("serve", "one.ubj", "--port", str(port), "--detach", "--json"))
    assert json.loads(user("serve", "two.ubj", "--name", "one", "--json"))["stage"] == "canary"
    assert json.loads(user("promote", "one", "2", "--json"))["version"] == 2
    ours = [psutil.Process(p.pid) for p in marked(SESSION_MARK, str(tmp_path / "mill"))]
    for process in ours:
        process.kill()
    psutil.wait_procs(ours, timeout=20)

    up = json.loads(user("up", "--ports", "auto", "--json"))
    assert up["served_again"] == ["one"]
    rows = [dict(zip("abc", map(float, row), strict=True)) for row in X[:50]]
    answer = httpx.post(f"{up['serve_url']}/predict/one", json={"rows": rows}).json()
    booster = xgboost.Booster(model_file="two.ubj")
    assert answer["version"] == 2 and told["version"] == 1
    assert np.allclose([a["prediction"] for a in answer["predictions"]], booster.inplace_predict(X[:50]), atol=1e-7)
    assert json.loads(user("up", "--json"))["served_again"] == []

    user("down")
    assert json.loads(user("up", "--ports", "auto", "--json"))["served_again"] == []
