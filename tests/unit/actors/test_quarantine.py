"""A refused row is never lost and never doubled: it is open, or landed once, or discarded, whatever was killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.contract import arrow_schema, check
from raymill.actors.data import DataActor
from raymill.actors.lake import Lake
from raymill.actors.quarantine import LOG
from raymill.actors.quarantine_life import Done, Entry, State, Step, after, lived, next_step
from raymill.actors.row_text import json_rows, rows_of
from raymill.runtime.errors import Conflict, ContractError, UnknownRow
from raymill.runtime.spec import Col, DropColumn, Source

PLANES = Source("planes", key=["tail"], time="time", schema={"tail": Col("string"), "time": Col("timestamp")})
FLIGHTS = Source(
    "flights",
    key=["id"],
    time="time",
    schema={
        "id": Col("int64"),
        "time": Col("timestamp"),
        "wind": Col("float64", nullable=True, ge=0, le=200),
        "tail": Col("string", nullable=True, references="planes.tail"),
    },
)


def flights(*rows) -> pa.Table:
    """Rows (id, wind, tail)."""
    ids = [r[0] for r in rows]
    columns = [ids, [i * 10**6 for i in ids], [r[1] for r in rows], [r[2] for r in rows]]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, arrow_schema(FLIGHTS), strict=True)]
    return pa.table(arrays, list(FLIGHTS.schema))


def planes(*tails) -> pa.Table:
    return pa.table({"tail": list(tails), "time": pa.array([1] * len(tails), pa.timestamp("us", "UTC"))})


def started(home, *, events=None) -> DataActor:
    actor = DataActor(str(home), [FLIGHTS, PLANES], (lambda e: None) if events is None else events.extend, "p")
    actor.start()
    return actor


def reingested(actor, ids):
    """Land, and settle as a driver does."""
    done = actor.reingest(ids)
    for batch in done:
        actor.settle(batch.batch_id)
    return done


def in_lake(home) -> dict[int, float]:
    table = Lake(home / "lake").read("flights")
    assert len(set(table["id"].to_pylist())) == table.num_rows
    return dict(zip(table["id"].to_pylist(), table["wind"].to_pylist(), strict=True))


def test_a_fixed_row_passes_the_contract_and_lands_once(tmp_path):
    events = []
    actor = started(tmp_path, events=events)
    actor.ingest("flights", flights((1, 5.0, None), (2, 999.0, None), (3, 888.0, None)), batch_id="a")
    two, three = sorted(actor.quarantine(reason="range:wind"), key=lambda e: e.row)
    assert [e.state for e in (two, three)] == [State.OPEN] * 2 and json.loads(two.row)["wind"] == 999.0
    (done,) = reingested(actor, [two.id])  # unfixed: it is refused again and stays
    assert (done.accepted, done.quarantined) == (0, {"range:wind": 1})
    assert actor.fix({two.id: {"wind": "99.9"}, three.id: {"wind": None}})[0].state is State.OPEN
    (done,) = reingested(actor, [two.id, three.id])
    assert (done.accepted, done.quarantined, sorted(done.rows_ref["id"].to_pylist())) == (2, {}, [2, 3])
    assert in_lake(tmp_path) == {1: 5.0, 2: 99.9, 3: None}
    assert reingested(started(tmp_path), [two.id, three.id]) == []
    assert {e.state for e in actor.quarantine()} == {State.REINGESTED}
    assert actor.tally()["quarantined"] == {}
    assert [e.data["accepted"] for e in events if e.data["batch_id"].startswith("quarantine-")] == [0, 2]


def test_a_row_whose_parent_comes_late_is_taken_when_it_is_there(tmp_path):
    actor = started(tmp_path)
    done = actor.ingest("flights", flights((1, 1.0, "N1"), (2, 1.0, "N2"), (3, 1.0, None)), batch_id="a")
    assert (done.accepted, done.quarantined) == (1, {"reference:tail": 2})
    actor.ingest("planes", planes("N1"), batch_id="p1")
    ids = [e.id for e in actor.quarantine(reason="reference:tail")]
    (done,) = reingested(actor, ids)
    assert (done.accepted, done.quarantined) == (1, {"reference:tail": 1})
    started(tmp_path).ingest("planes", planes("N2"), batch_id="p2")  # another process: the values are read anew
    assert reingested(actor, ids)[0].accepted == 1
    assert sorted(in_lake(tmp_path)) == [1, 2, 3]


def test_a_batch_sent_again_after_its_parents_came_is_told_the_same_and_the_row_stays_in_quarantine(tmp_path):
    sent = flights((1, 1.0, "N1"), (2, 1.0, None))
    first = started(tmp_path).ingest("flights", sent, batch_id="a")
    started(tmp_path).ingest("planes", planes("N1"), batch_id="p")
    again = started(tmp_path).ingest("flights", sent, batch_id="a")
    assert (again.accepted, again.quarantined, again.duplicate) == (1, first.quarantined, True)
    assert again.rows_ref.equals(first.rows_ref) and len(started(tmp_path).quarantine()) == 1


def test_a_try_that_died_after_quarantine_does_not_bring_the_row_in_beside_it(tmp_path):
    class Killed(Lake):
        def append(self, table, rows, **more):
            raise KeyboardInterrupt

    sent, dying = flights((1, 1.0, "N1"), (2, 1.0, None)), started(tmp_path)
    dying._lake = Killed(tmp_path / "lake")
    with pytest.raises(KeyboardInterrupt):
        dying.ingest("flights", sent, batch_id="a")
    started(tmp_path).ingest("planes", planes("N1"), batch_id="p")
    done = started(tmp_path).ingest("flights", sent, batch_id="a")
    assert (done.accepted, done.quarantined) == (1, {"reference:tail": 1})
    assert sorted(in_lake(tmp_path)) == [2]


def test_a_reingest_that_died_at_any_write_is_brought_to_its_end_by_the_next(tmp_path):
    class Dying(Lake):
        left = 0

        def append(self, table, rows, **more):
            if Dying.left == 0:
                raise KeyboardInterrupt
            Dying.left -= 1
            return super().append(table, rows, **more)

    for writes in range(4):  # begun, refused, landed in the lake, closed
        home = tmp_path / str(writes)
        actor = started(home)
        actor.ingest("flights", flights((1, 1.0, None), (2, -1.0, None), (3, 1.0, "N9")), batch_id="a")
        ids = [e.id for e in actor.quarantine()]
        actor.fix({e.id: {"wind": 7} for e in actor.quarantine(reason="range:wind")})
        dying, Dying.left = started(home), writes
        dying._lake = dying._held._lake = dying._known._lake = Dying(home / "lake")
        with pytest.raises(KeyboardInterrupt):
            reingested(dying, ids)
        reingested(started(home), [])
        reingested(started(home), ids)
        assert in_lake(home) == {1: 1.0, 2: 7.0}
        assert Counter(e.state for e in started(home).quarantine()) == {State.REINGESTED: 1, State.OPEN: 1}


def test_a_batch_that_comes_again_brings_the_mended_rows_too(tmp_path):
    actor, sent = started(tmp_path), flights((1, 1.0, None), (2, -1.0, None), (3, -1.0, None))
    first = actor.ingest("flights", sent, batch_id="a")
    (entry,) = [e for e in actor.quarantine() if json.loads(e.row)["id"] == 2]
    actor.fix({entry.id: {"wind": 2}})
    reingested(actor, [entry.id])
    again = actor.ingest("flights", sent, batch_id="a")
    assert (again.accepted, again.quarantined) == (first.accepted, first.quarantined)
    assert again.rows_ref.select(["id", "wind"]).to_pydict() == {"id": [1, 2], "wind": [1.0, 2.0]}


def test_rows_that_are_alike_have_ids_of_their_own_and_the_same_ones_at_every_try(tmp_path):
    sent = flights((1, -1.0, None), (1, -1.0, None))
    started(tmp_path / "x").ingest("flights", sent, batch_id="a")
    started(tmp_path / "y").ingest("flights", sent, batch_id="a")
    x, y = ([e.id for e in started(tmp_path / home).quarantine()] for home in "xy")
    assert sorted(x) == sorted(y) and len(set(x)) == 2
    actor = started(tmp_path / "x")
    actor.fix({key: {"wind": 1} for key in x})
    (done,) = reingested(actor, x)
    assert (done.accepted, done.quarantined) == (1, {"duplicate_key": 1})


def test_a_discarded_row_stays_out_and_stays_readable(tmp_path):
    actor = started(tmp_path)
    actor.ingest("flights", flights((1, -1.0, None)), batch_id="a")
    (entry,) = actor.quarantine()
    assert actor.discard([entry.id], "a broken sensor") == 1 and actor.discard([entry.id], "again") == 0
    (closed,) = actor.quarantine(state=State.DISCARDED)
    assert closed.note == "a broken sensor" and reingested(actor, [entry.id]) == []
    with pytest.raises(Conflict, match="discarded"):
        actor.fix({entry.id: {"wind": 1}})
    assert actor.tally()["quarantined"] == {"range:wind": 1}


def test_wrong_ids_and_columns_are_told_and_change_nothing(tmp_path):
    actor = started(tmp_path)
    actor.ingest("flights", flights((1, -1.0, None)), batch_id="a")
    (entry,) = actor.quarantine()
    for call in (actor.reingest, lambda ids: actor.discard(ids, ""), lambda ids: actor.fix({key: {} for key in ids})):
        with pytest.raises(UnknownRow, match="'nonsense'"):
            call([entry.id, "nonsense"])
    with pytest.raises(ContractError, match=r"wimd.*wind"):
        actor.fix({entry.id: {"wimd": 1}})
    assert actor.fix({entry.id: {"wind": "much"}})
    assert reingested(actor, [entry.id])[0].quarantined == {"type:wind": 1}
    with pytest.raises(Conflict, match="not in the lake"):
        actor._held.tell([next_step(actor.quarantine()[0], Step.BEGUN, batch_id="b")])
        actor.settle("b")
    other = DataActor(str(tmp_path), [PLANES], lambda events: None)
    actor.ingest("flights", flights((2, -1.0, None)), batch_id="b")
    with pytest.raises(ContractError, match="flights"):
        other.reingest([e.id for e in actor.quarantine(state=State.OPEN)])


WRITER = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_quarantine import reingested, started
actor = started(Path({home!r}))
while ids := [e.id for e in actor.quarantine() if not e.state.is_terminal][:7]:
    print(len(ids), flush=True)
    reingested(actor, ids)
"""


@pytest.mark.long
@pytest.mark.parametrize(("lives", "rows"), [(2, 21), pytest.param(30, 400, marks=pytest.mark.soak)])
def test_kill_9_of_a_reingest_at_any_moment_loses_and_doubles_nothing(tmp_path, lives, rows):
    choose, actor = random.Random(3), started(tmp_path)
    actor.ingest("flights", flights(*((i, -1.0, None) for i in range(rows))), batch_id="a")
    actor.fix({e.id: {"wind": json.loads(e.row)["id"] % 100} for e in actor.quarantine()})
    code = WRITER.format(here=os.path.dirname(__file__), home=str(tmp_path))
    for _ in range(lives):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
            writer.stdout.readline()
            time.sleep(choose.uniform(0, 0.12))
            writer.send_signal(signal.SIGKILL)
    actor = started(tmp_path)
    reingested(actor, [e.id for e in actor.quarantine()])
    assert in_lake(tmp_path) == {i: i % 100 for i in range(rows)}
    assert Counter(e.state for e in actor.quarantine()) == {State.REINGESTED: rows}


def entry(**more) -> Entry:
    return Entry(id="e", source="s", batch_id="b", row="{}", reason="r", wall_s=0.0, at=None, **more)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(Step), max_size=6), st.randoms())
def test_a_life_is_the_same_in_whatever_order_and_however_often_its_log_is_read(steps, shuffle):
    now, log = entry(), []
    for step in steps:
        try:
            log.append(next_step(now, step, row='{"x":1}' if step is Step.FIXED else ""))
        except Conflict:
            assert now.state.is_terminal or (now.state is State.PENDING) != (step in (Step.REFUSED, Step.LANDED))
            continue
        now = after(now, log[-1])
    read = log * 2
    shuffle.shuffle(read)
    other = Done(id="x", number=1, step=Step.DISCARDED)
    assert lived([entry()], [*read, other]) == [now]


VALUES = st.one_of(st.none(), st.floats(allow_nan=False), st.sampled_from([0.1, 1e300, 200.0, -0.0]))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(VALUES, st.sampled_from([None, "", "N1", "é\n"])), max_size=8))
def test_a_row_that_is_read_back_from_its_text_gets_the_same_verdict(rows):
    table = flights(*((i, wind, tail) for i, (wind, tail) in enumerate(rows)))
    back, strange = rows_of(json_rows(table), FLIGHTS, {})
    there, here = check(table, FLIGHTS), check(back, FLIGHTS, before=strange)
    assert here.reasons.tolist() == there.reasons.tolist() and here.accepted.equals(there.accepted)


def test_a_text_with_a_column_that_the_source_lacks_costs_its_row_alone():
    table, strange = rows_of(['{"id": 1, "time": "1970-01-01T00:00:00Z", "gone": 2}', '{"id": 2.0}'], FLIGHTS, {})
    assert strange.tolist() == ["column:gone", ""] and table["id"].to_pylist() == ["1", "2"]


def test_a_row_of_before_a_change_of_columns_is_mended_to_the_present_ones(tmp_path):
    old = Source("flights", key=["id"], time="time", schema=FLIGHTS.schema | {"gust": Col("float64", ge=0)})
    came = flights((1, 1.0, None)).append_column("gust", pa.array([-1.0]))
    DataActor(str(tmp_path), [old], lambda events: None).ingest("flights", came, batch_id="a")
    now = replace(FLIGHTS, migrations=[DropColumn("gust", was="float64")])
    actor = DataActor(str(tmp_path), [now], lambda events: None)
    actor.start()
    (entry,) = actor.quarantine()
    assert reingested(actor, [entry.id])[0].quarantined == {"column:gust": 1}
    actor.fix({entry.id: {"gust": None}})
    assert reingested(actor, [entry.id])[0].accepted == 1


def overtaken_by(home, act):
    """A data actor of another host on the same lake, whose first append `act` comes before."""

    class Slow(Lake):
        acted = False

        def append(self, table, rows, **more):
            if table == "flights" and not Slow.acted:
                Slow.acted = True
                act()
            return super().append(table, rows, **more)

    (home / "other").mkdir()
    (home / "other" / "lake").symlink_to(home / "lake")
    actor = started(home / "other")
    actor._lake = actor._known._lake = Slow(home / "lake")
    return actor


def test_two_hosts_that_append_at_once_never_take_the_same_key_twice(tmp_path):
    here = started(tmp_path)
    here.ingest("flights", flights((1, 1.0, None)), batch_id="a")
    other = overtaken_by(tmp_path, lambda: here.ingest("flights", flights((2, 1.0, None)), batch_id="b"))
    done = other.ingest("flights", flights((2, 1.0, None), (3, 1.0, None), (4, -1.0, None)), batch_id="c")
    assert (done.accepted, done.quarantined) == (1, {"duplicate_key": 1, "range:wind": 1})
    assert in_lake(tmp_path) == {1: 1.0, 2: 1.0, 3: 1.0} and len(here.quarantine()) == 2


def test_a_reingest_that_another_host_overtakes_looks_again(tmp_path):
    here = started(tmp_path)
    here.ingest("flights", flights((1, -1.0, None), (2, -1.0, None), (3, -1.0, None)), batch_id="a")
    ids = [e.id for e in here.quarantine()]
    here.fix({e.id: {"wind": 5} for e in here.quarantine() if json.loads(e.row)["id"] < 3})
    other = overtaken_by(tmp_path, lambda: here.ingest("flights", flights((2, 1.0, None)), batch_id="b"))
    (done,) = reingested(other, ids)
    assert (done.accepted, done.quarantined) == (1, {"duplicate_key": 1})
    assert in_lake(tmp_path) == {1: 5.0, 2: 1.0}
    assert Counter(e.reason for e in here.quarantine(state=State.OPEN)) == {"duplicate_key": 1, "range:wind": 1}


def test_the_log_is_a_lake_table_of_its_own_that_no_source_may_have(tmp_path):
    actor = started(tmp_path)
    actor.ingest("flights", flights((1, -1.0, None)), batch_id="a")
    actor.fix({actor.quarantine()[0].id: {"wind": 1}})
    assert Lake(tmp_path / "lake").read(LOG)["step"].to_pylist() == ["fixed"]
