"""The ledger: what is written stays, once, in order, and a change to it is found."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.runtime.errors import ContractError, StoreError
from raymill.runtime.ledger import _KEY_KNOWN, Ledger, canonical
from raymill.runtime.messages import Event


def event(n=0, **fields):
    return Event(**{"kind": "rows.appended", "subject": "flights", "wall_s": 1.5 + n, "data": {"n": n}, **fields})


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path / "record.db")
    yield opened
    opened.close()


def test_events_come_back_in_order_with_every_field(ledger):
    ledger.append([event(0), event(1, pipeline="p", run="r", at=7, key="k")])
    first, second = ledger.events()
    assert (first["seq"], second["seq"]) == (1, 2)
    assert {k: second[k] for k in ("kind", "subject", "pipeline", "run", "at", "wall_s", "data", "key")} == {
        "kind": "rows.appended", "subject": "flights", "pipeline": "p", "run": "r",
        "at": 7, "wall_s": 2.5, "data": {"n": 1}, "key": "k",
    }  # fmt: skip
    assert len(second["hash"]) == 64


def test_a_query_narrows_by_kind_subject_pipeline_and_seq(ledger):
    ledger.append(
        [event(0), event(1, kind="lease.granted", subject="a"), event(2, kind="lease.released", pipeline="p")]
    )
    assert [e["seq"] for e in ledger.events("lease.*")] == [2, 3]
    assert [e["seq"] for e in ledger.events("lease.granted", subject="a")] == [2]
    assert [e["seq"] for e in ledger.events(pipeline="p")] == [3]
    assert [e["seq"] for e in ledger.events(since_seq=1, limit=1)] == [2]


def test_a_key_is_written_once_within_a_batch_and_over_batches(ledger):
    assert ledger.append([event(0, key="a"), event(1, key="a"), event(2, key="b")]) == 2
    assert ledger.append([event(3, key="b"), event(4)]) == 1
    assert [e["data"]["n"] for e in ledger.events()] == [0, 2, 4]
    assert ledger.verify().broken_seq is None


def test_looking_for_a_key_reads_an_index_and_not_the_whole_ledger(ledger):
    with ledger.reading() as db:
        (plan,) = db.execute(f"EXPLAIN QUERY PLAN {_KEY_KNOWN}", ("k",)).fetchall()
    assert "events_key" in plan[3]


def test_a_batch_with_one_bad_event_is_not_written_at_all(ledger):
    with pytest.raises(ContractError, match=r"rows.appended of flights: set is not JSON"):
        ledger.append([event(0), event(1, data={"x": {1, 2}})])
    assert ledger.events() == []
    ledger.append([event(2)])
    assert ledger.verify().events == 1


def test_numpy_scalars_and_non_finite_numbers_become_json(ledger):
    ledger.append([event(data={"i": np.int64(3), "f": np.float32(0.5), "nan": float("nan"), "t": (1, 2)})])
    assert ledger.events()[0]["data"] == {"i": 3, "f": 0.5, "nan": None, "t": [1, 2]}
    assert ledger.verify().broken_seq is None


def test_a_second_opener_is_refused_and_told_who_has_it(ledger):
    with pytest.raises(StoreError, match=f"pid {os.getpid()}"):
        Ledger(ledger.path)
    ledger.close()
    ledger.close()
    Ledger(ledger.path).close()


def test_a_waiting_opener_gets_the_lock_when_the_holder_goes(ledger):
    threading.Timer(0.1, ledger.close).start()
    Ledger(ledger.path, lock_wait_s=20).close()


def test_a_closed_ledger_says_so(ledger):
    ledger.close()
    with pytest.raises(StoreError, match="is closed"):
        ledger.append([event()])


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "record.db"
    path.write_bytes(b"not a database, certainly" * 100)
    with pytest.raises(StoreError, match="can not be opened"):
        Ledger(path)
    assert path.read_bytes().startswith(b"not a database")


def test_a_newer_layout_is_refused(tmp_path):
    db = sqlite3.connect(tmp_path / "record.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="upgrade raymill"):
        Ledger(tmp_path / "record.db")


def forge(path, *statements):
    """Change the file behind the ledger's back."""
    db = sqlite3.connect(path)
    db.execute("DROP TRIGGER events_are_not_changed")
    db.execute("DROP TRIGGER events_are_not_removed")
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("forgery", "broken", "reason"),
    [
        ("UPDATE events SET data = '{\"n\":99}' WHERE seq = 3", 3, "not what was written"),
        ("UPDATE events SET wall_s = 9 WHERE seq = 1", 1, "not what was written"),
        ("DELETE FROM events WHERE seq = 2", 2, "is missing"),
        ("DELETE FROM events WHERE seq >= 4", 4, "5 were written"),
        ("DELETE FROM events", 1, "5 were written"),
    ],
)
def test_verify_names_the_first_event_that_is_not_as_it_was(ledger, forgery, broken, reason):
    ledger.append([event(n) for n in range(5)])
    forge(ledger.path, forgery)
    found = ledger.verify()
    assert found.broken_seq == broken and reason in found.reason and found.events == broken - 1


def test_the_database_itself_refuses_to_change_or_remove_events(ledger):
    ledger.append([event()])
    for statement in ("UPDATE events SET kind = 'x'", "DELETE FROM events"):
        with pytest.raises(StoreError, match="append-only"), ledger.transaction() as db:
            db.execute(statement)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=3,
)


@settings(max_examples=20, deadline=None)
@given(batches=st.lists(st.lists(st.tuples(st.sampled_from(["", "a", "b", "c"]), JSON), max_size=4), max_size=5))
def test_any_batches_give_a_whole_chain_with_each_key_once(tmp_path_factory, batches):
    opened = Ledger(tmp_path_factory.mktemp("ledger") / "record.db")
    for batch in batches:
        opened.append([event(data={"v": v}, key=k) for k, v in batch])
    opened.close()
    opened = Ledger(opened.path)
    written = opened.events()
    keys = [e["key"] for e in written if e["key"]]
    assert len(keys) == len(set(keys)) == len({k for b in batches for k, _ in b if k})
    assert len(written) - len(keys) == sum(k == "" for b in batches for k, _ in b)
    assert opened.verify().events == len(written) and opened.verify().broken_seq is None
    opened.close()


def test_canonical_text_does_not_depend_on_the_order_of_keys():
    assert canonical({"b": 1, "a": [1.0, "é"]}) == canonical({"a": (1.0, "é"), "b": 1}) == '{"a":[1.0,"é"],"b":1}'


WRITER = """
import sys
from raymill.runtime.ledger import Ledger
from raymill.runtime.messages import Event
ledger = Ledger(sys.argv[1], lock_wait_s=10)
n = int(sys.argv[2])
while True:
    ledger.append([Event(kind="w", subject="s", wall_s=0, data={"n": n, "part": i}, key=f"{n}/{i}") for i in range(3)])
    print(n, flush=True)
    n += 1
"""


def test_kill_9_of_a_writer_loses_nothing_acknowledged_and_tears_no_batch(tmp_path):
    path, acknowledged, dice = tmp_path / "record.db", -1, random.Random(7)
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(acknowledged + 1)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        acknowledged = int(writer.stdout.readline())
        time.sleep(dice.random() * 0.1)
        writer.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *(int(line) for line in writer.stdout.read().split("\n") if line.strip())])
        writer.wait()
    ledger = Ledger(path)
    written = [(e["data"]["n"], e["data"]["part"]) for e in ledger.events()]
    assert len(written) == len(set(written)) and len(written) % 3 == 0
    assert {n for n, _ in written} >= set(range(acknowledged + 1))
    assert ledger.verify().broken_seq is None
    ledger.close()
