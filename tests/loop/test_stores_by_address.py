"""Lake in an object store, online features in Redis: a second host ingests, trains and serves as the head's does.

The second host is a worker node with network and mount namespaces of its own; the stores are a real Redis server with
a password and moto's S3 server, both on the first host. Nothing else is shared.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from raymill.cluster.providers import namespace
from raymill.cluster.spec import DEFAULT_CONFIG
from raymill.runtime.stores import REDIS_PASSWORD
from tests.actors import s3_server
from tests.loop.conftest import PIPELINES, Host, last_document
from tests.unit.actors import redis_server

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        namespace.can_isolate() != "", reason=f"LOUD: no second host can be made here: {namespace.can_isolate()}"
    ),
]
PASSWORD = "only-in-the-environment"
PIPELINE = str(PIPELINES / "by_address.py")


@pytest.fixture(scope="module")
def told(apart: Host, tmp_path_factory) -> dict:
    """What both hosts answered, and what the replica on the second one did."""
    toml = apart.home.parent / "cluster.toml"
    toml.write_text(DEFAULT_CONFIG.read_text().replace("isolate = false", "isolate = true"))
    head = namespace.network_of(apart.home).head
    with (
        redis_server.running(tmp_path_factory.mktemp("redis"), PASSWORD, "0.0.0.0") as redis,
        s3_server.running("0.0.0.0") as found,
    ):
        s3 = replace(found, endpoint=found.endpoint.replace("0.0.0.0", head))
        apart.env |= s3.environment | {REDIS_PASSWORD: PASSWORD}
        apart.raymill("up", "--ports", "auto", "--config", str(toml))
        places = {"LAKE": s3.url("shop"), "ONLINE": redis.url.replace("0.0.0.0", head), "RAY_AUTH_MODE": "token"}
        driver = Path(__file__).with_name("drive_two_hosts.py").read_text()
        return last_document(apart.python(driver, PIPELINE=PIPELINE, **places))


def test_both_hosts_answer_the_same_bit_for_bit_and_as_folders_of_one_host_do(told, apart: Host):
    there, here, alone = told["there"], told["here"], told["alone"]
    bridge = namespace.network_of(apart.home)
    assert (there["ip"], here["ip"]) == (bridge.node(0).address, bridge.head)
    assert there["interfaces"] == sorted(["lo", bridge.name])
    assert there["answers"] == here["answers"] == alone["answers"]
    assert there["versions"] == here["versions"] == alone["versions"] == {"orders": 2}
    assert min(there["sizes"]) > 1000
    assert there["known"] > 0.5


def test_nothing_durable_was_in_the_second_hosts_folders(told):
    assert not {"lake", "online", "record.db"} & set(told["there"]["home"])
    assert not {"lake", "online"} & set(told["here"]["home"])


def test_a_replica_on_the_second_host_reads_redis_and_its_predictions_reach_the_lake(told, apart: Host):
    assert told["replicas"] == [namespace.network_of(apart.home).node(0).address]
    assert told["served_as_joined"] is True
    assert told["rows"] == 300


def test_the_password_is_in_no_file_of_the_home(told, apart: Host):
    found = [p for p in apart.home.rglob("*") if p.is_file() and PASSWORD.encode() in p.read_bytes()]
    assert found == []


def test_a_folder_where_an_address_is_needed_is_refused_with_the_remedy(apart: Host):
    done = apart.raymill("plan", PIPELINE, code=2, ONLINE="redis://10.0.0.7:6379/0")
    assert "the lake is a folder of RAYMILL_HOME" in done.stderr
    assert "s3://bucket/prefix" in done.stderr
