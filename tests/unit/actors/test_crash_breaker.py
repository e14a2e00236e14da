"""Programs whose load ends processes: how many die of them, and that a good one is never given up."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from raymill.actors.crash_breaker import HOLD_S, LONGEST_HOLD_S, Death, Step, decide, tried

LOADS = st.lists(st.tuples(st.floats(0, 2 * HOLD_S), st.booleans()), min_size=1, max_size=30)
"""For each load: how long after the one before, and whether its process is killed meanwhile for another reason."""


def play(loads, *, deadly=False, deadly_alone=False):
    """What was done at each load: (step, moment, whether its process died)."""
    deaths, trial, now_s, found = [], None, 1e9, []
    for gap_s, killed in loads:
        now_s += gap_s
        step = decide(deaths, trial, now_s).step
        if step is Step.TRY_ALONE:
            trial = tried(trial, deaths, "SIGABRT" if deadly_alone else "", now_s)
            step = decide(deaths, trial, now_s).step
            assert step is (Step.REFUSE if deadly_alone else Step.LOAD), "a trial says what is to be done"
        dies = step is Step.LOAD and (deadly or killed)
        if dies:
            deaths.append(Death(now_s, "process 7"))
        elif step is Step.LOAD:
            deaths, trial = [], None
        found.append((step, now_s, dies))
    return found, deaths, trial, now_s


@given(LOADS)
def test_a_program_that_crashes_ends_one_process_that_was_needed_and_no_other(loads):
    found, *_ = play(loads, deadly=True, deadly_alone=True)
    assert [dies for *_, dies in found] == [True] + [False] * (len(loads) - 1)


@given(LOADS)
def test_one_that_crashes_only_here_is_held_back_for_longer_each_time(loads):
    found, *_ = play(loads, deadly=True)
    at = [now_s for _, now_s, dies in found if dies]
    for n, (before_s, after_s) in enumerate(pairwise(at[1:])):
        assert after_s - before_s >= min(HOLD_S * 2**n, LONGEST_HOLD_S)


@given(LOADS)
def test_a_good_program_is_refused_only_after_two_kills_and_comes_back_by_itself(loads):
    found, deaths, trial, now_s = play(loads)
    for n, (step, *_) in enumerate(found):
        assert step is Step.LOAD or sum(dies for *_, dies in found[:n]) >= 2
    later_s = now_s + LONGEST_HOLD_S
    if decide(deaths, trial, later_s).step is Step.TRY_ALONE:
        trial = tried(trial, deaths, "", later_s)
    assert decide(deaths, trial, later_s).step is Step.LOAD


@given(LOADS, st.floats(-1e8, 0))
def test_a_clock_that_was_set_back_holds_nothing_back(loads, back_s):
    _, deaths, trial, now_s = play(loads, deadly=True, deadly_alone=True)
    first_s = now_s - sum(gap_s for gap_s, _ in loads[1:])
    assert decide(deaths, trial, first_s - 1 + back_s).step is Step.TRY_ALONE


def test_who_is_refused_is_told_who_died_of_it_and_where():
    deaths = [Death(100.0, "replica a (process 7)"), Death(200.0, "replica b (process 8)")]
    trial = tried(None, deaths, "SIGABRT, at <code>, line 2", 300.0)
    why = decide(deaths, trial, 300.0).why
    assert "replica b (process 8) and 1 others before" in why and "SIGABRT, at <code>, line 2" in why
    assert why.endswith("it may try again in 10 min")
    assert "came through" in decide([*deaths, Death(400.0, "c")], tried(None, deaths, "", 300.0), 400.0).why
