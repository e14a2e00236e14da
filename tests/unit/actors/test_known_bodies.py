"""Bodies of a known form: every caller gets what the ordinary way gives, whoever else is in the batch."""

import asyncio
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.answering import HttpCall
from raymill.actors.gathering import KnownTicket
from raymill.actors.known_bodies import MOST_FORMS, KnownBodies
from raymill.actors.rollout import to_user_config
from tests.unit.actors.serving_parts import model, replica

ID = re.compile(rb"[0-9A-HJKMNP-TV-Z]{26}")
PLAIN = model((1, "live", 1.0), plan=None)
SPLIT = model((1, "live", 0.5), (2, "canary", 0.5), plan=None)
NUMBERS = st.one_of(st.floats(-1e6, 1e6), st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers())
SPACES = st.sampled_from([None, (", ", ": "), (" ,\n", ":")])


def body(numbers, *, nested=False, name=None, swapped=False, spaces=None):
    """A request of one row, as this or that client writes it."""
    tensor = {"name": "features", "shape": [1, 2], "datatype": "FP32", "data": [numbers] if nested else numbers}
    parts = {"inputs": [dict(reversed(tensor.items())) if swapped else tensor]} | ({"id": name} if name else {})
    return json.dumps(parts, separators=spaces).encode()


async def ask(found, bodies, bare):
    """Replies to calls that stand in line together, prediction ids left out."""
    replies = [asyncio.get_running_loop().create_future() for _ in bodies]
    tickets = [
        found.submit(HttpCall("taxi", True, None, {}, b, bare), f.set_result)
        for b, f in zip(bodies, replies, strict=True)
    ]
    return [(r.status, ID.sub(b"*", r.body)) for r in await asyncio.gather(*replies)], tickets


def both_ways(tmp_path, spec, bodies, learned):
    async def test():
        found = await replica(tmp_path, spec)
        await ask(found, learned, True)
        quick, tickets = await ask(found, bodies, True)
        plain, _ = await ask(found, bodies, False)
        return quick, plain, sum(isinstance(t, KnownTicket) for t in tickets)

    return asyncio.run(test())


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_known_bodies_get_what_the_ordinary_way_gives(tmp_path_factory, data):
    shape = {
        "nested": data.draw(st.booleans()),
        "name": data.draw(st.sampled_from([None, "a", '{"prediction_id":"x"}', "[1,2]"])),
        "swapped": data.draw(st.booleans()),
        "spaces": data.draw(SPACES),
    }
    rows = data.draw(st.lists(st.lists(NUMBERS, min_size=1, max_size=3), min_size=1, max_size=40))
    bodies = [body(numbers, **shape) for numbers in rows]
    quick, plain, known = both_ways(tmp_path_factory.mktemp("known"), PLAIN, bodies, [body([1, 2.5], **shape)])
    assert quick == plain
    assert known == len(bodies)


@given(st.lists(st.binary(max_size=12), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_whatever_stands_between_the_known_ends_is_answered_as_ever(tmp_path_factory, middles):
    before, after = body([1, 2.5]).split(b"1, 2.5")
    bodies = [before + m + after for m in middles]
    quick, plain, known = both_ways(tmp_path_factory.mktemp("known"), PLAIN, bodies, [body([1, 2.5])])
    assert quick == plain
    assert known == len(bodies)


def test_versions_share_callers_by_prediction_id_and_each_answer_says_which(tmp_path):
    bodies = [body([i, 1]) for i in range(200)]
    quick, _, _ = both_ways(tmp_path, SPLIT, bodies, [body([1, 2.5])])
    seen = set()
    for i, (status, text) in enumerate(quick):
        document = json.loads(text)
        version = int(document["model_version"])
        seen.add(version)
        assert status == 200
        assert document["outputs"][0]["data"][0] == pytest.approx(version / 10 + i / 1000, rel=1e-6)
    assert seen == {1, 2}


def test_one_callers_row_that_fails_is_that_callers_error(tmp_path):
    def load(data):
        return lambda x: np.where(x[:, 0] < 0, np.nan, x[:, 0]).astype(np.float32)

    async def test():
        found = await replica(tmp_path)
        found.models.load = load
        await found.reconfigure(to_user_config([PLAIN]))
        await ask(found, [body([1, 2.5])], True)
        return (await ask(found, [body([i, 1]) for i in (3, -1, 4)], True))[0]

    replies = asyncio.run(test())
    assert [status for status, _ in replies] == [200, 422, 200]
    assert b"[3.0]" in replies[0][1] and b"[4.0]" in replies[2][1]


def test_a_caller_who_has_left_is_given_nothing_and_takes_nobodys_answer(tmp_path):
    async def test():
        found = await replica(tmp_path, PLAIN)
        await ask(found, [body([1, 2.5])], True)
        got = {}
        tickets = [
            found.submit(HttpCall("taxi", True, None, {}, body([i, 1]), True), lambda r, i=i: got.setdefault(i, r.body))
            for i in range(5)
        ]
        tickets[2].left = True
        while len(got) < 4:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        return got

    got = asyncio.run(test())
    assert sorted(got) == [0, 1, 3, 4]
    for i, text in got.items():
        assert json.loads(text)["outputs"][0]["data"] == [float(np.float32(0.1 + np.float32(i / 1000)))]


def test_a_model_that_takes_other_inputs_now_forgets_its_forms(tmp_path):
    async def test():
        found = await replica(tmp_path, PLAIN)
        await ask(found, [body([1, 2.5])] * 2, True)
        await found.reconfigure(
            to_user_config([model((1, "live", 1.0), plan=None, inputs=("miles", "minute", "more"))])
        )
        return await ask(found, [body([1, 2.5])], True)

    replies, _ = asyncio.run(test())
    assert replies[0][0] == 400
    assert b"[rows, 3]" in replies[0][1]


@pytest.mark.parametrize(
    "odd",
    [
        body([1, 2.5], name="[1, 2.5]").replace(b'"data": [1, 2.5]', b'"data": [1, null]'),
        json.dumps(
            {"inputs": [{"name": "features", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
        ).encode(),
        b"[1, 2]",
        b"",
    ],
)
def test_what_has_no_form_is_not_learned(odd):
    known = KnownBodies(PLAIN)
    known.learn(odd)
    assert known.find(odd) is None


def test_only_so_many_forms_are_known_and_names_in_bodies_do_not_cost_each_caller():
    known = KnownBodies(PLAIN)
    for i in range(1000):
        known.learn(body([1, 2.5], name=f"n{i}"))
    assert len([i for i in range(1000) if known.find(body([1, 2.5], name=f"n{i}"))]) <= MOST_FORMS
