"""The notebook's client: an environment with pyarrow, httpx and pydantic alone asks a live endpoint."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.loop.conftest import Host, last_document

NEEDED = ("pyarrow", "httpx", "pydantic")
LOCK = Path(__file__).parents[2] / "requirements.lock"
NO_NETWORK = ("ConnectionError", "NewConnectionError", "name resolution", "timed out", "No matching distribution")


@pytest.fixture(scope="module")
def notebook(wheel: Path, tmp_path_factory) -> Path:
    """Python of an environment with what the client needs, in the versions of the lock, and the wheel."""
    folder = tmp_path_factory.mktemp("notebook")
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    python = folder / "venv" / "bin" / "python"
    pinned = re.findall(rf"^(?:{'|'.join(NEEDED)})==\S+$", LOCK.read_text(), re.MULTILINE)
    assert len(pinned) == len(NEEDED)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--retries", "1"]
    done = subprocess.run([*pip, "-c", str(LOCK), *pinned], capture_output=True, text=True, timeout=240, check=False)
    if done.returncode and any(word in done.stderr for word in NO_NETWORK):
        pytest.skip(f"LOUD: pip reaches no package index, the notebook's client is not tested: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True, timeout=60)
    return python


@pytest.fixture(scope="module")
def told(notebook: Path, served: dict, host: Host) -> dict:
    """What a notebook got from the live endpoint."""
    url = host.document("status")["cluster"]["serve_url"]
    env = {"PATH": os.environ["PATH"], "HOME": host.env["HOME"], "RAYMILL_URL": url, "MODEL": served["pipeline"]}
    done = subprocess.run(
        [notebook, "-c", NOTEBOOK], cwd=host.env["HOME"], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return last_document(done.stdout)


NOTEBOOK = """
import json, os, sys
from importlib.util import find_spec
from raymill.runtime import RaymillError, connect
model = os.environ["MODEL"]
moment = "2020-03-24T12:00:00Z"
usual = {"placed_at": moment, "price": 1.5, "noise": 0.1}
rows = [{**usual, "order": f"n{i}", "shop": f"shop{i}", "weight": 0.5 * i} for i in range(3)]
with connect() as client:
    answers = client.predict(model, rows, at=moment)
    again = client.predict(model, rows, at=moment, ids=answers.column("id").to_pylist())
    vectors = client.features(model, rows, at=moment)
    told = {
        "answers": answers.to_pylist(),
        "again": again.to_pylist(),
        "features": vectors.column_names,
        "kinds": [type(x).__name__ for x in (answers, vectors)],
        "models": client.models(model),
        "drift": client.drift(model),
        "cost": client.cost(),
        "status": client.status(),
        "lineage": client.lineage(answers.column("id")[0].as_py()),
        "catalogue": client.catalogue(column="orders-free.returned"),
        "feature": client.feature("shop.rate_7d"),
        "breaks": client.feature_lineage(column="orders-free.returned")["breaks"],
        "freshness": client.freshness(model),
        "consistency": client.consistency(model),
    }
    errors = {}
    for what, ask in {
        "model": lambda: client.predict("none", rows),
        "entity": lambda: client.predict(model, [{**rows[0], "shop": "nowhere"}], at=moment),
        "column": lambda: client.predict(model, [{"order": "n1"}], at=moment),
        "prediction": lambda: client.lineage("none"),
        "feature": lambda: client.feature("none"),
    }.items():
        try:
            ask()
        except RaymillError as error:
            errors[what] = type(error).__name__
heavy = ("ray", "torch", "numpy", "deepspeed")
told["errors"] = errors
told["loaded"] = [m for m in heavy if m in sys.modules]
told["there"] = [m for m in heavy if find_spec(m)]
print(json.dumps(told, default=str))
"""


def test_neither_ray_nor_torch_nor_numpy_is_there_or_needed(told):
    assert told["there"] == [] and told["loaded"] == []


def test_predictions_come_as_arrow_and_the_same_ids_get_the_same_answers(told):
    assert told["kinds"] == ["Table", "Table"]
    assert told["again"] == told["answers"] and len(told["answers"]) == 3
    assert all(0 <= a["p"] <= 1 and a["version"] >= 1 for a in told["answers"])


def test_feature_vectors_have_a_column_a_feature(told):
    assert {"id", "at", "order.price", "shop.rate_7d"} <= set(told["features"])


def test_models_drift_cost_and_status_are_those_of_the_run(told, served):
    assert {v["version"]: v["stage"] for v in told["models"]} == {v["version"]: v["stage"] for v in served["versions"]}
    assert isinstance(told["drift"], list) and told["status"]["nodes"]
    assert sum(told["cost"]["parts"].values()) == pytest.approx(told["cost"]["bill_usd"], abs=1e-9)


def test_lineage_leads_from_a_prediction_just_made_to_its_training(told):
    assert "shop.rate_7d" in json.dumps(told["lineage"]) and len(told["lineage"]["steps"]) >= 4


def test_features_come_with_their_statistics_users_freshness_and_checks(told, served):
    (feature,) = told["catalogue"]
    assert feature["name"] == "shop.rate_7d" and feature["answering"] == told["breaks"] == [f"{served['pipeline']}/2"]
    (version,) = [v for v in told["feature"] if served["pipeline"] in v["pipelines"]]
    assert version["statistics"]["training"]["null_share"] == 0 and version["statistics"]["online"]["rows"] == 2000
    (fresh,) = told["freshness"]
    assert fresh["views"][0]["behind_s"] == 0
    assert {c["alert"] for c in told["consistency"]} == {False}


def test_errors_arrive_as_our_own(told):
    assert told["errors"] == {
        "model": "UnknownModel",
        "entity": "UnknownEntity",
        "column": "ContractError",
        "prediction": "UnknownPrediction",
        "feature": "UnknownFeature",
    }
