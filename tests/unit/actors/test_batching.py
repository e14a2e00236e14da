"""The waiting line before a model."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raymill.actors.batching import Pace, WaitingLine
from raymill.runtime.errors import Overloaded


def test_a_batch_is_whatever_waits_and_fits():
    line = WaitingLine(max_batch_rows=5, max_rows=100)
    for request in ("ab", "cd", "ef", "g"):
        line.offer(request)
    assert [line.take(), line.take(), line.take()] == [["ab", "cd"], ["ef", "g"], []]


def test_a_request_larger_than_a_batch_is_taken_alone():
    line = WaitingLine(max_batch_rows=2, max_rows=100)
    line.offer("abcdef")
    line.offer("g")
    assert [line.take(), line.take()] == [["abcdef"], ["g"]]


def test_a_full_line_refuses_and_takes_nothing():
    line = WaitingLine(max_batch_rows=2, max_rows=3)
    line.offer("ab")
    with pytest.raises(Overloaded, match="2 rows wait"):
        line.offer("cd")
    assert (line.rows, len(line)) == (2, 1)


@given(st.lists(st.one_of(st.none(), st.integers(1, 9)), max_size=60))
def test_requests_leave_whole_in_order_and_batches_stay_within_bounds(moves):
    line, given_, taken = WaitingLine(max_batch_rows=6, max_rows=20), [], []
    for n, move in enumerate(moves):
        if move is None:
            batch = line.take()
            assert sum(map(len, batch)) <= 6 or len(batch) == 1
            taken += batch
        else:
            try:
                line.offer([n] * move)
                given_.append([n] * move)
            except Overloaded:
                assert line.rows + move > 20
        assert line.rows == sum(map(len, given_)) - sum(map(len, taken)) <= 20
    while batch := line.take():
        taken += batch
    assert taken == given_


@settings(deadline=None)
@example(fixed_s=0.00390625, row_s=1e-05, waiting=196, target_s=0.01171875)  # one row takes nearly what many do
@given(st.floats(0, 0.02), st.floats(1e-5, 0.02), st.integers(50, 400), st.floats(0.01, 0.2))
def test_batches_grow_as_far_as_the_latency_target_allows_and_no_further(fixed_s, row_s, waiting, target_s):
    """A model of stated cost under 10 times the load it can bear: a batch takes half of the target, or is one row."""
    pace, line = Pace(), WaitingLine(max_batch_rows=1024, max_rows=10**6)
    took = []
    for _ in range(60):
        for _ in range(waiting):
            line.offer("a")
        rows = len(line.take(pace.rows_within(target_s / 2)))
        took.append((rows, fixed_s + rows * row_s))
        pace.note(*took[-1])
    for rows, seconds in took[40:]:
        assert rows == 1 or seconds <= 2 * target_s / 2
    bound = (target_s / 2 - fixed_s) / row_s
    assert took[-1][0] >= min(waiting, bound / 4, 1024)


def test_a_size_learned_from_a_slow_start_is_learned_again():
    pace = Pace()
    pace.note(1, 5.0)
    assert pace.rows_within(0.025) == 1
    for _ in range(120):
        pace.note(1, 0.0001)
    assert pace.rows_within(0.025) > 50
