"""What bad input gets: one clear error with its remedy, an exit code, no trace; and the endpoint goes on serving.

The last file of the folder: its end takes the shared cluster down, to ask the verbs again without one.
"""

import fcntl
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from raymill.cluster.spec import DEFAULT_CONFIG
from tests.loop.conftest import PIPELINES, RAYMILL, Host

SHOP = str(PIPELINES / "drifting.py")
MOMENT = "2020-03-24T12:00:00Z"
ROW = {"order": "w1", "placed_at": MOMENT, "shop": "shop1", "price": 1.5, "weight": 0.5, "noise": 0.1}
SMALL = """
from raymill.runtime import *
source = Source("s", key=["k"], time="t", schema={"k": Col("string"), "t": Col("timestamp"), "y": Col("float64")})
pipeline = Pipeline(
    "small",
    views=[FeatureView("v", source, entity="k", features={"f": col("y").mean("7d")})],
    label=Label("late", source, col("y") > 1),
    train=Train(lambda n: None),
    monitor=Monitor(cost=Cost(missed=1, false_alarm=1)),
)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Host:
    """A host on which nothing was ever started."""
    return Host(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def url(host: Host, served: dict) -> str:
    """The live endpoint."""
    return str(host.document("status")["cluster"]["serve_url"])


def refused(host: Host, *words: str, code: int, **env: str) -> dict:
    """The one document on stdout of a verb that fails; the error stands on stderr too, without a trace."""
    done = host.raymill(*words, "--json", code=code, **env)
    told = json.loads(done.stdout)
    assert set(told) == {"error", "code", "remedy"} and all(told.values()), told
    assert "Traceback" not in done.stderr + done.stdout and told["error"].splitlines()[0] in done.stderr
    return told


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Runs verbs whose order is all the same two at a time, ahead of the tests of what they said."""
    with ThreadPoolExecutor(2) as made:
        yield made


WRONG_FILES = {
    "syntax": ("pipeline = Pipeline(", "SyntaxError"),
    "nothing in it": ("x = 1", "exactly one Pipeline"),
    "unknown column": (SMALL.replace('col("y").mean', 'col("z").mean'), "z"),
    "unknown field": (SMALL.replace("key=", "keys="), "keys"),
    "unknown label column": (SMALL.replace('col("y") > 1', 'col("nix") > 1'), "nix"),
    "wrong span": (SMALL.replace('"7d"', '"7 parsecs"'), "parsecs"),
    "own error": ("import nothing_of_that_name", "nothing_of_that_name"),
}


def test_the_file_that_the_others_spoil_is_right(bare: Host, tmp_path: Path):
    (tmp_path / "mine.py").write_text(SMALL)
    assert bare.document("plan", str(tmp_path / "mine.py"))["pipeline"] == "small"


@pytest.fixture(scope="module")
def wrong_plans(bare: Host, pool: ThreadPoolExecutor, tmp_path_factory) -> dict[str, Future[dict]]:
    """What `plan` says of each wrong file."""
    found = {}
    for what, (text, _) in WRONG_FILES.items():
        file = tmp_path_factory.mktemp("wrong") / "mine.py"
        file.write_text(text)
        found[what] = pool.submit(refused, bare, "plan", str(file), code=2)
    return found


@pytest.mark.parametrize("what", WRONG_FILES)
def test_a_wrong_pipeline_file_is_refused_with_its_fault_named(wrong_plans: dict[str, Future[dict]], what: str):
    told, (_, named) = wrong_plans[what].result(), WRONG_FILES[what]
    assert told["code"] == "spec_error" and named in told["error"] and "mine.py" in told["error"]


def test_run_refuses_a_wrong_or_missing_file_before_anything_starts(bare: Host, tmp_path: Path):
    assert "no pipeline file" in refused(bare, "run", str(tmp_path / "none.py"), code=2)["error"]
    (tmp_path / "mine.py").write_text(SMALL.replace('col("y").mean', 'col("z").mean'))
    refused(bare, "run", str(tmp_path / "mine.py"), code=2)
    assert not bare.home.exists()


def config(folder: Path, *changes: tuple[str, str]) -> str:
    """The demo's cluster.toml with replacements."""
    text = DEFAULT_CONFIG.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "cluster.toml").write_text(text)
    return str(folder / "cluster.toml")


def test_a_busy_port_is_named_with_its_holder_and_nothing_is_left(bare: Host, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = iter(range(20_811, 20_820))
        ports = [(f"= {p}\n", f"= {next(free)}\n") for p in (6379, 8265, 9000)]
        port = taken.getsockname()[1]
        told = refused(bare, "up", "--config", config(tmp_path, *ports, ("= 8000\n", f"= {port}\n")), code=1)
    assert told["code"] == "cluster_error" and f"port {port} (serve) is held by pid {os.getpid()}" in told["error"]
    assert running(bare) == []


@pytest.mark.parametrize("verb", ["up", "run"])
def test_a_machine_that_is_too_small_is_told_what_is_short(bare: Host, tmp_path: Path, verb: str):
    wanted = config(tmp_path, ("object_store_mb = 1000", "object_store_mb = 90000000"))
    words = ["up", "--ports", "auto", "--config", wanted] if verb == "up" else ["run", SHOP, "--cluster", wanted]
    told = refused(bare, *words, code=1)
    assert told["code"] == "cluster_error" and "memory: " in told["error"] and "MB needed" in told["error"]
    assert running(bare) == []


def test_a_wrong_cluster_file_is_refused_with_the_field_named(bare: Host, tmp_path: Path):
    told = refused(bare, "up", "--config", config(tmp_path, ("isolate =", "insulate =")), code=2)
    assert "provider.insulate" in told["error"]
    assert "none.toml" in refused(bare, "plan", SHOP, "--cluster", str(tmp_path / "none.toml"), code=2)["error"]


NOTHING_RAN = {
    "models": ["models"],
    "drift": ["drift"],
    "cost": ["cost"],
    "lineage": ["lineage", "--prediction", "x"],
    "report": ["report"],
    "promote": ["promote", "m", "1"],
}
UNREADABLE = ["{", "7", "[1]", "@/none.json"]


@pytest.fixture(scope="module")
def on_a_bare_host(bare: Host, pool: ThreadPoolExecutor) -> dict[str, Future[dict]]:
    """What the verbs say there, and `predict` of rows that it can not read."""
    found = {verb: pool.submit(refused, bare, *words, code=1) for verb, words in NOTHING_RAN.items()}
    return found | {rows: pool.submit(refused, bare, "predict", "m", rows, code=2) for rows in UNREADABLE}


@pytest.mark.parametrize("verb", NOTHING_RAN)
def test_a_home_on_which_nothing_ran_says_what_to_do_first(on_a_bare_host: dict[str, Future[dict]], verb: str):
    told = on_a_bare_host[verb].result()
    assert told["code"] == "unavailable" and "raymill " in told["error"]


def test_a_dead_endpoint_is_one_error(bare: Host):
    with socket.socket() as free:  # bound, so that nobody else takes it, and not listening
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        told = refused(bare, "predict", "m", "{}", "--url", url, code=1)
    assert told["code"] == "unavailable" and url in told["error"]


@pytest.mark.parametrize("rows", UNREADABLE)
def test_rows_that_can_not_be_read_are_refused_before_they_are_sent(on_a_bare_host: dict[str, Future[dict]], rows: str):
    assert on_a_bare_host[rows].result()["code"] == "request_error"


def body(**changes: object) -> str:
    """A request of one row; None takes a column away."""
    row = {k: v for k, v in (ROW | changes).items() if v is not None}
    return json.dumps({"rows": [row], "at": MOMENT})


MODEL = "/predict/returns-free"
ARROW = {"content-type": "application/vnd.apache.arrow.stream"}
BAD_REQUESTS = {
    "no JSON": ("POST", MODEL, '{"rows": [', 400, "request_error"),
    "empty body": ("POST", MODEL, "", 400, "request_error"),
    "no rows": ("POST", MODEL, '{"row": []}', 400, "request_error"),
    "a row that is a list": ("POST", MODEL, '{"rows": [[1]]}', 400, "request_error"),
    "missing column": ("POST", MODEL, body(price=None), 422, "contract_error"),
    "strange column": ("POST", MODEL, body(colour="red"), 422, "contract_error"),
    "text for a number": ("POST", MODEL, body(price="dear"), 422, "contract_error"),
    "number for a text": ("POST", MODEL, body(shop=7), 422, "contract_error"),
    "an id that is a list": ("POST", MODEL, body(id=[1]), 400, "request_error"),
    "no moment": ("POST", MODEL, json.dumps({"rows": [ROW], "at": "yesterday"}), 422, "contract_error"),
    "unknown entity": ("POST", MODEL, body(shop="nowhere"), 422, "unknown_entity"),
    "unknown model": ("POST", "/predict/none", body(), 404, "unknown_model"),
    "too many rows": ("POST", MODEL, json.dumps({"rows": [{}] * 65_537}), 413, "too_large"),
    "too large": ("POST", MODEL, b" " * ((64 << 20) + 1), 413, "too_large"),
    "GET of a POST": ("GET", MODEL, None, 405, "wrong_method"),
    "POST of a GET": ("POST", "/raymill/models", "", 405, "wrong_method"),
    "no such path": ("GET", "/nowhere", None, 404, "no_such_path"),
    "models of an unknown one": ("GET", "/raymill/models?model=none", None, 404, "unknown_model"),
    "drift of an unknown one": ("GET", "/raymill/drift?model=none", None, 404, "unknown_model"),
    "unknown prediction": ("GET", "/raymill/lineage/none", None, 404, "unknown_prediction"),
    "open inference, no JSON": ("POST", "/v2/models/returns-free/infer", "{", 400, "request_error"),
    "open inference, unknown version": ("GET", "/v2/models/returns-free/versions/99", None, 404, "unknown_version"),
    "open inference, unknown model": ("GET", "/v2/models/none", None, 404, "unknown_model"),
}


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_a_bad_request_gets_4xx_with_error_code_and_remedy(url: str, what: str):
    method, path, content, status, code = BAD_REQUESTS[what]
    answer = httpx.request(method, url + path, content=content, timeout=30)
    told = answer.json()
    assert (answer.status_code, told["code"]) == (status, code), told
    assert set(told) == {"error", "code", "remedy"} and all(told.values())


def test_a_stream_that_is_no_arrow_gets_400(url: str):
    answer = httpx.post(url + MODEL, content=b"\x00" * 99, headers=ARROW, timeout=30)
    assert (answer.status_code, answer.json()["code"]) == (400, "request_error")


def test_curl_is_answered_before_and_after_a_thousand_bad_requests_by_the_same_replica(url: str):
    def ask() -> float:
        command = ["curl", "-sf", "-d", body(id="curl-1"), url + MODEL]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["predictions"][0]["returned"]

    before, p = httpx.get(f"{url}/raymill/replica").json(), ask()
    with httpx.Client(base_url=url) as client:
        codes = {client.post(MODEL, content=body(price="x" * n)).status_code for n in range(1000)}
    after = httpx.get(f"{url}/raymill/replica").json()
    assert codes == {422} and ask() == p and 0 <= p <= 1
    assert (after["replica"], after["pid"]) == (before["replica"], before["pid"])


REFUSED_WORDS = {
    "predict": (["predict", "none", json.dumps(ROW)], 2, "unknown_model"),
    "predict, unknown entity": (["predict", "returns-free", json.dumps(ROW | {"shop": "no"})], 2, "unknown_entity"),
    "lineage": (["lineage", "--prediction", "none"], 2, "unknown_prediction"),
    "promote, unknown version": (["promote", "returns-free", "99"], 2, "unknown_version"),
    "promote, unknown model": (["promote", "none", "1"], 2, "unknown_model"),
    "rollback": (["rollback", "none"], 2, "unknown_model"),
    "unserve": (["unserve", "none"], 2, "unknown_model"),
    "unserve, a pipeline's": (["unserve", "returns-free"], 1, "conflict"),
    "models": (["models", "none"], 2, "unknown_model"),
    "drift": (["drift", "none"], 2, "unknown_model"),
    "report": (["report", "none"], 1, "unavailable"),
}


@pytest.fixture(scope="module")
def on_a_running_cluster(host: Host, url: str, pool: ThreadPoolExecutor) -> dict[str, Future[dict]]:
    """What the verbs say of what is not there."""
    return {what: pool.submit(refused, host, *words, code=code) for what, (words, code, _) in REFUSED_WORDS.items()}


@pytest.mark.parametrize("what", REFUSED_WORDS)
def test_what_is_not_there_is_one_document_on_a_running_cluster_too(
    on_a_running_cluster: dict[str, Future[dict]], what: str
):
    assert on_a_running_cluster[what].result()["code"] == REFUSED_WORDS[what][2]


def test_a_run_of_a_pipeline_that_another_process_runs_is_a_conflict(host: Host, served: dict):
    with open(host.home / "runs" / "returns-free.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = refused(host, "run", SHOP, code=1, SHIFT="free")
    assert told["code"] == "conflict" and "another process" in told["error"]


def test_every_verb_answers_with_one_document_on_a_running_cluster(host: Host, url: str, served: dict):
    (answer,) = host.document("predict", "returns-free", json.dumps(ROW), "--at", MOMENT)
    assert host.document("rollback", "returns-free", "--reason", "test")["version"] == 1
    (other,) = host.document("predict", "returns-free", json.dumps(ROW), "--at", MOMENT)
    assert host.document("promote", "returns-free", "2")["stage"] == "live"
    assert (answer["version"], other["version"]) == (2, 1)
    assert host.document("status")["cluster"]["alive"] and host.document("up")["alive"]
    read_only_verbs(host, served, answer["id"])


def read_only_verbs(host: Host, served: dict, prediction: str) -> None:
    """Each tells what was recorded; asked two at a time, as whoever asks changes nothing."""
    asked = {
        "models": ["returns-free"],
        "drift": ["returns-free"],
        "cost": [],
        "lineage": ["--prediction", prediction],
        "report": [served["run"]],
        "plan": [SHOP],
    }
    with ThreadPoolExecutor(2) as pool:
        told = dict(zip(asked, pool.map(lambda verb: host.document(verb, *asked[verb]), asked), strict=True))
    assert [v["version"] for v in told["models"]] == [1, 2]
    assert isinstance(told["drift"], list)
    cost = told["cost"]
    assert sum(cost["parts"].values()) == pytest.approx(cost["bill_usd"], abs=1e-9)
    assert len(told["lineage"]["steps"]) >= 4
    assert told["report"]["run"] == served["run"]
    assert told["plan"]["pipeline"] == "returns-costly"
    command = [str(RAYMILL), "doctor", "--json"]
    done = subprocess.run(command, env=host.env, capture_output=True, text=True, timeout=120, check=False)
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["healthy"] else 1)
    ours = (str(host.home), "session", "haproxy")  # the machine may have faults of its own
    broken = [f for f in told["findings"] if f["severity"] == "error"]
    assert not [f for f in broken if any(word in f["where"] + f["what"].lower() for word in ours)], broken


def test_after_down_what_was_recorded_is_told_and_what_needs_the_cluster_is_refused(host: Host, served: dict):
    assert host.document("down")["ended"] > 0 and running(host) == []
    assert host.document("status")["cluster"] is None and host.document("down")["ended"] == 0
    read_only_verbs(host, served, f"{served['run']}-2020-03-24-00001")
    for words in (["promote", "returns-free", "1"], ["rollback", "returns-free"], ["unserve", "one"]):
        assert refused(host, *words, code=1)["code"] == "unavailable"
    assert running(host) == []


def running(host: Host) -> list[str]:
    """Command lines of what runs for the host's home."""
    mark = f"RAYMILL_SESSION={host.home}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found
