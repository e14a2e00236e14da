"""The number of replicas: on a simulated endpoint whose line grows when more comes than its replicas can answer."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.load_meter import LoadMeter, as_stats, from_stats
from raymill.actors.scaling import MOST_PATIENCE, SETTLE_S, Load, Memory, Scaling, Seen, decide

SCALING = Scaling(fewest=1, most=8, p99_s=0.05, cooldown_s=20.0, idle_s=60.0)
STEP_S = 0.5
START_S = 4.0
CAPACITY = 1000.0


def simulate(rate, seconds, scaling=SCALING, noise=lambda step: 1.0):
    """[(time, running, target, delay, reason)] of an endpoint that `rate(t)` requests a second come to."""
    memory, target, running, starting = Memory(), max(scaling.fewest, 1), max(scaling.fewest, 1), []
    line, asked_s, found = 0.0, 0.0, []
    for step in range(int(seconds / STEP_S)):
        now = step * STEP_S
        running += sum(at <= now for at in starting)
        starting = [at for at in starting if at > now]
        arrivals = rate(now) * STEP_S * noise(step)
        served = min(line + arrivals, running * CAPACITY * STEP_S)
        line += arrivals - served
        asked_s = now if arrivals else asked_s
        busy = served / (running * CAPACITY * STEP_S) if running else 0.0
        delay = line / (running * CAPACITY) if running else math.inf
        load = Load(
            delay_s=delay + 0.002, service_s=0.004, rows_per_s=arrivals / STEP_S, busy=busy, idle_s=now - asked_s
        )
        seen = Seen(now_s=now, loads=(load,) * running, running=running, target=target, waiting=line)
        wanted = decide(seen, scaling, memory)
        memory = wanted.memory
        assert 0 <= wanted.replicas <= scaling.most
        starting += [now + START_S] * (wanted.replicas - target)
        running -= max(0, target - wanted.replicas)
        target = wanted.replicas
        found.append((now, running, target, delay, wanted.reason))
    return found


def changes(found):
    return [(now, reason) for now, _, _, _, reason in found if reason]


def test_a_step_of_load_brings_replicas_within_seconds_and_they_stay():
    found = simulate(lambda t: 600 if t < 30 else 2600, 200)
    up = next(now for now, reason in changes(found) if "wait" in reason)
    assert 30 <= up <= 33
    at_the_end = found[-1]
    assert at_the_end[1] >= 3 and at_the_end[3] < 0.01
    assert all(target >= 3 for now, _, target, _, _ in found if now > 60)


def test_replicas_leave_one_by_one_after_the_cooldown():
    found = simulate(lambda t: 2600 if t < 60 else 100, 400)
    downs = [(now, reason) for now, reason in changes(found) if now > 60]
    assert found[-1][2] == 1
    assert all("has been low" in reason for _, reason in downs)
    assert all(b - a >= SCALING.cooldown_s for (a, _), (b, _) in pairwise(downs))


def test_a_sawtooth_does_not_make_the_number_swing_with_it():
    found = simulate(lambda t: 1500 if t % 60 < 30 else 300, 1800)
    assert len(changes(found)) < 0.4 * 2 * 1800 / 60, "30 teeth, each with a way up and one down"
    late = [reason for now, reason in changes(found) if now > 900]
    assert len(late) <= 8


@settings(max_examples=20, deadline=None)
@given(st.floats(50, 5000), st.lists(st.floats(0.7, 1.3), min_size=50, max_size=50))
def test_noise_on_a_steady_load_settles(rate, factors):
    found = simulate(lambda _: rate, 400, noise=lambda step: factors[step % len(factors)])
    assert len([1 for now, _ in changes(found) if now > 200]) <= 2
    assert found[-1][3] < 0.05, "nobody waits longer than the p99 in the end"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 6000), st.integers(5, 60)), min_size=1, max_size=8), st.integers(0, 2))
def test_whatever_comes_the_number_keeps_its_bounds_and_one_step_down(plateaus, spare):
    ends, total = [], 0
    for rate, seconds in plateaus:
        total += seconds
        ends.append((total, rate))
    scaling = replace(SCALING, most=4, spare=spare)
    found = simulate(lambda t: next(rate for end, rate in ends if t < end), total, scaling)
    targets = [target for _, _, target, _, _ in found]
    assert all(1 + spare <= target <= 4 for target in targets[1:])
    assert all(after >= before - 1 for before, after in pairwise(targets))


def test_the_last_replica_leaves_after_the_idle_time_and_one_waiting_request_wakes_one():
    scaling = replace(SCALING, fewest=0)
    found = simulate(lambda t: 100 if t < 20 else 0, 200, scaling)
    gone = next(now for now, _, target, _, _ in found if target == 0)
    assert 20 + 60 - STEP_S <= gone <= 20 + 60 + 2
    asleep = Seen(now_s=0.0, loads=(), running=0, target=0)
    assert decide(asleep, scaling, Memory()).replicas == 0
    assert decide(replace(asleep, waiting=1.0), scaling, Memory()).replicas == 1


def test_figures_of_fewer_replicas_than_run_decide_nothing():
    calm = Load(delay_s=0.0, service_s=0.0, rows_per_s=0.0, busy=0.0, idle_s=0.0)
    late = replace(calm, delay_s=1.0)
    memory = Memory(running=3, changed_s=0.0, high_since_s=0.0, low_since_s=0.0)
    for loads in ((), (calm, calm), (late,)):
        assert decide(Seen(now_s=1e4, loads=loads, running=3, target=3), SCALING, memory).replicas == 3


def test_after_a_change_the_old_figures_decide_nothing():
    late = Load(delay_s=1.0, service_s=0.0, rows_per_s=0.0, busy=1.0, idle_s=0.0)
    seen = Seen(now_s=100.0, loads=(late,) * 2, running=2, target=2)
    just_changed = decide(seen, SCALING, Memory(running=1, high_since_s=0.0))
    assert just_changed.replicas == 2
    later = replace(seen, now_s=100.0 + SETTLE_S)
    waits = decide(later, SCALING, just_changed.memory)
    assert waits.replicas == 2 and decide(replace(later, now_s=110.0), SCALING, waits.memory).replicas > 2


def test_patience_grows_with_each_regret_and_has_an_end():
    memory = Memory(running=1, changed_s=0.0)
    late = Load(delay_s=1.0, service_s=0.0, rows_per_s=0.0, busy=1.0, idle_s=0.0)
    now, seen_patience = 10.0, []
    for _ in range(8):
        memory = replace(memory, shrunk_s=now, high_since_s=now - 5)
        memory = decide(Seen(now_s=now, loads=(late,), running=1, target=1), SCALING, memory).memory
        seen_patience.append(memory.patience)
    assert seen_patience[:3] == [2.0, 4.0, 8.0] and seen_patience[-1] == MOST_PATIENCE


@pytest.mark.parametrize("most", [1, 2])
def test_spare_replicas_keep_within_the_bounds(most):
    found = simulate(lambda _: 10.0, 60, replace(SCALING, most=most, spare=1))
    assert found[-1][2] == most


def test_the_meter_tells_of_its_last_seconds_only():
    clock, work = [0.0], [0.0]
    meter = LoadMeter(lambda: clock[0], lambda: work[0])
    for i in range(100):
        clock[0] = i * 0.01
        meter.waited(0.001 if i < 90 else 0.020, 5)
        meter.took(0.002)
    clock[0], work[0] = 1.0, 0.6
    load = meter.reading()
    assert load.delay_s == 0.020 and load.busy == pytest.approx(0.6) and load.rows_per_s == pytest.approx(500 / 3)
    assert load.service_s == pytest.approx(0.002) and load.idle_s == pytest.approx(0.01)
    clock[0] = 10.0
    assert meter.reading().delay_s == 0.0 and meter.reading().rows_per_s == 0.0
    assert from_stats(as_stats(load)) == load
