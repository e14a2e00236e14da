"""Processes of this machine: which ones are ours, which one holds a port, how to end them for good.

A process is ours when it carries our mark in its environment (children inherit it, and it survives that Ray renames
its workers), or when it was recorded with its start time, so that a pid that the kernel gave to another is never hit.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

SESSION_MARK = "RAYMILL_SESSION"
"""Variable that every process of a session carries; its value is the root of the session's home."""
NODE_MARK = "RAYMILL_NODE"
"""Variable that every process of one worker node carries; its value is the node's instance id."""

TERM_WAIT_S = 2.0
"""How long a process may take to end by itself before it is killed."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told apart from a later one with the same pid by its start."""

    pid: int
    started: int
    """Start, in clock ticks since boot."""
    command: str = ""
    """Its command line, shortened."""

    @property
    def is_alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        return start_of(self.pid) == self.started


def start_of(pid: int) -> int | None:
    """Start of a running process in clock ticks since boot; None: there is none, or it is a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the command's name: state, parent and so on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def describe(pid: int) -> Process | None:
    """The process with that pid, if it runs."""
    started = start_of(pid)
    if started is None:
        return None
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        command = ""
    return Process(pid, started, command[:400])


def marked(mark: str, value: str) -> list[Process]:
    """Running processes with `mark=value` in the environment they were started with."""
    wanted = f"{mark}={value}".encode()
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            environment = Path(entry.path, "environ").read_bytes()
        except OSError:  # it has ended, or belongs to another user
            continue
        if wanted in environment.split(b"\0"):
            process = describe(int(entry.name))
            if process:
                found.append(process)
    return found


def with_descendants(processes: Iterable[Process]) -> list[Process]:
    """The running ones among them and everything that they started and that is still their child."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    seen: dict[int, Process] = {}
    queue = [p for p in processes if p.is_alive]
    while queue:
        process = queue.pop()
        if process.pid in seen:
            continue
        seen[process.pid] = process
        queue += [p for p in map(describe, children.get(process.pid, ())) if p]
    return list(seen.values())


def lineage_of_this_process() -> set[int]:
    """This process and those above it: never to be ended by it."""
    me = psutil.Process()
    return {me.pid, *(p.pid for p in me.parents())}


def end(processes: Iterable[Process], term_wait_s: float = TERM_WAIT_S) -> list[Process]:
    """End them, first by request, then by force; gives back those that remain (another user's, or unkillable)."""
    spared = lineage_of_this_process()
    left = [p for p in processes if p.pid not in spared]
    for number, wait_s in ((signal.SIGTERM, term_wait_s), (signal.SIGKILL, 5.0)):
        if number == signal.SIGTERM and term_wait_s <= 0:
            continue
        left = _signal(left, number)
        deadline = time.monotonic() + wait_s
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            left = [p for p in left if p.is_alive]
    return left


def _signal(processes: list[Process], number: signal.Signals) -> list[Process]:
    alive = [p for p in processes if p.is_alive]
    for process in alive:
        try:
            os.kill(process.pid, number)
        except (ProcessLookupError, PermissionError):
            continue
    return alive


def holder_of(port: int) -> str:
    """Who listens on a TCP port, in words."""
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            process = describe(connection.pid) if connection.pid else None
            return f"pid {process.pid} ({process.command[:80]})" if process else "a process of another user"
    return "a process that is just ending"


def is_free(port: int) -> bool:
    """Whether one can listen on a TCP port, on every address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def sessions() -> dict[str, list[Process]]:
    """Root of a session's home → its running processes, for every session on this machine."""
    found: dict[str, list[Process]] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            environment = Path(entry.path, "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        mark = next((v for v in environment if v.startswith(f"{SESSION_MARK}=".encode())), None)
        process = describe(int(entry.name)) if mark else None
        if mark and process:
            found.setdefault(mark.decode(errors="replace").partition("=")[2], []).append(process)
    return found


def orphaned_haproxy() -> list[Process]:
    """HAProxy processes of sessions whose GCS is gone and that are not just being started."""
    orphans = []
    for members in sessions().values():
        if not any("gcs_server" in p.command or "ray.scripts.scripts" in p.command for p in members):
            orphans += [p for p in members if "haproxy" in p.command.partition(" ")[0]]
    return orphans
