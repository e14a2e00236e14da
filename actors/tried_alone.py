"""Loads a program in a process that nobody needs: does it outlive that? Run as a module it is that process.

It goes the replica's own way, trial batches included, for one version without its features. Whether the program is
any good is not asked here: one that raises has come through, and raises again where it is told.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from raymill.actors import surroundings
from raymill.actors.model_files import Data
from raymill.actors.model_set import ModelSet
from raymill.actors.rollout import ModelSpec, to_user_config

_log = logging.getLogger(__name__)

PATIENCE_S = 300
"""For how long a load may take."""
NICE = 10
"""Who is answered beside it goes first."""
_CAME_THROUGH = 77
"""Exit status of a process that came through; 0 would also be that of code that ends its process itself."""


def tried_alone(spec: ModelSpec, digest: str, data: Data) -> str:
    """What ended the process that loaded the program of this digest; empty: nothing did."""
    route = next(r for r in spec.routes if r.digest == digest)
    config = to_user_config([replace(spec, routes=(route,))])
    # What the program wrote is nobody's; Python's own words at a crash are wanted.
    command = [sys.executable, "-P", "-X", "faulthandler", "-m", __name__]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, input=json.dumps(config).encode() + b"\n" + data, env=env, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    except OSError as err:
        return f"it could not be started ({err})"
    if done.returncode == _CAME_THROUGH:
        return ""
    told = done.stderr.decode(errors="replace")
    _log.warning("a program that was tried alone ended its process: %s", told[-4000:])
    return _end(done.returncode) + _where(told)


def _end(status: int) -> str:
    if status == -signal.SIGALRM:
        return f"it did not end within {PATIENCE_S} s"
    if status == -signal.SIGKILL:
        return "SIGKILL, as the kernel does where memory ends"
    return signal.Signals(-status).name if status < 0 else f"it exited by itself, with status {status}"


def _where(told: str) -> str:
    """The innermost line of Python, as the fault handler tells it."""
    lines = told.partition("(most recent call first):")[2].splitlines()
    return next((f", at {line.strip().removeprefix('File ')}" for line in lines if line.startswith("  File ")), "")


def main() -> None:
    """Load what standard input says, and end."""
    signal.alarm(PATIENCE_S)  # its default ends native code, too
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends, it is this process that goes
    config = json.loads(sys.stdin.buffer.readline())
    data = sys.stdin.buffer.read()
    models = ModelSet(fetch=lambda _: data, load=surroundings.load_program, open_reader=lambda _: None)
    models.apply(config)
    os._exit(_CAME_THROUGH)  # what its libraries do at an orderly end is no part of a load


if __name__ == "__main__":
    main()
