"""Every row that was sent is in the lake or in quarantine, once, whatever was killed and sent again meanwhile."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pyarrow as pa
import pytest

from raymill.actors import known, quarantine
from raymill.actors.contract import arrow_schema
from raymill.actors.data import DataActor
from raymill.actors.lake import Lake
from raymill.runtime.errors import Conflict, ContractError, SpecError
from raymill.runtime.spec import Col, Source

SECOND_US = 1_000_000


def source(name="readings", **more) -> Source:
    schema = {"id": Col("int64"), "time": Col("timestamp"), "value": Col("int64", ge=0)}
    return Source(name, key=["id"], time="time", schema=schema, **more)


def rows(*ids, value=1) -> pa.Table:
    columns = [ids, [i * SECOND_US for i in ids], [value] * len(ids)]
    return pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, arrow_schema(source()), strict=True)], ["id", "time", "value"]
    )


def started(home, *, cls=DataActor, record=None, sources=None) -> DataActor:
    actor = cls(str(home), sources or [source()], record or (lambda events: None), "p")
    actor.start()
    return actor


def ids(home, table="readings") -> list[int]:
    return sorted(Lake(home / "lake").read(table)["id"].to_pylist())


def story(done) -> tuple:
    return done.accepted, done.quarantined, done.rows_ref.to_pylist()


def test_sound_rows_go_to_the_lake_and_the_others_to_quarantine_with_the_reason(tmp_path):
    events = []
    actor = started(tmp_path, record=events.extend)
    done = actor.ingest("readings", pa.concat_tables([rows(1, 2, 1), rows(3, value=-1)]), batch_id="a", at=7)
    assert (done.accepted, done.quarantined, done.duplicate) == (2, {"duplicate_key": 1, "range:value": 1}, False)
    assert done.rows_ref.equals(rows(1, 2)) and ids(tmp_path) == [1, 2]
    held = actor.quarantine(source="readings")
    assert sorted((q.batch_id, q.reason, json.loads(q.row)["id"]) for q in held) == [
        ("a", "duplicate_key", 1),
        ("a", "range:value", 3),
    ]
    assert [(e.kind, e.subject, e.at, e.key) for e in events] == [
        ("rows.appended", "readings", 7, "rows.appended/readings/a")
    ]
    assert events[0].data == {
        "batch_id": "a",
        "lake_version": done.lake_version,
        "accepted": 2,
        "quarantined": done.quarantined,
    }


def test_a_batch_sent_again_is_told_the_same_and_writes_nothing(tmp_path):
    sent = pa.concat_tables([rows(1, 2, 2), rows(3, value=-1)])
    first = started(tmp_path).ingest("readings", rows(2), batch_id="before")
    first = started(tmp_path).ingest("readings", sent, batch_id="a")
    started(tmp_path).ingest("readings", rows(9, 1), batch_id="after")
    again = started(tmp_path).ingest("readings", sent, batch_id="a")
    assert again.duplicate and not first.duplicate
    assert story(again) == story(first) == (1, {"duplicate_key": 2, "range:value": 1}, rows(1).to_pylist())
    assert ids(tmp_path) == [1, 2, 9]
    assert len(started(tmp_path).quarantine()) == 4


def test_keys_are_unique_across_batches_restarts_and_another_writer(tmp_path):
    actor = started(tmp_path)
    actor.ingest("readings", rows(1, 2), batch_id="a")
    assert actor.ingest("readings", rows(2, 3), batch_id="b").quarantined == {"duplicate_key": 1}
    assert started(tmp_path).ingest("readings", rows(3, 4), batch_id="c").quarantined == {"duplicate_key": 1}
    assert actor.ingest("readings", rows(4, 5), batch_id="d").quarantined == {"duplicate_key": 1}
    assert ids(tmp_path) == [1, 2, 3, 4, 5]


def test_keys_whose_hashes_collide_are_both_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(known, "key_hashes", lambda keys: pa.array([7] * keys.num_rows, pa.uint64()).to_numpy())
    actor = started(tmp_path)
    actor.ingest("readings", rows(1), batch_id="a")
    assert actor.ingest("readings", rows(1, 2), batch_id="b").quarantined == {"duplicate_key": 1}
    assert ids(tmp_path) == [1, 2]


def test_other_rows_under_a_known_batch_id_are_refused(tmp_path):
    actor = started(tmp_path)
    actor.ingest("readings", rows(1), batch_id="a")
    with pytest.raises(Conflict, match="'a'"):
        actor.ingest("readings", rows(5, 6), batch_id="a")


class KilledBetween(Lake):
    """A lake whose process dies after quarantine was written and before the source's table is."""

    def append(self, table, rows, **more):
        if table != quarantine.TABLE:
            raise KeyboardInterrupt
        return super().append(table, rows, **more)


def test_a_death_between_quarantine_and_lake_is_completed_by_the_retry(tmp_path):
    sent = pa.concat_tables([rows(1, 2, 1), rows(3, value=-1)])
    dying = started(tmp_path)
    dying._lake = KilledBetween(tmp_path / "lake")  # what holds back rows has a lake of its own
    with pytest.raises(KeyboardInterrupt):
        dying.ingest("readings", sent, batch_id="a")
    assert len(started(tmp_path).quarantine()) == 2
    # another batch comes first and takes a key that the unfinished one would have had
    started(tmp_path).ingest("readings", rows(2), batch_id="b")
    done = started(tmp_path).ingest("readings", sent, batch_id="a")
    assert (done.accepted, done.quarantined) == (1, {"duplicate_key": 2, "range:value": 1})
    assert story(started(tmp_path).ingest("readings", sent, batch_id="a")) == story(done)
    assert ids(tmp_path) == [1, 2]
    assert Counter(q.reason for q in started(tmp_path).quarantine()) == {"duplicate_key": 2, "range:value": 1}


def test_a_record_that_fails_is_made_good_by_the_retry(tmp_path):
    def fail(events):
        raise ConnectionError("ledger away")

    with pytest.raises(ConnectionError):
        started(tmp_path, record=fail).ingest("readings", rows(1), batch_id="a")
    events = []
    assert started(tmp_path, record=events.extend).ingest("readings", rows(1), batch_id="a").duplicate
    assert [e.key for e in events] == ["rows.appended/readings/a"]


WRITER = """
import sys
from raymill.actors.data import DataActor
sys.path.insert(0, {here!r})
from test_data import batch, source
actor = DataActor({home!r}, [source()], lambda events: None)
actor.start()
for n in range({last}):
    done = actor.ingest("readings", batch(n), batch_id=f"b{{n}}")
    print(n, done.accepted, sum(done.quarantined.values()), flush=True)
"""


def batch(n: int) -> pa.Table:
    """50 new rows, one that the batch before had already, one out of range."""
    return pa.concat_tables([rows(*range(50 * n, 50 * n + 50)), rows(max(0, 50 * n - 1)), rows(10**6 + n, value=-1)])


@pytest.mark.long
@pytest.mark.parametrize(("lives", "last"), [(2, 18), pytest.param(20, 170, marks=pytest.mark.soak)])
def test_kill_9_at_any_moment_then_a_blind_retry_loses_and_doubles_nothing(tmp_path, lives, last):
    choose, acknowledged = random.Random(7), {}
    code = WRITER.format(here=os.path.dirname(__file__), home=str(tmp_path), last=last)
    for life in range(lives):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
            for _ in range(choose.randrange(life * 8 + 1, life * 8 + 8)):  # past the life before, then a bit of new
                n, *counts = map(int, writer.stdout.readline().split())
                assert acknowledged.setdefault(n, counts) == counts
            time.sleep(choose.uniform(0, 0.02))
            writer.send_signal(signal.SIGKILL)
    assert {50 * n for n in acknowledged} <= set(ids(tmp_path))
    actor = started(tmp_path)
    for n in range(last):
        assert actor.ingest("readings", batch(n), batch_id=f"b{n}").accepted == 50
    assert ids(tmp_path) == list(range(50 * last))
    bad = Counter((q.batch_id, q.reason) for q in actor.quarantine())
    assert bad == {(f"b{n}", why): 1 for n in range(last) for why in ("duplicate_key", "range:value")}


def test_seeded_rows_and_rows_without_label_are_counted_apart(tmp_path):
    schema = {
        "id": Col("int64"),
        "time": Col("timestamp"),
        "value": Col("int64", ge=0),
        "known": Col("timestamp", nullable=True),
    }
    told = Source("readings", key=["id"], time="time", known_at="known", schema=schema)
    actor = started(tmp_path, sources=[told, source("empty")])
    known = pa.array([1, None, None], pa.timestamp("us", "UTC"))
    actor.ingest("readings", rows(1, 2, 3).append_column("known", known), batch_id="a")
    actor.ingest("readings", rows(4, value=-1).append_column("known", known.slice(0, 1)), batch_id="b")
    actor.ingest("readings", rows(5, value=-2).append_column("known", known.slice(0, 1)), batch_id="seeded-1")
    assert actor.tally() == {
        "ingested": {"readings": 3},
        "without_label": {"readings": 2},
        "quarantined": {"range:value": 1},
        "seeded_bad": {"range:value": 1},
    }
    assert actor.health() == {"ok": True, "sources": {"readings": 3, "empty": 0}}


def test_what_is_no_table_no_source_or_a_taken_name_is_refused(tmp_path):
    actor = started(tmp_path)
    with pytest.raises(ContractError, match="list"):
        actor.ingest("readings", [{"id": 1}], batch_id="a")
    with pytest.raises(ContractError, match="weather"):
        actor.ingest("weather", rows(1), batch_id="a")
    with pytest.raises(SpecError, match="predictions"):
        DataActor(str(tmp_path), [source("predictions")], lambda events: None)
