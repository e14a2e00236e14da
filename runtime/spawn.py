"""Plain class → Ray actor: names, namespace and options, in the one place that applies Ray.

Every raymill actor lives in the namespace `raymill` and is detached, so that it outlives the process that asked
for it; `spawn` gives back the running one if there is one (actors are found by name, never twice).
"""

from __future__ import annotations

from typing import Any

import ray

from raymill.runtime.errors import Unavailable

NAMESPACE = "raymill"


def spawn(
    cls: type,
    *args: Any,
    name: str,
    num_cpus: float = 0,
    max_concurrency: int = 8,
    restart: bool = True,
    env: dict[str, str] | None = None,
    **options: Any,
) -> Any:
    """Handle of the actor `name`, started with `cls(*args)` and `start()` if it does not run yet.

    A restarted actor (Ray restarts it when its process dies) is built and started anew from its arguments: what
    it must not lose lies in a durable place.
    """
    if env:
        options["runtime_env"] = {"env_vars": env}
    remote = ray.remote(_started(cls))
    return remote.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=num_cpus,
        max_concurrency=max_concurrency,
        max_restarts=-1 if restart else 0,
        **options,
    ).remote(*args)


def find(name: str) -> Any:
    """Handle of a running actor.

    Raises:
        Unavailable: no such actor runs.
    """
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError as err:
        raise Unavailable(f"actor {name!r} does not run on this cluster: start it with `raymill run`") from err


def _started(cls: type) -> type:
    """`cls` whose constructor also calls `start()`: Ray restarts an actor by its constructor alone."""

    class Started(cls):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.start()

    Started.__name__ = Started.__qualname__ = cls.__name__
    Started.__doc__ = cls.__doc__
    return Started
