"""`raymill up` and `raymill down`: the cluster on this machine starts, and ends with all that belongs to it.

Invariants
- `state.json` is written before the first process starts, so that a half-done `up` is known; every process carries
  the session's mark, so that `down` finds all of them, after SIGKILL of any, and none of anybody else's.
- `up` and `down` of one home exclude each other by a file lock; both may be repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from raymill.cluster import exposure, processes, start
from raymill.cluster.books import close_books
from raymill.cluster.front import is_everywhere
from raymill.cluster.node_table import table_path
from raymill.cluster.ports import Ports, choose
from raymill.cluster.processes import Process
from raymill.cluster.providers import namespace
from raymill.cluster.session import Session, config_path, load, save, scratch_path, state_path
from raymill.cluster.spec import ClusterConfig, ListenSpec, load_config
from raymill.cluster.spot_state import market_path
from raymill.runtime.errors import ClusterError, Conflict
from raymill.runtime.home import Home
from raymill.runtime.whole_files import write_json

LOCK_WAIT_S = 120.0
"""How long an `up` or `down` waits for another one of the same home."""

Say = Callable[[str], None]


def up(
    home: Home,
    config: ClusterConfig | None = None,
    *,
    ports: Literal["auto", "config"] = "config",
    serve: bool = True,
    say: Say = lambda _: None,
) -> Session:
    """The running session of that home, started if it does not run; the remains of a dead one are removed first.

    Args:
        home: where its state lives.
        config: the checked cluster.toml; the demo's if absent.
        ports: `config`: those of the file; `auto`: all picked free.
        serve: whether Serve (controller and HAProxy) is started as well; else the first deploy does.
        say: told each step.

    Raises:
        ClusterError: a port is taken, disk or memory do not suffice, or Ray does not start; nothing is left running.
    """
    config = config or load_config()
    with _alone(home):
        running = load(home)
        if running and running.is_alive:
            _check_same_door(running, config)
            start.front(running, config)
            return running
        say("looking for remains")
        _clear(home)
        _stop_orphaned_haproxy()
        exposure.check(home, config.listen, start.own_address(), time.time())
        start.check_machine(home, config)
        if config.listen.require_key:
            exposure.make_operator_key(home, time.time())
        chosen = choose("auto" if ports == "auto" else config.ports, config.listen)
        session = _planned(home, config, chosen)
        save(session)
        try:
            return _start(session, config, serve, say)
        except BaseException:
            _clear(home)
            raise


def _check_same_door(running: Session, config: ClusterConfig) -> None:
    """A cluster that runs is left as it is, but nobody may think its endpoint closed, or open, when it is not."""
    started = running.config()
    if config.listen != ListenSpec() and started is not None and started.listen != config.listen:
        raise Conflict(
            f"the cluster at {running.address} was started with other settings of [listen] (API keys: {running.keys}, "
            f"other hosts: {running.public_host or 'none'}): `raymill down`, then `raymill up` with these"
        )


def down(home: Home, say: Say = lambda _: None) -> int:
    """End everything that `up` started for that home, by request, then by force; the number of processes ended.

    Raises:
        ClusterError: a process could not be ended; names it.
    """
    if not home.cluster.exists() and not processes.marked(processes.SESSION_MARK, str(home.root)):
        return 0
    with _alone(home):
        say("stopping")
        ended = _clear(home)
        home.served.unlink(missing_ok=True)  # it was ended, it did not crash: nothing is to come back
        return ended


def _planned(home: Home, config: ClusterConfig, ports: Ports) -> Session:
    isolate, host = config.provider.isolate, config.listen.host
    ip = namespace.network_of(home.root).head if isolate else start.own_address()
    return Session(
        root=str(home.root),
        state="starting",
        managed=True,
        has_autoscaler=True,
        address=f"{ip}:{ports.gcs}",
        dashboard_url=f"http://127.0.0.1:{ports.dashboard}",
        serve_url=f"http://127.0.0.1:{ports.serve}",
        token_path=str(start.ray_token()),
        started_s=time.time(),
        scratch=str(scratch_path(home)),
        ports=ports,
        isolate=isolate,
        keys=config.listen.keys,
        public_host=start.own_address() if is_everywhere(host) else host,
    )


def _start(session: Session, config: ClusterConfig, serve: bool, say: Say) -> Session:
    if session.isolate:
        namespace.open_bridge(namespace.network_of(session.home.root))
    assert session.ports is not None
    write_json(config_path(session.home), config.model_dump(mode="json"))
    say("starting Ray's head")
    start.head(session, config)
    session = replace(session, pids=_ours(session.home))
    save(session)
    if serve:
        say("starting Serve")
        start.serve(session)
    start.front(session, config)
    session = replace(session, state="running", pids=_ours(session.home))
    if not session.is_alive:
        raise ClusterError(f"the head did not stay up: see {start.head_log(session.home)} and {session.scratch}")
    save(session)
    return session


def _clear(home: Home) -> int:
    """End all that is left of the home's session and remove its files; safe to repeat."""
    was_alive = _was_alive(home)
    ours = {p.pid: p for p in processes.with_descendants([*_recorded(home), *_ours(home)])}
    ended = len(ours)
    left = processes.end(ours.values())
    late = _ours(home)  # started while the others were ending
    left += processes.end(late, term_wait_s=0)
    spared = processes.lineage_of_this_process()
    left = [p for p in left if p.is_alive and p.pid not in spared]
    if left:
        names = ", ".join(f"pid {p.pid} ({p.command[:60]})" for p in left)
        raise ClusterError(f"could not end {names}: they are another user's or hang in the kernel; end them as root")
    if namespace.can_isolate() == "":
        namespace.close(namespace.network_of(home.root))
    _drop_build_locks(home)
    close_books(home, reason="down", stopped_s=time.time() if was_alive else None)
    _keep_logs(home)
    for path in (table_path(home), market_path(home), state_path(home)):
        path.unlink(missing_ok=True)
    return ended + len(late)


def _drop_build_locks(home: Home) -> None:
    """A rank killed while torch built an extension leaves a lock that would hang every later start."""
    for lock in (home.kernels / "torch_extensions").glob("**/lock"):
        lock.unlink(missing_ok=True)


def _ours(home: Home) -> tuple[Process, ...]:
    spared = processes.lineage_of_this_process()
    return tuple(p for p in processes.marked(processes.SESSION_MARK, str(home.root)) if p.pid not in spared)


def _was_alive(home: Home) -> bool:
    try:
        session = load(home)
    except ClusterError:
        return False
    return session is not None and session.is_alive


def _recorded(home: Home) -> tuple[Process, ...]:
    try:
        session = load(home)
    except ClusterError:  # a damaged file hides nothing: the mark finds the processes
        return ()
    return tuple(p for p in session.pids if p.is_alive) if session else ()


def _stop_orphaned_haproxy() -> None:
    """HAProxy outlives a killed cluster and holds its port; one of ours without a session is ended."""
    processes.end(processes.orphaned_haproxy())


def _keep_logs(home: Home) -> None:
    """Ray's logs move to the home, in place of the former session's; the scratch folder goes."""
    scratch = scratch_path(home)
    logs = home.cluster / "logs" / "ray"
    for found in scratch.glob(f"{start.RAY_FOLDER}/session_2*/logs"):
        shutil.rmtree(logs, ignore_errors=True)
        logs.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            shutil.move(found, logs)
    for found in scratch.glob("n-*/session_2*/logs"):
        with contextlib.suppress(OSError):
            shutil.move(found, logs / found.parts[-3])
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _alone(home: Home) -> Iterator[None]:
    """The lock of `up` and `down`; the kernel drops it with its holder, so it can not go stale."""
    home.cluster.mkdir(parents=True, exist_ok=True)
    with (home.cluster / "up.lock").open("w") as file:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"another `raymill up` or `down` holds {file.name} for {LOCK_WAIT_S:.0f} s: wait, or end it"
                    ) from None
                time.sleep(0.2)
        yield
