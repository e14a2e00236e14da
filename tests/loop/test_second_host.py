"""Nothing works only because everything shares one disk: the loop with worker nodes that are hosts of their own.

Each worker node has a network namespace and a mount namespace with private /tmp, /dev/shm and RAYMILL_HOME.
"""

from pathlib import Path

import pytest

from raymill.cluster.providers import namespace
from raymill.cluster.spec import DEFAULT_CONFIG
from raymill.runtime.home import Home
from raymill.runtime.ledger import Ledger
from tests.loop.conftest import PIPELINES, Host, last_document

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        namespace.can_isolate() != "", reason=f"LOUD: no second host can be made here: {namespace.can_isolate()}"
    ),
]
DURABLE = {"record.db", "lake", "online", "models", "runs", "spool", "cluster"}

WITNESSES = """
import json
import httpx
from raymill.jobs.cli.records import join, needed_session
found = needed_session()
join(found)
from raymill.actors.endpoint import ray_headers
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list
keys = _internal_kv_list("witness/", namespace="test")
ranks = [json.loads(_internal_kv_get(key, namespace="test")) for key in keys]
serve = httpx.get(f"{found.dashboard_url}/api/serve/applications/", headers=ray_headers()).json()
replicas = serve["applications"]["raymill"]["deployments"]["Replica"]["replicas"]
print(json.dumps({"ranks": [r for r in ranks if r["rank"]], "replicas": [r["node_ip"] for r in replicas]}))
"""


@pytest.fixture(scope="module")
def ran(apart: Host) -> dict:
    """A run there to its end: its summary, and what its ranks saw."""
    toml = apart.home.parent / "cluster.toml"
    toml.write_text(DEFAULT_CONFIG.read_text().replace("isolate = false", "isolate = true"))
    apart.raymill("up", "--ports", "auto", "--config", str(toml))
    pipeline = str(PIPELINES / "second_host.py")
    summary = apart.document("run", pipeline, SHIFT="none", UNTIL="2020-02-20", EPOCHS="8")
    return {"summary": summary, **last_document(apart.python(WITNESSES))}


def test_the_loop_comes_to_its_end_with_no_request_failed_though_a_replica_was_killed(ran):
    summary = ran["summary"]
    assert (summary["requests"]["rows"], summary["requests"]["failed"], summary["skipped"]) == (5000, 0, [])
    assert [(v["kind"], v["stage"]) for v in summary["versions"]] == [("baseline", "retired"), ("model", "live")]
    assert summary["cost"]["parts"]["training"] > 0


def test_the_ranks_were_on_two_hosts_that_are_not_the_heads(ran, apart: Host):
    bridge = namespace.network_of(apart.home)
    assert {rank["ip"] for rank in ran["ranks"]} == {bridge.node(0).address, bridge.node(1).address}
    assert all(rank["interfaces"] == sorted(["lo", bridge.name]) for rank in ran["ranks"])
    assert len({rank["node"] for rank in ran["ranks"]}) == 2
    assert set(ran["replicas"]) == {bridge.head}


def test_nothing_durable_of_the_home_was_visible_there(ran, apart: Host):
    assert {p.name for p in apart.home.iterdir()} >= DURABLE
    assert all(not DURABLE & set(rank["home"]) for rank in ran["ranks"]), ran["ranks"]


def test_the_ledger_has_the_leases_on_those_nodes_and_down_takes_the_hosts_away(ran, apart: Host):
    apart.raymill("down")
    ledger = Ledger(Home(apart.home).record, lock_wait_s=5)
    leases = [e["data"] for e in ledger.events("lease.granted")]
    types = {e["subject"]: e["data"]["node_type"] for e in ledger.events("node.started")}
    ledger.close()
    trained = {x["node_id"] for x in leases if x["purpose"] == "training"}
    assert trained == {rank["node"] for rank in ran["ranks"]}
    assert {types[n] for n in trained} == {"reserved", "spot"}
    assert not Path("/sys/class/net", namespace.network_of(apart.home).name).exists()
