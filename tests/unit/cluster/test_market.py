import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.cluster.market import UNLIMITED, capacity_at, schedule, victims
from raymill.runtime.errors import SpecError


def test_a_trace_becomes_wall_times_scaled_with_its_notices():
    steps = schedule([{"at_s": 10, "available": False, "notice_s": 4}, {"at_s": 30, "available": True}], 1000.0, 0.5)
    assert [(s.wall_s, s.capacity, s.notice_s) for s in steps] == [(1005.0, 0, 2.0), (1015.0, UNLIMITED, 0.0)]


def test_the_market_has_enough_before_its_first_step_and_what_the_last_step_says_after_it():
    steps = schedule([{"at_s": 1, "available": 2}, {"at_s": 2, "available": 0}], 0.0)
    assert [capacity_at(steps, t) for t in (0.5, 1.0, 1.9, 2.0, 99.0)] == [UNLIMITED, 2, 2, 0, 0]


def test_a_wrong_entry_of_a_trace_is_named():
    for entry in ({"available": True}, {"at_s": -1, "available": True}, {"at_s": 0}, {"at_s": 0, "available": "yes"}):
        with pytest.raises(SpecError, match="entry 1"):
            schedule([{"at_s": 0, "available": True}, entry], 0.0)
    with pytest.raises(SpecError, match="scale"):
        schedule([], 0.0, 0)


nodes = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.floats(0, 1e6), max_size=8)


@settings(max_examples=100, deadline=None)
@given(nodes, st.data(), st.integers(0, 9))
def test_what_stays_fits_the_capacity_is_older_than_what_goes_and_nobody_is_told_twice(spot, data, capacity):
    noticed = frozenset(data.draw(st.sets(st.sampled_from(sorted(spot))))) if spot else frozenset()
    gone = victims(spot, noticed, capacity)
    staying = set(spot) - noticed - set(gone)
    assert len(staying) == min(capacity, len(set(spot) - noticed))
    assert not noticed & set(gone) and len(set(gone)) == len(gone)
    assert all(spot[s] <= spot[g] for s in staying for g in gone)
