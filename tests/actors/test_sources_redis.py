"""A Redis stream: every entry is in the lake or in quarantine, once, whoever dies; against a real server."""

import json
import threading
import time
from functools import partial

import pytest
import redis

from raymill.actors import feed as feed_module
from raymill.actors.data import DataActor
from raymill.actors.feed import Feed, reach, take
from raymill.actors.lake import Lake
from raymill.actors.redis_stream import RedisGroup
from raymill.actors.sources import read_rows
from raymill.runtime.errors import ContractError, StoreError
from raymill.runtime.spec import RedisStream
from raymill.runtime.stores import REDIS_PASSWORD
from tests.unit.actors.redis_server import running
from tests.unit.actors.test_sources import source

PASSWORD = "s3cret-word"
MOMENT = "1970-01-01T00:00:01Z"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("redis"), PASSWORD) as started:
        yield started


@pytest.fixture
def client(server, monkeypatch):
    monkeypatch.setenv(REDIS_PASSWORD, PASSWORD)
    client = redis.Redis.from_url(server.url, password=PASSWORD)
    client.flushall()
    yield client
    client.close()


def declared(server, **more):
    return source(read=RedisStream(server.url, "events"), **more)


def group(server, consumer="one", **more):
    told = declared(server)
    return RedisGroup(told, told.read, consumer, **{"max_rows": 3, "claim_after_s": 1000} | more)


def send(client, *ids, value=1):
    return [client.xadd("events", {"id": i, "time": MOMENT, "value": value}) for i in ids]


def started(home, *told):
    actor = DataActor(str(home), list(told), lambda events: None, "p")
    actor.start()
    return actor


def ids_of(batch):
    return [int(i) for i in batch.rows["id"].to_pylist()]


def ids(home):
    return sorted(Lake(home / "lake").read("readings")["id"].to_pylist())


def server_tells_lag(client):
    """Servers before 7.0 do not tell how much a group has not read."""
    return int(client.info("server")["redis_version"].split(".")[0]) >= 7


def until(holds):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_batch_comes_again_with_its_id_until_it_is_acknowledged(server, client):
    sent = send(client, 0, 1, 2, 3)
    first = group(server).next(1)
    assert first.batch_id == f"events/{sent[0].decode()}-{sent[2].decode()}"
    stream = group(server)  # the same consumer, started anew
    again = stream.next(1)
    assert (again.batch_id, again.rows) == (first.batch_id, first.rows) and stream.next(0) is again
    tells = server_tells_lag(client)
    assert stream.waiting() == (4 if tells else None)
    stream.acknowledge(again)
    last = stream.next(1)
    assert ids_of(last) == [3] and stream.waiting() == (1 if tells else None)
    stream.acknowledge(last)
    assert stream.waiting() == (0 if tells else None)
    assert stream.next(0.01) is None and client.xpending("events", "raymill")["pending"] == 0


def test_an_answer_that_was_lost_is_asked_for_again_and_not_skipped(server, client, monkeypatch):
    send(client, *range(5))
    stream = group(server)
    stream.open()
    real = stream._client.xreadgroup

    def lost(*args, **kwargs):
        real(*args, **kwargs)
        raise redis.ConnectionError("the line went dead after the server had answered")

    monkeypatch.setattr(stream._client, "xreadgroup", lost)
    with pytest.raises(StoreError, match="went dead"):
        stream.next(1)  # nothing was pending: this may only have asked for that
    monkeypatch.undo()
    monkeypatch.setenv(REDIS_PASSWORD, PASSWORD)
    found = []
    while (batch := stream.next(0.01)) is not None:
        found += ids_of(batch)
        stream.acknowledge(batch)
    assert found == [*range(5)]


def test_what_a_dead_consumer_had_pending_is_claimed_whole_by_one_of_the_living(server, client):
    send(client, *range(7))
    dead = group(server, "dead").next(1)
    time.sleep(0.06)
    takers = [group(server, name, claim_after_s=0.05) for name in ("two", "three")]
    claimed, fresh = (taker.next(1) for taker in takers)
    assert (claimed.batch_id, claimed.rows) == (dead.batch_id, dead.rows)
    assert ids_of(fresh) == [3, 4, 5]
    for taker, batch in zip(takers, (claimed, fresh), strict=True):
        taker.acknowledge(batch)
    assert client.xpending("events", "raymill")["pending"] == 0
    assert group(server, "young", claim_after_s=1000).next(1).rows["id"].to_pylist() == ["6"]


def test_entries_that_are_no_rows_go_to_quarantine_and_hold_nothing_up(server, client, tmp_path):
    send(client, 0)
    send(client, 1, value=-1)
    client.xadd("events", {"id": 2, "colour": "red"})
    client.xadd("events", {"id": b"\xff", "time": MOMENT})
    client.xadd("events", {"json": "[1]"})
    client.xadd("events", {"json": json.dumps({"id": 3, "time": MOMENT, "value": 7})})
    told = declared(server)
    data, stream = started(tmp_path, told), group(server, max_rows=100)
    for _ in range(2):  # also when the acknowledgement is lost
        take(data, told, stream.next(1))
        stream.close()
    stream.acknowledge(stream.next(1))
    reasons = sorted(e.reason for e in data.quarantine())
    assert reasons == ["entry:columns", "entry:json", "entry:text", "range:value"] and ids(tmp_path) == [0, 3]


def test_entries_that_were_trimmed_before_they_were_taken_are_told(server, client, tmp_path):
    sent = send(client, 0, 1, 2)
    assert group(server).next(1) is not None
    client.xdel("events", sent[0], sent[1])
    told = declared(server)
    data, stream = started(tmp_path, told), group(server)
    batch = stream.next(1)
    assert batch.batch_id == f"events/{sent[0].decode()}-{sent[2].decode()}"
    take(data, told, batch)
    assert [e.reason for e in data.quarantine()] == ["entry:gone"] * 2 and ids(tmp_path) == [2]


def test_a_batch_that_is_too_old_is_quarantined_row_by_row_and_the_next_one_comes_in(server, client, tmp_path):
    told = declared(server, freshness="1h")
    send(client, 0, 1)
    data, stream = started(tmp_path, told), group(server)
    take(data, told, batch := stream.next(1))
    stream.acknowledge(batch)
    client.xadd("events", {"id": 2, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "value": 1})
    take(data, told, stream.next(1))
    assert [e.reason for e in data.quarantine()] == ["batch:contract_error"] * 2 and ids(tmp_path) == [2]


def test_a_feed_goes_on_over_the_death_of_the_server(server, client, tmp_path):
    told = declared(server)
    data = started(tmp_path, told)
    feed = Feed([told], data)
    feed.start()
    send(client, *range(50))
    until(lambda: feed.health()["sources"]["readings"]["rows"] == 50)
    server.kill()
    until(lambda: not feed.health()["ok"])
    assert PASSWORD not in feed.health()["sources"]["readings"]["error"]
    server.start()
    send(client, *range(50, 80))
    until(lambda: feed.health()["sources"]["readings"]["rows"] == 80)
    feed.stop()
    feed.stop()
    assert ids(tmp_path) == [*range(80)] and data.quarantine() == []
    assert feed.health()["sources"]["readings"]["state"] == "stopped"


class SlowData(DataActor):
    """A data actor that waits for a sign before it takes a batch in."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sign = threading.Semaphore(0)

    def ingest(self, *args, **kwargs):
        self.sign.acquire()
        return super().ingest(*args, **kwargs)


def test_what_comes_faster_than_it_is_taken_in_waits_in_redis(server, client, monkeypatch, tmp_path):
    monkeypatch.setattr(feed_module, "RedisGroup", partial(RedisGroup, max_rows=3))
    told = declared(server)
    data = SlowData(str(tmp_path), [told], lambda events: None, "p")
    feed = Feed([told], data)
    send(client, *range(30))
    feed.start()
    until(lambda: feed.health()["sources"]["readings"]["state"] == "taking")
    for taken in (0, 3, 6):
        until(lambda taken=taken: feed.health()["sources"]["readings"]["rows"] == taken)
        until(lambda: client.xpending("events", "raymill")["pending"] == 3)
        data.sign.release()
    for _ in range(10):
        data.sign.release()
    until(lambda: feed.health()["sources"]["readings"]["rows"] == 30)
    feed.stop()
    assert ids(tmp_path) == [*range(30)]


def test_a_server_that_is_away_or_refuses_is_told_without_the_password(server, client, monkeypatch):
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:1.*can not be reached"):
        reach(source(read=RedisStream("redis://127.0.0.1:1", "events")))
    monkeypatch.setenv(REDIS_PASSWORD, "wrong-word")
    with pytest.raises(StoreError, match=REDIS_PASSWORD) as told:
        reach(declared(server))
    assert "wrong-word" not in told.value.message
    with pytest.raises(ContractError, match="raymill feed"):
        read_rows(declared(server))
    with pytest.raises(ValueError, match="must not hold a password") as refused:
        RedisStream("redis://:hunter2@host", "events")
    assert "hunter2" not in str(refused.value)
