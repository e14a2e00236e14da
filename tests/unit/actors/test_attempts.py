"""Versions that fail beside one that does not: what callers get, what is counted, who gets no rows any more."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymill.actors.attempts import WINDOW_S, Attempts, Batch
from raymill.actors.rollout import Role, Route
from raymill.actors.version_health import Tally
from raymill.runtime.errors import ContractError, ModelError
from tests.unit.actors.serving_parts import model

LIVE, CANARY = Route(version=1, digest="d1", role=Role.LIVE), Route(version=2, digest="d2", role=Role.CANARY)


class Clock:
    """Moves only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def good(x):
    return x[:, 0] + np.float32(1)


def canary(x):
    return x[:, 0] + np.float32(2)


def raises(x):
    raise ValueError("no such column")


def nothing(x):
    return np.full(len(x), np.nan, np.float32)


def picky(x):
    """Fails on rows below zero, by raising if there is one below minus ten."""
    if (x[:, 0] < -10).any():
        raise RuntimeError("picky")
    return np.where(x[:, 0] < 0, np.nan, x[:, 0] + 2).astype(np.float32)


def batch(sizes, chosen, programs, x=None, pinned=None):
    """Questions of so many rows; `chosen` is the place of each row."""
    rows = sum(sizes)
    return Batch(
        spec=model((1, "live", 0.5), (2, "canary", 0.5)),
        routes=(LIVE, CANARY),
        programs=dict(enumerate(programs, start=1)),
        x=np.arange(rows, dtype=np.float32)[:, None] if x is None else np.asarray(x, np.float32)[:, None],
        rows=sizes,
        pinned=pinned or [False] * len(sizes),
        chosen=np.array(chosen),
    )


def computed(attempts, found):
    attempts.compute(found)
    return found


@pytest.mark.parametrize("broken", [raises, nothing])
def test_a_canary_that_always_fails_costs_nobody_an_answer_and_soon_gets_no_rows(broken):
    attempts, calls = Attempts(), []

    def program(x):
        calls.append(len(x))
        return broken(x)

    for _ in range(20):
        found = computed(attempts, batch([1, 2, 1], [0, 1, 1, 1], [good, program]))
        assert found.errors == {}
        assert found.p.tolist() == [1, 2, 3, 4]
        assert found.chosen.tolist() == [0, 0, 0, 0]
    assert len(calls) == 3
    assert list(attempts.benched) == [("taxi", 2)]
    assert attempts.tallies()["taxi"][2].failed == 3
    assert attempts.tallies()["taxi"][1].failed == 0


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12), st.data())
def test_whatever_a_canary_fails_on_every_caller_gets_what_the_version_named_gives(values, data):
    chosen = data.draw(st.lists(st.sampled_from([0, 1]), min_size=len(values), max_size=len(values)))
    found = computed(Attempts(), batch([1] * len(values), chosen, [good, picky], x=values))
    assert found.errors == {}
    wanted = [good, picky]
    for value, place, p in zip(values, found.chosen.tolist(), found.p.tolist(), strict=True):
        assert p == wanted[place](np.array([[value]], np.float32))[0]


def test_who_pins_a_failing_version_is_told_and_the_others_are_answered():
    found = computed(Attempts(), batch([1, 1], [1, 1], [good, raises], pinned=[True, False]))
    assert isinstance(found.errors[0], ModelError)
    assert (list(found.errors), found.p[1], found.chosen[1]) == ([0], 2, 0)


def test_a_row_that_no_version_answers_is_its_callers_error_and_counts_against_no_canary():
    attempts = Attempts()
    found = computed(attempts, batch([1, 1], [1, 1], [nothing, nothing], x=[1e30, 1e30]))
    assert [type(e) for e in found.errors.values()] == [ContractError, ContractError]
    assert {v: t.failed for v, t in attempts.tallies()["taxi"].items()} == {1: 0, 2: 0}


def test_one_callers_row_on_which_the_live_version_raises_is_that_callers_error_alone():
    def program(x):
        if (x < 0).any():
            raise ValueError("negative")
        return x[:, 0]

    attempts = Attempts()
    found = computed(attempts, batch([1, 2, 1], [0] * 4, [program, canary], x=[1, 2, -3, 4]))
    assert list(found.errors) == [1]
    assert (found.p[0], found.p[3]) == (1, 4)
    assert attempts.tallies()["taxi"][1].failed == 0


def test_a_live_version_without_finite_answers_to_ordinary_inputs_is_counted_as_failing():
    attempts = Attempts()
    for x in ([1.0], [np.nan], [1e30]):
        computed(attempts, batch([1], [0], [nothing, canary], x=x))
    assert attempts.tallies()["taxi"][1].failed == 2


def test_a_canary_slower_than_the_target_gets_no_rows_once_live_is_known_to_be_faster():
    clock = Clock()
    attempts = Attempts(clock)

    def slow(x):
        clock.now += 0.04  # the target is 50 ms, a batch may take half of it
        return canary(x)

    for _ in range(100):
        computed(attempts, batch([1, 1], [0, 1], [good, slow]))
    assert "it is slow" in attempts.benched[("taxi", 2)]
    assert attempts.tallies()["taxi"][2].calls < 20


def test_what_is_older_than_the_window_is_forgotten_and_a_version_that_comes_back_begins_anew():
    clock = Clock()
    attempts = Attempts(clock)
    attempts.follow([("taxi", 1), ("taxi", 2)])
    computed(attempts, batch([1], [1], [good, raises]))
    attempts.follow([("taxi", 1)])
    assert attempts.tallies()["taxi"][2].failed == 1  # what it was like is known for a while
    attempts.follow([("taxi", 1), ("taxi", 2)])
    assert attempts.tallies()["taxi"][2] == Tally()
    computed(attempts, batch([1], [1], [good, raises]))
    clock.now += WINDOW_S + WINDOW_S / 6
    assert attempts.tallies()["taxi"][2] == Tally()
