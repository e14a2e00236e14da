"""The events of the rollout benchmark in which the number of replicas follows the load.

`autoscale_1_3_1`: beside a constant load that is measured, a crowd comes that is too much for one replica, and when
two run, one that is too much for two; it leaves after three ran for a while. Its requests count too. The model waits
instead of computing, so that three replicas answer more than one on two cores. `seconds`: from the crowd's first
request to three replicas, `seconds_down`: from its end to one.
`from_zero`: nobody asks until no replica is left; then requests leave at a constant rate at once. `held_s`: the
longest that one of them waited, which is how long the first replica took; the median of the wakes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks.harness import progress
from benchmarks.open_loop import OpenLoop, Sent
from benchmarks.rollout_session import Session
from raymill.actors.autoscaling import autoscaling_config
from raymill.actors.endpoint import Placement
from raymill.actors.rollout import ModelSpec
from raymill.actors.scaling import Scaling

RATE = 250.0
"""Requests a second of the load that wakes."""
WAITING_RATE = 60.0
"""Requests a second of the load that is measured while replicas come and go."""
CROWD = (100.0, 170.0)
"""Requests a second of the two that come. A replica alone is too few from 133 requests a second on, and overrun from
330: each time there are 160 for each, so that nothing is lost however long another takes to start."""
TARGET_S = 0.1
"""p99 that the number of replicas is to hold."""
PROMISED_S = 2.0
"""p99 beyond which the model refuses who comes (429): on a machine that others use too a replica that is one too few is
soon beyond what there are to be more for, and who is refused would count as failed."""
WITHIN_S = 120.0
"""For a change of the number of replicas."""


class NotBroughtAbout(RuntimeError):
    """What was to be measured did not happen on this machine."""


def autoscale_1_3_1(s: Session, quick: bool) -> dict[str, float]:
    """One replica, three, one."""
    scaling = Scaling(fewest=1, most=3, p99_s=TARGET_S, cooldown_s=3.0 if quick else 6.0)
    deploy(s, s.waiting(PROMISED_S), scaling)
    s.wait_for_replicas(1)
    load = s.load(WAITING_RATE, waits=True)
    time.sleep(2)  # connections, the batch's pace
    quiet_s = time.monotonic()
    time.sleep(4 if quick else 12)
    begun = time.monotonic()
    crowd: list[OpenLoop] = []
    for replicas, rate in enumerate(CROWD, start=2):
        crowd.append(s.load(rate, waits=True))
        while running(s) < replicas and time.monotonic() - begun < WITHIN_S:
            time.sleep(0.1)
    up, reached = time.monotonic(), running(s)
    time.sleep(2 if quick else 20)
    came = [one.stop() for one in crowd]
    down = time.monotonic()
    if reached == 3:
        wait(lambda: len(s.endpoint.replicas()) == 1, "one replica")
    gone = time.monotonic()
    time.sleep(1)
    sent = load.stop()
    if reached < 3:
        raise NotBroughtAbout(f"{sum(map(len, came))} requests of a crowd brought {reached} replicas only")
    before, during = sent.between(quiet_s, begun), sent.between(begun, gone)
    progress(f"autoscale_1_3_1: a crowd of {sum(map(len, came))}, up {up - begun:.1f} s, down {gone - down:.1f} s")
    return {
        "requests": sum(map(len, (during, *came))),
        "failed": sum(failed("autoscale_1_3_1", one) for one in (sent, *came)),
        "seconds": up - begun,
        "seconds_down": gone - down,
        "p99_ratio": during.quantile_s(0.99) / before.quantile_s(0.99),
        "p99_ms": during.quantile_s(0.99) * 1e3,
        "p99_before_ms": before.quantile_s(0.99) * 1e3,
    }


def from_zero(s: Session, quick: bool) -> dict[str, float]:
    """No replica, then one."""
    deploy(s, s.present(), Scaling(fewest=0, most=1, p99_s=0.05, idle_s=4.0))
    wakes, wanted = (1, 2_000) if quick else (3, 10_500)
    sents, held, ready = [], [], []
    for _ in range(wakes):
        wait(lambda: not s.endpoint.replicas(), "no replica")
        load = s.load(RATE)
        begun = time.monotonic()
        wait(lambda: running(s) == 1, "one replica")
        ready.append(time.monotonic() - begun)
        time.sleep(max(2.0, wanted / wakes / RATE - ready[-1]))
        sents.append(load.stop())
        held.append(sents[-1].quantile_s(1.0))
        progress(f"from_zero: woken in {ready[-1]:.1f} s, nobody waited longer than {held[-1]:.1f} s")
    return {
        "requests": sum(map(len, sents)),
        "failed": sum(failed("from_zero", sent) for sent in sents),
        "seconds": float(np.median(ready)),
        "held_s": float(np.median(held)),
        "times": wakes,
    }


def deploy(s: Session, model: ModelSpec, scaling: Scaling) -> None:
    """Have the number of replicas follow the load."""
    s.endpoint.deploy([model], Placement(autoscaling=autoscaling_config(scaling, None)))


def running(s: Session) -> int:
    """Replicas that run."""
    return sum(r.state == "RUNNING" for r in s.endpoint.replicas())


def wait(until: Callable[[], bool], what: str) -> None:
    """Until it is so."""
    end = time.monotonic() + WITHIN_S
    while not until():
        if time.monotonic() > end:
            raise RuntimeError(f"{what}: not after {WITHIN_S:.0f} s")
        time.sleep(0.1)


def failed(name: str, sent: Sent) -> int:
    """How many were not answered rightly."""
    for reason, count in sent.failures.items():
        progress(f"{name}: {count} failed: {reason}")
    return sum(sent.failures.values())
