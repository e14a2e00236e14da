"""Rows of several callers read together: each gets what it gets alone, and one caller's fault is nobody else's."""

import asyncio
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors import wire
from raymill.actors.answering import HttpCall
from raymill.actors.gathering import RowTicket
from raymill.actors.row_bodies import is_one_row, read_together
from raymill.runtime.errors import RaymillError
from tests.unit.actors.serving_parts import model, replica

ID = re.compile(r'"id":"[0-9A-HJKMNP-TV-Z]{26}"')
SPEC = model((1, "live", 1.0))
NOW = 1_700_000_000_000_000
AT = st.sampled_from([None, NOW, "2013-05-01T09:15:00Z", "2013-05-01T11:15:00+02:00"])
GOOD = {
    "zone": st.text(max_size=5),
    "miles": st.one_of(st.none(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False)),
    "trip": st.integers(-(2**63), 2**63 - 1),
    "start": st.one_of(st.integers(0, 2 * NOW), st.just("2013-05-01T09:15:00Z")),
    "night": st.one_of(st.none(), st.booleans()),
    "at": AT,
    "id": st.uuids().map(str),
}
ODD = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.just([]), st.floats(), st.just({}))


def objects(values):
    """Rows with all columns a model needs, others or not."""
    needed = {name: values[name] for name in ("zone", "miles")}
    return st.fixed_dictionaries(needed, optional={n: v for n, v in values.items() if n not in needed})


def documents(rows):
    return st.builds(lambda row, at: {"rows": [row], **at}, rows, st.fixed_dictionaries({}, optional={"at": AT}))


GOOD_BODIES = documents(objects(GOOD)).map(json.dumps).map(str.encode)
ANY_BODIES = st.one_of(
    GOOD_BODIES,
    documents(objects({name: st.one_of(good, ODD) for name, good in GOOD.items()})).map(json.dumps).map(str.encode),
    documents(st.dictionaries(st.sampled_from([*GOOD, "strange"]), ODD)).map(json.dumps).map(str.encode),
    st.builds(lambda odd: json.dumps({"rows": odd}).encode(), ODD),
    st.builds(lambda whole, cut: whole[:cut], GOOD_BODIES, st.integers(0, 60)),
    st.binary(max_size=20),
)


def told(rows, body):
    """All that is read, but for an id that nobody gave."""
    given = json.loads(body)["rows"][0].get("id") is not None
    return (rows.ids if given else len(rows.ids), rows.at.tolist(), rows.columns.to_pylist(), rows.keys, rows.texts)


@given(st.lists(ANY_BODIES, min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_what_is_read_together_is_what_each_says_alone(bodies):
    for body, rows in zip(bodies, read_together(bodies, SPEC, NOW), strict=True):
        try:
            alone = wire.read_json(body, SPEC, NOW)
        except RaymillError:
            assert rows is None
            continue
        if rows is not None:
            assert told(rows, body) == told(alone, body)
            assert rows.columns.schema == alone.columns.schema


@given(st.lists(GOOD_BODIES, min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_callers_who_send_good_rows_are_all_read_together(bodies):
    fine = []
    for body in bodies:
        try:
            wire.read_json(body, SPEC, NOW)
            fine.append(body)
        except RaymillError:  # an integer that is no float64
            continue
    assert None not in read_together(fine, SPEC, NOW)


@pytest.mark.parametrize(
    ("body", "one"),
    [
        (b'{"rows":[{"zone":"a","miles":1}]}', True),
        (b'{"rows":[{"zone":"{","miles":1}]}', False),
        (b'{"rows":[{"zone":"a"},{"zone":"b"}]}', False),
        (b'{"rows":[{"zone":"%b","miles":1}]}' % (b"a" * (16 << 10)), False),
    ],
)
def test_a_body_is_taken_for_one_row_only_where_it_can_have_no_more(body, one):
    assert is_one_row(body) == one


async def ask(found, bodies, bare):
    replies = [asyncio.get_running_loop().create_future() for _ in bodies]
    tickets = [
        found.submit(HttpCall("taxi", False, None, {}, b, bare), f.set_result)
        for b, f in zip(bodies, replies, strict=True)
    ]
    answered = [(r.status, ID.sub('"id":"*"', r.body.decode())) for r in await asyncio.gather(*replies)]
    return answered, sum(isinstance(t, RowTicket) for t in tickets)


@given(st.lists(ANY_BODIES.filter(is_one_row), min_size=1, max_size=12))
@settings(max_examples=20, deadline=None)
def test_both_ways_answer_alike_whoever_else_is_in_the_batch(tmp_path_factory, bodies):
    async def test():
        found = await replica(tmp_path_factory.mktemp("rows"), SPEC)
        # Ids that were answered keep their answer: each way gets a replica of its own.
        other = await replica(tmp_path_factory.mktemp("rows"), SPEC)
        quick, together = await ask(found, bodies, True)
        plain, apart = await ask(other, bodies, False)
        return quick, plain, together, apart

    quick, plain, together, apart = asyncio.run(test())
    assert quick == plain
    assert (together, apart) == (len(bodies), 0)


def test_a_row_that_can_not_be_looked_up_is_its_own_callers_error(tmp_path):
    bodies = [
        json.dumps({"rows": [{"zone": "nowhere" if i == 3 else "a", "miles": float(i)}], "at": NOW}).encode()
        for i in range(8)
    ]

    async def test():
        return await ask(await replica(tmp_path, SPEC), bodies, True)

    answers, together = asyncio.run(test())
    assert [status for status, _ in answers] == [200] * 3 + [422] + [200] * 4
    assert "nowhere" in answers[3][1]
    assert together == 8
    values = [json.loads(b)["predictions"][0]["long"] for i, (_, b) in enumerate(answers) if i != 3]
    assert values == pytest.approx([0.1 + i / 1000 for i in range(8) if i != 3])
