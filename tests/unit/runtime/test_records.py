"""The records actor as a plain class: what it knew before it stopped it knows after."""

import pickle

import pytest

from raymill.runtime.errors import StoreError, Unavailable
from raymill.runtime.messages import Event
from raymill.runtime.records import RecordsActor, RemoteRecords


def test_a_stopped_and_started_actor_knows_everything(tmp_path):
    records = RecordsActor(tmp_path)
    records.start()
    records.append([Event(kind="k", subject="s", wall_s=1.0)])
    version = records.register("m", "model", b"p", None, "t", {}, 0.5)
    records.promote("m", version.version, reason="first")
    records.stop()
    records.stop()
    assert not records.health()
    records = RecordsActor(tmp_path)
    records.start()
    assert records.health() and records.live("m") == records.get("m", 1)
    assert [e["kind"] for e in records.events()] == ["k", "model.registered", "model.promoted"]
    assert records.program(version.digest) == b"p" and records.verify().broken_seq is None
    records.stop()


def test_an_actor_that_is_not_started_says_so(tmp_path):
    with pytest.raises(Unavailable, match="call start"):
        RecordsActor(tmp_path).events()


def test_a_second_actor_on_the_same_home_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("raymill.runtime.records._LOCK_WAIT_S", 0.05)
    first, second = RecordsActor(tmp_path), RecordsActor(tmp_path)
    first.start()
    with pytest.raises(StoreError, match="open in another process"):
        second.start()
    first.stop()
    second.start()
    second.stop()


def test_the_remote_value_is_picklable_and_has_the_actors_methods():
    records = pickle.loads(pickle.dumps(RemoteRecords(patience_s=1)))
    assert callable(records) and callable(records.events) and callable(records.promote)
