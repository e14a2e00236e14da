"""Who is refused when more is asked than can be answered in time: a simulated line before a model of stated cost."""

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.admission import LEAST_PATIENCE_S, MARGIN, Admission
from raymill.actors.batching import Pace, WaitingLine


@dataclass
class Seen:
    """What became of the requests."""

    in_time: int = 0
    late: int = 0
    refused_at: list[float] = field(default_factory=list)
    given_up: int = 0
    longest_line: int = 0


def simulate(arrivals, *, target_s, fixed_s, row_s):
    """A lane as `lane.Lane` is, one batch at a time."""
    admission, pace = Admission(target_s), Pace()
    line, seen, now, due = WaitingLine(max_batch_rows=1024, max_rows=10**9), Seen(), 0.0, deque(arrivals)
    last_end = 0.0

    def admit(until):
        while due and due[0] <= until:
            at = due.popleft()
            if line and line.rows + 1 > admission.most_rows and admission.refuses(at, 1):
                seen.refused_at.append(at)
            else:
                line.offer((at,))
        seen.longest_line = max(seen.longest_line, line.rows)

    while due or line:
        if not line:
            now = max(now, due[0])
            admit(now)
        taken = [t for (t,) in line.take(pace.rows_within(target_s / 2))]
        batch = [t for t in taken if now - t <= admission.patience_s]
        seen.given_up += len(taken) - len(batch)
        if not batch:
            continue
        seconds = fixed_s + row_s * len(batch)
        now += seconds
        admit(now)
        pace.note(len(batch), seconds)
        admission.turned(now, len(batch), now - max(last_end, batch[0]), now - batch[0])
        last_end = now
        in_time = sum(now - t <= target_s for t in batch)
        seen.in_time += in_time
        seen.late += len(batch) - in_time
    return seen


def poisson(rate, seconds, seed=0):
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 1.2) + 10)
    times = np.cumsum(gaps)
    return times[times < seconds].tolist()


def capacity(target_s, fixed_s, row_s):
    """Rows a second in batches that take half of the target."""
    rows = min(max((target_s / 2 - fixed_s) / row_s, 1), 1024)
    return rows / (fixed_s + rows * row_s)


def overloaded(target_s=0.05):
    """An admission that has seen callers wait too long for a second, 100 rows a second being answered."""
    found = Admission(target_s)
    for n in range(20):
        found.turned(now_s=0.05 * n, rows=5, seconds=0.05, waited_s=1.0)
    return found


TARGET_S = 0.05
COSTS = [(0.0, 0.005), (0.005, 0.0005), (0.01, 0.0002)]
"""Seconds of a batch and of each of its rows: a slow model, one with a cost a call, one that is fast in batches."""


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("load", [2, 10])
def test_what_is_answered_in_time_holds_at_ten_times_the_load(cost, load):
    """Ten seconds, those included in which nothing is refused yet; and nobody is later than that line was long."""
    can = capacity(TARGET_S, *cost)
    seen = simulate(poisson(can * load, 10), target_s=TARGET_S, fixed_s=cost[0], row_s=cost[1])
    assert seen.in_time >= 0.9 * can * 10
    assert seen.longest_line <= load * can * 3 * LEAST_PATIENCE_S
    assert len(seen.refused_at) + seen.given_up >= (load - 1.1) * can * 10


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
def test_nobody_is_refused_below_what_the_model_can_do(cost, load):
    arrivals = poisson(capacity(TARGET_S, *cost) * load, 10)
    seen = simulate(arrivals, target_s=TARGET_S, fixed_s=cost[0], row_s=cost[1])
    assert (seen.refused_at, seen.given_up) == ([], 0)
    assert seen.in_time >= 0.9 * len(arrivals)


@pytest.mark.parametrize("cost", COSTS)
def test_a_short_burst_is_answered_whole(cost):
    """Twenty times the latency's worth of work at once would last; a fifth of a second's does not."""
    can = capacity(TARGET_S, *cost)
    arrivals = sorted(poisson(can * 0.3, 5) + [2.0] * int(can * 0.2))
    seen = simulate(arrivals, target_s=TARGET_S, fixed_s=cost[0], row_s=cost[1])
    assert (seen.refused_at, seen.given_up, seen.in_time + seen.late) == ([], 0, len(arrivals))


def test_after_an_overload_nobody_is_refused_any_more():
    can = capacity(TARGET_S, *COSTS[0])
    crowd, quiet = poisson(can * 10, 3), [t + 3 for t in poisson(can * 0.5, 10, seed=1)]
    seen = simulate(crowd + quiet, target_s=TARGET_S, fixed_s=COSTS[0][0], row_s=COSTS[0][1])
    assert 0 < max(seen.refused_at) < 4


def test_callers_are_told_to_come_when_those_refused_could_have_been_answered():
    admission, told = overloaded(), []
    for n in range(4000):  # a thousand rows a second, a tenth of which is answered
        if admission.refuses(1 + n / 1000, 1):
            told.append(admission.retry_after_s)
        if n % 50 == 0:
            admission.turned(1 + n / 1000, 5, 0.05, 0.05)
    assert (told[0], told[-1]) == (1, 11)  # 1,001 rows were refused in the second that was counted


def test_a_target_that_no_request_can_meet_leaves_a_few_turns_in_line():
    admission = Admission(0.05)
    for n in range(30):
        admission.turned(0.2 * n, 4, 0.2, 1.0)  # five turns
    assert not admission.is_overloaded
    for n in range(30, 60):
        admission.turned(0.2 * n, 4, 0.2, 2.0)
    assert admission.is_overloaded
    assert admission.most_rows >= 2 * 4
    assert admission.patience_s >= 0.8


def test_the_first_slow_turns_of_a_model_are_no_overload():
    admission = Admission(0.05)
    for n in range(4):
        admission.turned(2.0 * n, 1, 2.0, 2.0)
    assert not admission.is_overloaded


def test_what_comes_long_after_an_overload_is_not_held_against_it():
    admission = overloaded()
    assert admission.refuses(1.0, 1)
    assert not admission.refuses(100.0, 1)
    assert (admission.is_overloaded, admission.most_rows) == (False, math.inf)


@settings(deadline=None, max_examples=30)
@given(
    fixed_s=st.floats(0, 0.02),
    row_s=st.floats(1e-4, 0.02),
    load=st.floats(0.1, 12),
    target_s=st.floats(0.01, 0.3),
    seed=st.integers(0, 9),
)
def test_whatever_it_costs_refusals_are_for_late_turns_alone_and_the_line_never_dries(
    fixed_s, row_s, load, target_s, seed
):
    can = capacity(target_s, fixed_s, row_s)
    load = min(load, 5000 / can)
    arrivals = poisson(can * load, 4, seed)
    seen = simulate(arrivals, target_s=target_s, fixed_s=fixed_s, row_s=row_s)
    refused = len(seen.refused_at) + seen.given_up
    assert seen.in_time + seen.late + refused == len(arrivals)
    if seen.refused_at and load > 1.2:
        assert seen.refused_at[0] >= max(LEAST_PATIENCE_S, MARGIN * target_s)
        # The model had work all the time: what it answered is what it can do in batches of any size.
        least = 1 / (fixed_s + row_s)
        assert seen.in_time + seen.late >= 0.5 * min(least, can) * (arrivals[-1] - arrivals[0])
