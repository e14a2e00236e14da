"""What is wrong with this machine: each finding says what, where, how bad it is, and the remedy.

Checks are functions from the machine to findings; they change nothing and start nothing.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

import psutil

from raymill.cluster import certificate, lifecycle, processes, session, start
from raymill.cluster.spec import DEFAULT_CONFIG, ClusterConfig, load_config
from raymill.runtime.errors import ClusterError, RaymillError
from raymill.runtime.home import Home

OLDEST_PYTHON = (3, 11)
LOCK_AGE_S = 120.0
"""A build lock older than this is held by nobody: the longest build takes a minute."""


EXPIRES_SOON = timedelta(days=21)
"""A certificate that ends before should be renewed now."""


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """raymill can not run."""
    WARNING = "warning"
    """It runs, and something should be done."""
    NOTE = "note"
    """Worth knowing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    what: str
    """What is wrong."""
    where: str
    """File, port, process or setting."""
    remedy: str
    """What to do."""
    severity: Severity
    """How bad it is."""


def examine(home: Home, config: ClusterConfig | None = None) -> list[Finding]:
    """All findings, the worst first; an empty list: nothing to say."""
    config = config or load_config(DEFAULT_CONFIG)
    running = _session(home)
    alive = running is not None and running.is_alive
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python,
        check_packages,
        lambda: check_stale(home),
        check_orphans,
        lambda: check_token(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")),
        check_auth_mode,
        lambda: check_key_file(home.operator_key),
        lambda: check_build_locks([home.kernels / "torch_extensions", Path.home() / ".cache" / "torch_extensions"]),
    ]
    if alive and running is not None:
        checks += [lambda: check_open_ports(running), lambda: check_front(running)]
    else:
        checks += [lambda: check_ports(config), lambda: check_size(home, config)]
    order = list(Severity)
    return sorted((f for check in checks for f in check()), key=lambda f: order.index(f.severity))


def mend(home: Home) -> list[str]:
    """End orphans of ours and remove stale files of ours; what was done, in words. Idempotent."""
    done = []
    orphans = processes.orphaned_haproxy()
    processes.end(orphans)
    done += [f"ended orphaned pid {p.pid} ({p.command[:80]})" for p in orphans]
    if list(check_stale(home)):
        done.append(f"ended {lifecycle.down(home)} processes of the dead session at {home.root}")
    return done


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    if sys.version_info < OLDEST_PYTHON:
        yield Finding(
            what=f"Python {sys.version_info.major}.{sys.version_info.minor} is too old",
            where=sys.executable,
            remedy=f"make the venv with Python {'.'.join(map(str, OLDEST_PYTHON))} or newer",
            severity=Severity.ERROR,
        )


def check_packages(required: Iterable[str] | None = None) -> Iterator[Finding]:
    """Requirements by name and version; the distribution's own if none are given."""
    from packaging.requirements import Requirement

    if required is None:
        try:
            required = importlib.metadata.requires("raymill") or []
        except importlib.metadata.PackageNotFoundError:
            required = ["raymill"]
    for requirement in map(Requirement, required):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not version or not requirement.specifier.contains(version, prereleases=True):
            yield Finding(
                what=f"{requirement.name} is {version or 'not installed'}, wanted {requirement.specifier or 'any'}",
                where=sys.prefix,
                remedy="`make install`",
                severity=Severity.ERROR,
            )


def check_ports(config: ClusterConfig) -> Iterator[Finding]:
    """The ports of cluster.toml, while no session of ours runs."""
    for name, port in config.ports.model_dump().items():
        if not processes.is_free(port):
            yield Finding(
                what=f"port {port} ({name}) is held by {processes.holder_of(port)}",
                where=f"port {port}",
                remedy="stop that process, name another port in cluster.toml [ports], or `raymill up --ports auto`",
                severity=Severity.ERROR,
            )


def check_size(home: Home, config: ClusterConfig) -> Iterator[Finding]:
    """Disk, shared memory and memory that `up` would ask for."""
    try:
        start.check_machine(home, config)
    except ClusterError as err:
        yield Finding(what=err.message, where=str(home.root), remedy=err.remedy, severity=Severity.ERROR)
    if shutil.disk_usage("/dev/shm").total < 2 << 30:
        yield Finding(
            what=f"/dev/shm is {shutil.disk_usage('/dev/shm').total >> 20} MB; Ray falls back to slow files in /tmp",
            where="/dev/shm",
            remedy="mount it larger (in a container: --shm-size=4g)",
            severity=Severity.WARNING,
        )


def check_stale(home: Home) -> Iterator[Finding]:
    """A session that is written down and does not run, or runs and is not written down."""
    try:
        known = session.load(home)
    except ClusterError as err:
        yield Finding(
            what=err.message, where=str(session.state_path(home)), remedy="`raymill down`", severity=Severity.ERROR
        )
        return
    left = processes.marked(processes.SESSION_MARK, str(home.root))
    if known is not None and not known.is_alive:
        yield Finding(
            what=f"a session that died, with {len(left)} processes left",
            where=str(session.state_path(home)),
            remedy="`raymill up` or `raymill down` removes it",
            severity=Severity.WARNING,
        )
    elif known is None and left:
        yield Finding(
            what=f"{len(left)} processes of a session that is not written down, e.g. {left[0].command[:80]}",
            where=f"pid {left[0].pid}",
            remedy="`raymill down` ends them",
            severity=Severity.WARNING,
        )


def check_orphans() -> Iterator[Finding]:
    """HAProxy of a killed session: it keeps its port and answers 500 for ever."""
    for process in processes.orphaned_haproxy():
        yield Finding(
            what=f"HAProxy of a killed session: {process.command[:100]}",
            where=f"pid {process.pid}",
            remedy="`raymill doctor --fix`, or the next `raymill up`, ends it",
            severity=Severity.WARNING,
        )


def check_token(path: Path) -> Iterator[Finding]:
    """Ray's token: whoever reads it owns the cluster."""
    if path.exists() and path.stat().st_mode & 0o077:
        yield Finding(
            what=f"Ray's token can be read by others (mode {path.stat().st_mode & 0o777:04o})",
            where=str(path),
            remedy=f"chmod 600 {path}; `raymill up` does it",
            severity=Severity.WARNING,
        )


def check_auth_mode() -> Iterator[Finding]:
    """A variable that would turn token auth off."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        yield Finding(
            what=f"RAY_AUTH_MODE is {mode!r}: this shell talks to the cluster without a token",
            where="environment",
            remedy="unset RAY_AUTH_MODE; `raymill up` always uses token",
            severity=Severity.WARNING,
        )


def check_build_locks(folders: list[Path]) -> Iterator[Finding]:
    """Locks of torch's extension builds: one left by a killed build hangs every later start."""
    for folder in folders:
        for lock in folder.glob("**/lock"):
            try:
                age_s = time.time() - lock.stat().st_mtime
            except FileNotFoundError:
                continue
            if age_s > LOCK_AGE_S:
                yield Finding(
                    what=f"a build lock of torch extensions, {age_s:.0f} s old: every later start waits for it",
                    where=str(lock),
                    remedy=f"rm {lock}",
                    severity=Severity.WARNING,
                )


def check_key_file(path: Path) -> Iterator[Finding]:
    """The operator's API key: whoever reads it may do everything on the endpoint."""
    if path.exists() and path.stat().st_mode & 0o077:
        yield Finding(
            what=f"the operator's API key can be read by others (mode {path.stat().st_mode & 0o777:04o})",
            where=str(path),
            remedy="`raymill down`, then `raymill up`: a new key takes its place",
            severity=Severity.ERROR,
        )


def check_front(running: session.Session) -> Iterator[Finding]:
    """The way in for other hosts: whether it is open, its private key closed, its certificate good for a while."""
    config = running.config()
    if config is None or not config.listen.host:
        return
    listen, now = config.listen, datetime.now(UTC)
    files = Path(listen.certificate), Path(listen.private_key)
    found = list(certificate.faults(*files, now))
    for fault in found:
        yield Finding(what=fault, where=listen.certificate, remedy="mend the files", severity=Severity.ERROR)
    if not found and (end := certificate.validity(files[0])[1]) - now < EXPIRES_SOON:
        yield Finding(
            what=f"the endpoint's certificate expires at {end:%Y-%m-%d %H:%M} UTC",
            where=listen.certificate,
            remedy="replace the file: it is taken up without a restart",
            severity=Severity.WARNING,
        )
    if not start.front_runs(running):
        yield Finding(
            what=f"the front for other hosts at {running.public_url} does not run",
            where=str(running.home.cluster / "logs" / "front.log"),
            remedy="`raymill up` starts it again",
            severity=Severity.ERROR,
        )
    yield Finding(
        what=f"the endpoint answers other hosts, by TLS and with an API key, gRPC at {running.public_grpc}",
        where=running.public_url,
        remedy="`raymill keys list` shows who has a key",
        severity=Severity.NOTE,
    )


def check_open_ports(running: session.Session) -> Iterator[Finding]:
    """Ports of the running session that other machines can reach, but for those that are meant to be."""
    ours = {p.pid: p for p in processes.marked(processes.SESSION_MARK, running.root)}
    meant = {running.ports.https, running.ports.grpcs} if running.ports and running.public_host else set()
    reachable: dict[str, set[int]] = {}
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid not in ours or not connection.laddr:
            continue
        if (
            connection.laddr.port not in meant
            and not ipaddress.ip_address(connection.laddr.ip.removeprefix("::ffff:")).is_loopback
        ):
            name = Path(ours[connection.pid].command.split(" ")[0]).name
            reachable.setdefault(name, set()).add(connection.laddr.port)
    if reachable:
        said = "; ".join(f"{name}: {', '.join(map(str, sorted(ports)))}" for name, ports in sorted(reachable.items()))
        yield Finding(
            what=f"ports open beyond loopback ({said}); Ray asks for its token there",
            where="network",
            remedy="close them with a firewall, or run in a network namespace (docs/operations.md)",
            severity=Severity.NOTE,
        )


def _session(home: Home) -> session.Session | None:
    try:
        return session.load(home)
    except RaymillError:
        return None
