"""A process that has imported what a replica needs, and waits for the next one: its start then takes no imports.

It is a worker of Ray that no actor was given to yet. A replica's runtime environment names `prepare`, which Ray calls
in each process of that environment; the raylet is asked for such a process beforehand, and gives it to the replica
that comes next, since the environments are the same.

Invariants
- Whatever goes wrong here costs time, never a replica: it starts as it would have without.
- A process that has imported other sources than are there now is given to no replica: the environment has their digest.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""What Ray's own `worker_process_setup_hook` sets, which it offers for whole jobs only."""
_MODULES, _SOURCES = "RAYMILL_PREPARED_MODULES", "RAYMILL_PREPARED_SOURCES"
_ALWAYS = ("ray.serve._private.replica", "raymill.actors.serving")
_KEPT_S = 24 * 3600
"""How long it may wait."""
_SETTLED_S = 3.0
"""For how long the number of replicas must not have changed: a process that starts takes CPU from those that do."""
_AGAIN_S = 60.0
"""Between two tries."""
_METHOD = "/ray.rpc.NodeManagerService/PrestartWorkers"

_log = logging.getLogger("ray.serve")


def environment(modules: Iterable[str]) -> dict[str, str]:
    """Variables of a replica for which a process is to be prepared that has imported these modules."""
    return {_HOOK: f"{__name__}.prepare", _MODULES: ",".join(modules), _SOURCES: _digest_of_sources()}


def prepare() -> None:
    """Import what a replica needs; called by Ray in each process that has the `environment`."""
    for module in (*_ALWAYS, *filter(None, os.environ.get(_MODULES, "").split(","))):
        try:
            importlib.import_module(module)
        except Exception:  # noqa: BLE001 - a process that can not import it says so when it is a replica
            _log.exception("%s was not imported beforehand", module)


class Spare:
    """Keeps one prepared process on the head for the endpoint whose replicas have an environment."""

    def __init__(self, variables: dict[str, str], start: Callable[[dict[str, str]], None] | None = None) -> None:
        """`start` asks for a process, and may take a while; absent: the head's raylet is asked."""
        self._variables, self._start = variables, start or start_process
        self._running, self._changed_s = 0, 0.0
        self._has, self._tried_s = False, -_AGAIN_S
        self._thread: threading.Thread | None = None

    def keep(self, running: int, now_s: float) -> None:
        """Ask for a process where there is none, without waiting; to be called now and then with what runs."""
        if running != self._running:
            if running > self._running:
                self._has = False  # Ray gives it to the first replica that comes
            self._running, self._changed_s = running, now_s
        asking = self._thread is not None and self._thread.is_alive()
        if (
            self._has
            or asking
            or not running
            or now_s - self._changed_s < _SETTLED_S
            or now_s - self._tried_s < _AGAIN_S
        ):
            return
        self._has, self._tried_s = True, now_s
        self._thread = threading.Thread(target=self._ask, name="raymill-prepare", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            self._start(self._variables)
        except Exception as err:  # noqa: BLE001 - Ray's insides may differ: the next replica starts as it would have
            self._has = False
            _log.warning("raymill scaling: no process is prepared for the next replica: %s", err)


_spares: dict[tuple[tuple[str, str], ...], Spare] = {}


def spare_of(variables: dict[str, str]) -> Spare:
    """The one of these variables: it outlives a policy, which Serve makes anew with each change of configuration."""
    return _spares.setdefault(tuple(sorted(variables.items())), Spare(variables))


def start_process(variables: dict[str, str]) -> None:
    """Have the head's raylet start a process with these variables, which waits to become an actor.

    It is Ray's own call for that (`PrestartWorkers`), for which it has no Python function.
    """
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2
    from ray.runtime_env import RuntimeEnv

    head = next(n for n in ray.nodes() if n["Alive"] and "node:__internal_head__" in n["Resources"])
    request = node_manager_pb2.PrestartWorkersRequest(num_workers=1, keep_alive_duration_secs=_KEPT_S)
    request.runtime_env_info.serialized_runtime_env = RuntimeEnv(env_vars=variables).serialize()
    config: Any = request.runtime_env_info.runtime_env_config
    config.setup_timeout_seconds, config.eager_install = 600, True
    channel = init_grpc_channel(f"{head['NodeManagerAddress']}:{head['NodeManagerPort']}")
    try:
        call = channel.unary_unary(
            _METHOD,
            request_serializer=node_manager_pb2.PrestartWorkersRequest.SerializeToString,
            response_deserializer=node_manager_pb2.PrestartWorkersReply.FromString,
        )
        call(request, timeout=30)
    finally:
        channel.close()


@cache
def _digest_of_sources() -> str:
    """Of raymill's own, by their names, sizes and times of change."""
    folders = (Path(__file__).parent, Path(importlib.import_module("raymill.runtime").__file__ or "").parent)
    stats = [(p.name, p.stat()) for folder in folders for p in sorted(folder.glob("*.py"))]
    text = repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
