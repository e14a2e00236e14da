"""Which versions have to go: bounds that hold, and what the counts must and must not lead to."""

from math import comb

from hypothesis import given
from hypothesis import strategies as st

from raymill.actors.version_health import (
    ERROR,
    FAILED_CANARY,
    Tally,
    at_least,
    at_most,
    illness,
    pooled,
    slow_s,
    verdict,
)

COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(COUNTS)
def test_bounds_enclose_the_share(counts):
    hits, of = counts
    assert 0 <= at_least(hits, of) <= hits / of <= at_most(hits, of) <= 1


@given(st.integers(1, 60), st.floats(0.001, 0.999))
def test_a_bound_is_wrong_as_seldom_as_it_says(of, share):
    wrong = sum(
        comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(of + 1) if at_least(k, of) > share + 1e-9
    )
    assert wrong <= ERROR * 1.001


@given(COUNTS, COUNTS)
def test_a_canary_within_its_bounds_is_kept_and_every_reason_has_its_figures(mine, others):
    version, other = Tally(failed=mine[0], calls=mine[1]), Tally(slow=others[0], calls=others[1])
    why = verdict(version, other, canary=True)
    assert bool(why) == (at_least(*mine) > FAILED_CANARY)
    assert not why or f"{mine[0]} of {mine[1]}" in why


@given(COUNTS, COUNTS)
def test_slow_is_what_the_other_version_is_not(mine, others):
    version, other = Tally(slow=mine[0], calls=mine[1]), Tally(slow=others[0], calls=others[1])
    if verdict(version, other, canary=True):
        assert mine[0] / mine[1] > others[0] / others[1]
        assert verdict(other, version, canary=True) == ""


def test_three_failures_of_three_are_enough_and_two_are_not():
    assert verdict(Tally(calls=2, failed=2), Tally(), canary=True) == ""
    assert "no such column" in verdict(Tally(calls=3, failed=3, why="no such column"), Tally(), canary=True)


def test_a_version_that_always_exceeds_the_target_goes_once_the_other_is_known_to_hold_it():
    slow = Tally(calls=8, slow=8, seconds=16.0)
    assert verdict(slow, Tally(), canary=True) == ""
    assert "2000.0 ms each" in verdict(slow, Tally(calls=100), canary=True)
    assert verdict(slow, Tally(calls=100, slow=90), canary=True) == ""  # the machine is slow, not the version


def test_the_live_version_is_given_more_than_a_canary():
    few = Tally(calls=1000, failed=50)
    assert verdict(few, Tally(), canary=True)
    assert verdict(few, Tally(), canary=False) == ""
    assert verdict(Tally(calls=1000, failed=200), Tally(), canary=False)


def test_a_live_version_is_ill_where_most_of_its_batches_fail_not_where_a_few_do():
    assert illness(Tally(calls=13, failed=13)) == ""
    assert "14 of 14 batches failed; it raises" in illness(Tally(calls=14, failed=14, why="it raises"))
    assert illness(Tally(calls=1000, failed=400)) == ""
    assert illness(Tally(calls=1000, slow=1000)) == ""  # slow is not ill: overload leaves it green


def test_replicas_are_taken_together():
    found = pooled([{1: Tally(calls=2, failed=1, why="a")}, {1: Tally(calls=3, failed=3, why="b"), 2: Tally(calls=1)}])
    assert found == {1: Tally(calls=5, failed=4, why="b"), 2: Tally(calls=1)}
    assert slow_s(50) == 0.025
