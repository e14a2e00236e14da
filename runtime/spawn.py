"""Plain class → Ray actor: names, namespace and options, in the one place that applies Ray.

Every raymill actor lives in the namespace `raymill` and is detached, so that it outlives the process that asked
for it; `spawn` gives back the running one if there is one (actors are found by name, never twice).
"""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from raymill.runtime.errors import RaymillError, Unavailable
from raymill.runtime.messages import Lease

NAMESPACE = "raymill"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"([a-z_]\w*\.)*[A-Z]\w*(\(\w+\))?: ")
"""The last line of a trace: `module.Error: message`."""
_SHORT = 600


def spawn(
    cls: type,
    *args: Any,
    name: str,
    num_cpus: float = 0,
    max_concurrency: int = 8,
    restart: bool = True,
    anew: bool = False,
    **options: Any,
) -> Any:
    """Handle of the actor `name`, started with `cls(*args)` and `start()` if it does not run yet.

    A restarted actor (Ray restarts it when its process dies) is built and started anew from its arguments, and
    calls under way are made again: what it must not lose lies in a durable place, and every call is idempotent.
    With `anew` a running one is ended first, for its arguments may be others now.
    """
    if anew:
        end(name)
    remote = ray.remote(_started(cls))
    return remote.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=num_cpus,
        max_concurrency=max_concurrency,
        max_restarts=-1 if restart else 0,
        max_task_retries=3 if restart else 0,
        **options,
    ).remote(*args)


def ask(call: Any, timeout_s: float | None = None) -> Any:
    """The answer of a remote call; raymill's own errors come out as they were raised, not wrapped by Ray.

    Raises:
        RaymillError: what the actor raised.
        Unavailable: the actor is dead, or did not answer within `timeout_s`.
    """
    try:
        return ray.get(call, timeout=timeout_s)
    except RayTaskError as err:
        if isinstance(err.cause, RaymillError):
            raise err.cause from err
        raise
    except (RayActorError, GetTimeoutError) as err:
        raise Unavailable(f"an actor does not answer ({in_short(err)}): `raymill run` starts it anew") from err


def in_short(err: BaseException) -> str:
    """What happened, in one line: an error of Ray carries the trace of the other process as its text."""
    lines = [line.strip() for line in _COLOUR.sub("", str(err)).splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)] if any("::" in line for line in lines) else []
    said = raised[-1] if raised else "; ".join(lines)[:_SHORT]
    return said if raised else f"{type(err).__name__}: {said}"


def find(name: str) -> Any:
    """Handle of a running actor.

    Raises:
        Unavailable: no such actor runs.
    """
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError as err:
        raise Unavailable(f"actor {name!r} does not run on this cluster: start it with `raymill run`") from err


def named(prefix: str) -> list[str]:
    """Names of the running actors that begin so, sorted."""
    found = ray.util.list_named_actors(all_namespaces=True)
    return sorted(a["name"] for a in found if a["namespace"] == NAMESPACE and a["name"].startswith(prefix))


def on_head() -> dict[str, Any]:
    """Options that keep an actor on the head's host, where the durable places are, also where `up` did not start it."""
    return {"resources": {"head": 0.01} if "head" in ray.cluster_resources() else {"node:__internal_head__": 0.001}}


def driver_and_head() -> tuple[str, str]:
    """Addresses of this process's host and of the head's; raylets that share an address are one host."""
    addresses = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
    head = next(n["NodeManagerAddress"] for n in addresses.values() if "node:__internal_head__" in n["Resources"])
    return addresses[ray.get_runtime_context().get_node_id()]["NodeManagerAddress"], head


def end(name: str) -> None:
    """End the actor `name` for good and wait until its name is free; nothing if it does not run."""
    try:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        while True:
            ray.get_actor(name, namespace=NAMESPACE)
            time.sleep(0.02)
    except ValueError:
        return  # there is no such actor (any more)


class Remote:
    """A named actor as a plain object: its methods, blocking; picklable.

    While the actor is being restarted calls wait and are made again, up to `patience_s`: they must be idempotent.
    """

    def __init__(self, name: str, patience_s: float = 60.0) -> None:
        self._name, self._patience_s = name, patience_s

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._call, method)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        end = time.monotonic() + self._patience_s
        while True:
            try:
                return ask(getattr(find(self._name), method).remote(*args, **kwargs))
            except Unavailable:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.1)


def in_lease(cls: type, lease: Lease, *args: Any, max_concurrency: int = 4) -> Any:
    """Handle of a new unnamed actor in the lease's placement group, built with `cls(*args)` and `start()`.

    It is not detached and never restarted: it dies with the process that asked for it, and its death is the asker's
    to see.
    """
    others = dict(lease.resources)
    cpus, gpus = others.pop("CPU", 0.0), others.pop("GPU", 0.0)
    return (
        ray.remote(_started(cls))
        .options(
            num_cpus=cpus,
            num_gpus=gpus,
            resources=others,
            max_restarts=0,
            max_concurrency=max_concurrency,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=lease.placement_group, placement_group_bundle_index=0
            ),
        )
        .remote(*args)
    )


def companion(cls: type, *args: Any, num_cpus: float = 0, max_concurrency: int = 1) -> Any:
    """Handle of a new unnamed actor, built with `cls(*args)` and `start()`, on whichever node has room.

    It is not detached and never restarted: it dies with the process that asked for it, and its death is the asker's
    to see.
    """
    options = {"max_restarts": 0, "max_concurrency": max_concurrency, "scheduling_strategy": "SPREAD"}
    return ray.remote(_started(cls)).options(num_cpus=num_cpus, **options).remote(*args)


def beside(cls: type, *args: Any) -> Any:
    """Handle of a new unnamed actor as by `companion`, on this process's own node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_started(cls)).options(num_cpus=0, max_restarts=0, scheduling_strategy=here).remote(*args)


def _started(cls: type) -> type:
    """`cls` whose constructor also calls `start()`: Ray restarts an actor by its constructor alone."""

    class Started(cls):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.start()

    Started.__name__ = Started.__qualname__ = cls.__name__
    Started.__doc__ = cls.__doc__
    return Started
