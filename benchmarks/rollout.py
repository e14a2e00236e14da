"""Claim: a version, new code or a death of a replica costs no request and little time.

Open loop: requests of one row leave at a constant rate, each answer is held against its own row and version
(`open_loop`); nobody retries but the proxy. An event is brought about again and again until 10,000 requests were due
meanwhile; `seconds` is the median of how long one took until every replica had acknowledged it (`code_update`: until
the old replica was gone; `replica_sigkill`: one of two, until two ran again; `bad_version`: from its canary's begin
until the registry had refused it by itself), `p99_ratio` is the p99 of that whole time over that of the quiet seconds
before (`autoscale_1_3_1` and `from_zero`: see `rollout_scaling`). `failed` counts what was not answered rightly in
either. `acknowledged_s`: a promotion, by replicas. An event that a machine does not bring about (one replica was fast
enough for the crowd) has no figures, and `not_brought_about` says why. `--quick`: 2,000 requests each; `--only` some of
the events.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import Outcome
from benchmarks.rollout_scaling import NotBroughtAbout, autoscale_1_3_1, from_zero
from benchmarks.rollout_session import MODEL, Event, Session, kill, session, watched
from raymill.actors.endpoint import APART_S, Placement
from raymill.runtime.errors import ModelError
from raymill.runtime.messages import Stage

RATE = 300.0
"""Requests a second: far below what the replica can, so that the proxy and the event are what is seen."""
STEPS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Weights of a canary on its way from nothing to all."""


def promote(s: Session, number: int) -> float:
    """Version 2 for 1, then 1 for 2."""
    begun = time.monotonic()
    s.records.promote(MODEL, 2 - number % 2, reason="benchmark")
    s.endpoint.follow(s.records, MODEL)
    return time.monotonic() - begun


def canary(s: Session, _: int) -> float:
    """Version 2 from nothing to all of the traffic, in steps; back again afterwards."""
    begun = time.monotonic()
    for weight in STEPS:
        s.endpoint.set_models([s.model(v1=1 - weight, v2=weight)])
    s.endpoint.set_models([s.model(v2=1.0)])
    took = time.monotonic() - begun
    s.endpoint.set_models([s.model(v1=1.0)])
    return took


def rollback(s: Session, number: int) -> float:
    """Back from version 2, which was promoted a moment before."""
    if number % 2 == 0:
        s.records.promote(MODEL, 2, reason="benchmark")
        s.endpoint.follow(s.records, MODEL)
        return float("nan")
    begun = time.monotonic()
    s.records.rollback(MODEL, reason="benchmark")
    s.endpoint.follow(s.records, MODEL)
    return time.monotonic() - begun


def code_update(s: Session, number: int) -> float:
    """New code: another environment is another replica."""
    before = {r.pid for r in s.endpoint.replicas()}
    begun = time.monotonic()
    s.endpoint.deploy([s.present()], Placement(env={"CODE": str(number)}))
    s.wait_for_replicas(1, without=before)
    return time.monotonic() - begun


def replica_sigkill(s: Session, _: int) -> float:
    """One of two."""
    pid = s.endpoint.replicas()[0].pid
    begun = time.monotonic()
    kill(pid)
    s.wait_for_replicas(2, without={pid})
    return time.monotonic() - begun


def bad_version(s: Session, number: int) -> float:
    """First one whose file is damaged, which is refused; then one that raises, which is taken out."""
    if number:
        try:
            s.endpoint.set_models([s.model(v1=0.8, v3=0.2)])
        except ModelError:
            return float("nan")
        raise RuntimeError("a damaged version was taken")
    begun = time.monotonic()
    s.records.start_canary(MODEL, 4, reason="benchmark")
    s.endpoint.follow(s.records, MODEL)
    while s.records.get(MODEL, 4).stage is not Stage.REJECTED:
        time.sleep(0.05)
    while [r.version for r in s.endpoint.models()[0].routes] != [1]:
        time.sleep(0.05)
    return time.monotonic() - begun


def acknowledged(s: Session) -> float:
    """Seconds of a promotion until each replica has it, the median of six."""
    took = []
    for n in range(6):
        time.sleep(APART_S)
        took.append(promote(s, n))
    return float(np.median(took))


ONE_REPLICA = (promote, canary, rollback, code_update, bad_version)
"""Done to one replica, in this order."""
SCALED = (autoscale_1_3_1, from_zero)
EVENTS = tuple(act.__name__ for act in (*ONE_REPLICA, replica_sigkill, *SCALED))


def body(quick: bool, only: Sequence[str] = EVENTS) -> Outcome:
    """Measure all events, or some of them."""
    how: dict[str, Any] = {"rate": RATE, "requests": 2_000 if quick else 10_000, "quiet_s": 4.0 if quick else 10.0}
    events: list[Event] = []
    facts: dict[str, float] = {}
    with session() as s:
        load = s.load(RATE)
        time.sleep(3)  # connections, the batch's pace
        for act in (act for act in ONE_REPLICA if act.__name__ in only):
            events.append(watched(act.__name__, lambda n, act=act: act(s, n), **how))
            s.records.promote(MODEL, 1, reason="benchmark")
            s.endpoint.follow(s.records, MODEL)
        if "promote" in only:
            facts["replicas_1"] = acknowledged(s)
        if "replica_sigkill" in only:
            deploy_fixed(s, 2)
            events.append(watched("replica_sigkill", lambda n: replica_sigkill(s, n), **how))
        if "promote" in only:
            deploy_fixed(s, 3)
            facts["replicas_3"] = acknowledged(s)
        sent = load.stop()
        scaled: dict[str, dict[str, float]] = {}
        missing: dict[str, str] = {}
        for event in (event for event in SCALED if event.__name__ in only):
            try:
                scaled[event.__name__] = event(s, quick)
            except NotBroughtAbout as err:  # the others' figures stand
                missing[event.__name__] = str(err)
    outcome = Outcome({e.name: e.outcome(sent) for e in events} | scaled | {"acknowledged_s": facts})
    outcome.repetitions = 1
    outcome.notes = {"rate": RATE, "requests": len(sent), "failed": dict(sent.failures), "bars": {"p99_ratio": 3}}
    outcome.notes["not_brought_about"] = missing
    return outcome


def deploy_fixed(s: Session, replicas: int) -> None:
    """So many replicas, which all run."""
    s.endpoint.deploy([s.present()], Placement(replicas=replicas))
    s.wait_for_replicas(replicas)


if __name__ == "__main__":
    harness.main("rollout", body, only=EVENTS)
