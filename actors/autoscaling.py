"""Serve's autoscaling policy for an endpoint: asks `scaling` in the controller, a few times a second.

Serve imports it by name, builds it from JSON values and calls it with what the replicas recorded. It runs in Serve's
control loop, so it never waits: what the pool's scheduler allows is asked in the background, and until the answer is
there the number stays.

Invariants: replicas beyond those that the scheduler has granted are not started; what is no longer used is given back
after it has stopped. A replica that Serve woke from zero is leased as soon as it runs: Serve wakes it without asking.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from typing import Any

import ray

from raymill.actors.load_meter import from_stats
from raymill.actors.prepared import spare_of
from raymill.actors.scaling import Load, Memory, Scaling, Seen, decide
from raymill.actors.scheduler import NAME as SCHEDULER
from raymill.runtime.errors import RaymillError
from raymill.runtime.messages import LeaseRequest, Purpose
from raymill.runtime.spawn import ask, find

POLICY = "raymill.actors.autoscaling:QueueingDelayPolicy"
TOLD_EVERY_S = 0.5
"""How often a replica tells its load."""
LEAVING_S = 12.0
"""How long a replica that leaves may take, `endpoint.GRACE_S`."""
_FRESH_S = 4.0
"""Age from which on what a replica told is as good as nothing."""
_AGAIN_S = 5.0
"""Between two times that the scheduler is asked for what it has refused."""

_log = logging.getLogger("ray.serve")


def autoscaling_config(
    scaling: Scaling, request: LeaseRequest | None, *, leaving_s: float = LEAVING_S
) -> dict[str, Any]:
    """What the deployment's configuration says of it, as JSON values.

    Args:
        scaling: what is wanted.
        request: how the endpoint asks the scheduler for replicas; without it none is asked, and `scaling.most` holds.
        leaving_s: how long a replica may still run that Serve has stopped to count: so long it keeps its lease.
    """
    asked = {**asdict(request), "purpose": request.purpose.value} if request else None
    kwargs = {"scaling": scaling.to_json(), "request": asked, "leaving_s": leaving_s}
    return {
        "min_replicas": scaling.fewest,
        "max_replicas": scaling.most,
        "metrics_interval_s": TOLD_EVERY_S,
        "look_back_period_s": 5 * TOLD_EVERY_S,
        "upscale_delay_s": 0.0,  # how long to look before a change is the policy's to say
        "downscale_delay_s": 0.0,
        "policy": {"policy_function": POLICY, "policy_kwargs": kwargs},
    }


class QueueingDelayPolicy:
    """One endpoint's; Serve makes a new one with each change of the configuration."""

    def __init__(
        self,
        scaling: dict[str, Any],
        request: dict[str, Any] | None = None,
        leaving_s: float = LEAVING_S,
        prepared: dict[str, str] | None = None,
    ) -> None:
        """The values of `autoscaling_config`; `prepared`: variables of the replicas a process is prepared for."""
        self._scaling = Scaling(**scaling)
        asked = LeaseRequest(**{**request, "purpose": Purpose(request["purpose"])}) if request else None
        self._grants = _Grants(asked, leaving_s) if asked else None
        self._spare = spare_of(prepared) if prepared else None
        self._said = ""

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Serve's form: context → replicas, and what is kept until the next call."""
        now = time.time()
        loads = tuple(_loads(ctx, now))
        seen = Seen(
            now_s=now,
            loads=loads,
            running=ctx.current_num_replicas,
            target=ctx.target_num_replicas,
            waiting=ctx.total_num_requests,
        )
        if self._spare is not None:
            self._spare.keep(seen.running, now)
        memory = Memory.from_json(ctx.policy_state)
        wanted = decide(seen, self._scaling, memory)
        replicas = wanted.replicas
        if self._grants is not None:
            replicas = self._grants.at_most(replicas, running=max(seen.running, min(seen.target, replicas)))
        if wanted.reason and (said := f"{wanted.reason}; {self._grants or 'no grant is needed'}") != self._said:
            self._said = said
            _log.info("raymill scaling: %s", said)
        if replicas == seen.target < wanted.replicas:
            return replicas, asdict(memory)  # nothing is granted yet: it is wanted again
        return replicas, asdict(wanted.memory)


class _Grants:
    """Leases of the endpoint's replicas, asked for and given back without waiting."""

    def __init__(self, request: LeaseRequest, leaving_s: float) -> None:
        self._request, self._leaving_s = request, leaving_s
        self._held: int | None = None  # what was heard last; None: nothing yet
        self._asked: int = 0
        self._answer: Any = None
        self._refused_s = 0.0
        self._used_s = time.time()  # when as many replicas as are held were last wanted, or ran

    def at_most(self, replicas: int, *, running: int) -> int:
        """How many of the replicas wanted there may be; asks for more, or gives back, where others are held."""
        self._listen()
        needed, now = max(replicas, running), time.time()  # what still runs still costs
        if self._held is None or needed >= self._held:
            self._used_s = now
        is_leaving = self._held is not None and needed < self._held and now - self._used_s < self._leaving_s
        if self._answer is None and needed != self._held and not is_leaving and now - self._refused_s > _AGAIN_S:
            self._ask(needed)
        allowed = running if self._held is None else max(self._held, min(running, 1))
        return min(replicas, max(allowed, 0))

    def _ask(self, count: int) -> None:
        try:
            request = replace(self._request, count=count, min_count=min(count, self._request.min_count))
            self._answer = find(SCHEDULER).grant.remote(request)
            self._asked = count
        except RaymillError as err:
            self._fail(err)

    def _listen(self) -> None:
        if self._answer is None or not ray.wait([self._answer], timeout=0)[0]:
            return
        answer, self._answer = self._answer, None
        try:
            self._held = len(ask(answer).leases)
            self._refused_s = time.time() if self._held < self._asked else 0.0
        except RaymillError as err:
            self._fail(err)

    def _fail(self, err: RaymillError) -> None:
        self._refused_s = time.time()
        _log.warning("raymill scaling: the scheduler granted nothing new, it is asked again: %s", err)

    def __str__(self) -> str:
        return f"the scheduler has granted {self._held}"


def _loads(ctx: Any, now: float) -> list[Load]:
    """The newest figures of each running replica that has told any lately."""
    told: dict[Any, dict[str, float]] = {}
    for name, by_replica in (ctx.raw_metrics or {}).items():
        for replica, series in by_replica.items():
            if series and now - series[-1].timestamp < _FRESH_S:
                told.setdefault(replica, {})[name] = series[-1].value
    found = []
    for stats in told.values():
        try:
            found.append(from_stats(stats))
        except KeyError:
            continue  # it has told only what Serve itself counts
    return found
