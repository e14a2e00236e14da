"""The ranks of one gang: their leases and their processes; how they are got, asked and given back.

A rank that dies, or does not answer when the others have, is lost: `GangBroken` says which. What then is to be done
is the training's decision (`training.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayActorError, RayTaskError

from raymill.actors.data_order import Schedule
from raymill.actors.trainer import Place, Position, TrainerActor
from raymill.runtime.errors import RaymillError
from raymill.runtime.messages import Granted, Lease, LeaseRequest, Notice, Purpose, Queued
from raymill.runtime.spawn import in_lease
from raymill.runtime.spec import Train

_ANSWER_S = 10.0
"""A living rank says where it is within this, whatever else it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a gang waits, in seconds."""

    first_lease_s: float = 120.0
    """For the ranks of its first training."""
    more_ranks_s: float = 10.0
    """For ranks that it lacks when a later training begins."""
    replacement_s: float = 120.0
    """For replacements when fewer than `min_ranks` are left."""
    start_s: float = 120.0
    """For a rank's process to import torch and DeepSpeed."""
    collective_s: float = 30.0
    """For a neighbour that does not answer and whose connection is not closed either."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank."""

    lease: Lease
    actor: Any


class GangBroken(Exception):
    """The ranks can not go on as they are."""

    def __init__(self, why: str, lost: Sequence[Rank] = ()) -> None:
        super().__init__(why)
        self.why = why
        self.lost = tuple(lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who the ranks are for, as the scheduler and the ledger name it."""

    name: str
    """Owner of the leases."""
    pipeline: str = ""
    """Pipeline that pays."""
    run: str = ""
    """Run that they are for."""


class Ranks:
    """The ranks that a gang has now; rank 0 is the first."""

    def __init__(
        self, scheduler: Any, train: Train, declared: dict[str, Any], owner: Owner, patience: Patience
    ) -> None:
        self._scheduler, self._train, self._declared = scheduler, train, declared
        self._owner, self._patience = owner, patience
        self.members: list[Rank] = []

    def __len__(self) -> int:
        return len(self.members)

    def recruit(self, count: int, min_count: int, timeout_s: float) -> str:
        """Lease and start up to `count` more ranks; why it became fewer, or empty."""
        request = LeaseRequest(
            owner=self._owner.name,
            purpose=Purpose.TRAINING,
            count=count,
            min_count=min_count,
            resources={"CPU": 1.0} | ({"GPU": self._train.gpus_per_rank} if self._train.gpus_per_rank else {}),
            spot=self._train.spot,
            pipeline=self._owner.pipeline,
            run=self._owner.run,
            request_id=uuid4().hex,
            job_id=ray.get_runtime_context().get_job_id(),
        )
        answer: Granted | Queued = self._ask_scheduler("acquire", request, timeout_s)
        if isinstance(answer, Queued):
            return answer.reason
        addresses = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes()}
        fresh = [self._start(lease, addresses.get(lease.node_id, "127.0.0.1")) for lease in answer.leases]
        try:
            self._collect({r.actor.health.remote(): r for r in fresh}, self._patience.start_s)
        except GangBroken as broken:
            self.drop(broken.lost)
            fresh = [r for r in fresh if r not in broken.lost]
            self.members += fresh
            return f"a rank did not start: {broken.why}"
        except BaseException:
            self.drop(fresh)
            raise
        self.members += fresh
        return ""

    def form(self) -> None:
        """Make the members one process group, at a new address."""
        first = self.members[0]
        host, port = self.ask(first, "listen", len(self.members))
        self.ask_all("join", lambda i: (Place(rank=i, ranks=len(self.members), host=host, port=port),))

    def begin(self, schedule: Schedule, state: Any) -> list[Position]:
        """Build the engines from a state (bytes, a reference to them, or None)."""
        return self.ask_all("begin", lambda _: (schedule, state))

    def ask(self, rank: Rank, method: str, *args: Any) -> Any:
        """One rank's answer.

        Raises:
            GangBroken: it is lost, or the call failed.
        """
        (answer,) = self._collect({getattr(rank.actor, method).remote(*args): rank}, None)
        return answer

    def ask_all(self, method: str, args: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        """Every member's answer, in order; `args(i)` are the arguments of rank i.

        Raises:
            GangBroken: some are lost, or the call failed.
        """
        return self._collect({getattr(r.actor, method).remote(*args(i)): r for i, r in enumerate(self.members)}, None)

    def positions(self) -> list[tuple[Rank, Position]]:
        """Where the members are; those that do not say are dropped."""
        found = []
        for rank, ref in [(r, r.actor.position.remote()) for r in self.members]:
            try:
                found.append((rank, ray.get(ref, timeout=_ANSWER_S)))
            except (RayActorError, TimeoutError):
                self.drop([rank])
        return found

    def doomed(self) -> tuple[list[Rank], str]:
        """Members on nodes that will be taken away, and why."""
        notices: list[Notice] = self._ask_scheduler("notices", self._owner.name)
        reasons = {n.node_id: n.reason for n in notices}
        ranks = [r for r in self.members if r.lease.node_id in reasons]
        return ranks, next((reasons[r.lease.node_id] for r in ranks), "")

    def drop(self, ranks: Iterable[Rank]) -> None:
        """End these ranks and give their leases back."""
        gone = list(ranks)
        for rank in gone:
            ray.kill(rank.actor)
        self.members = [r for r in self.members if r not in gone]
        if gone:
            self._ask_scheduler("release", [r.lease.lease_id for r in gone])

    def _start(self, lease: Lease, address: str) -> Rank:
        args = (self._train, self._declared, address, self._patience.collective_s)
        return Rank(lease, in_lease(TrainerActor, lease, *args))

    def _collect(self, asked: dict[Any, Rank], limit_s: float | None) -> list[Any]:
        """The answers in the order asked. Ranks go in step: once one has answered, the others soon do or are lost."""
        pending, answers = dict(asked), {}
        lost: list[Rank] = []
        why = ""
        deadline = time.monotonic() + limit_s if limit_s is not None else None
        while pending:
            left = max(0.0, deadline - time.monotonic()) if deadline is not None else None
            done, _ = ray.wait(list(pending), timeout=left)
            if not done:
                lost += pending.values()
                why = why or f"{len(pending)} ranks do not answer"
                break
            for ref in done:
                rank = pending.pop(ref)
                try:
                    answers[ref] = ray.get(ref)
                except RayActorError as err:
                    lost.append(rank)
                    why = _cause(err)
                except RayTaskError as err:
                    if isinstance(err.cause, RaymillError):
                        raise err.cause from err
                    why = why or f"{type(err.cause).__name__}: {err.cause}"
            if limit_s is None and deadline is None:
                deadline = time.monotonic() + self._patience.collective_s + _ANSWER_S
        if why:
            raise GangBroken(why, lost)
        return [answers[ref] for ref in asked]

    def _ask_scheduler(self, method: str, *args: Any) -> Any:
        """The scheduler's answer, whether it is an actor's handle or the object itself."""
        call = getattr(self._scheduler, method)
        return ray.get(call.remote(*args)) if hasattr(call, "remote") else call(*args)


def _cause(err: RayActorError) -> str:
    """Why an actor is dead: what its constructor raised stands in the last line, behind a traceback."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{lines[0]} {lines[-1]}" if "creation task" in lines[0] else lines[0]
