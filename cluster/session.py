"""The cluster on this machine that `raymill up` starts and `raymill down` ends.

Invariants
- `state.json` is written before the first process starts, so that a half-done `up` is known; every process carries
  the session's mark, so that `down` finds all of them, after SIGKILL of any, and none of anybody else's.
- `up` and `down` of one home exclude each other by a file lock; both may be repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from raymill.cluster import exposure, processes, start
from raymill.cluster.books import close_books
from raymill.cluster.environment import client_environment, serve_options
from raymill.cluster.front import is_everywhere, is_ipv6
from raymill.cluster.node_table import table_path, write_json
from raymill.cluster.ports import Ports, choose
from raymill.cluster.processes import Process
from raymill.cluster.providers import namespace
from raymill.cluster.spec import ClusterConfig, ListenSpec, load_config, parse_config
from raymill.cluster.spot_state import market_path
from raymill.runtime.api_keys import KeyPolicy, read_key_file
from raymill.runtime.errors import ClusterError, Conflict
from raymill.runtime.home import Home

LOCK_WAIT_S = 120.0
"""How long an `up` or `down` waits for another one of the same home."""
_HEAD = ("gcs/gcs_server", "raylet/raylet", "dashboard/dashboard.py", "autoscaler/v2/monitor.py")
"""Words in the command lines of the head's own processes; a head without one of them is dead to us."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A Ray cluster that raymill may use: started by `up` (`managed`), or found (`attach`)."""

    root: str
    """Root of its RAYMILL_HOME."""
    state: Literal["starting", "running"]
    """How far `up` came."""
    managed: bool
    """Whether `up` started it; else nothing is known of its environment."""
    has_autoscaler: bool
    """Whether nodes come when leases ask for them."""
    address: str
    """Ray's address, `ip:port`."""
    dashboard_url: str
    """Ray dashboard: jobs, Serve's REST."""
    serve_url: str
    """The endpoint."""
    token_path: str
    """File with Ray's token; empty: no token is in use."""
    started_s: float
    """Wall time of its start; 0: unknown."""
    scratch: str = ""
    """Folder of Ray's session, sockets and HAProxy."""
    ports: Ports | None = None
    """Its fixed ports; None: not ours."""
    isolate: bool = False
    """Whether its worker nodes are second hosts."""
    keys: KeyPolicy = KeyPolicy.OFF
    """Who needs an API key."""
    public_host: str = ""
    """Address at which other hosts reach the endpoint; empty: they do not."""
    pids: tuple[Process, ...] = ()
    """The processes that `up` started; workers and worker nodes come and go and are found by their mark."""

    @property
    def home(self) -> Home:
        """Its home."""
        return Home(Path(self.root))

    @property
    def token(self) -> str:
        """Ray's token; empty: none is in use."""
        return Path(self.token_path).read_text().strip() if self.token_path else ""

    @property
    def is_alive(self) -> bool:
        """Whether `up` came to its end and all of the head that Ray does not restart by itself still runs."""
        main = [p for p in self.pids if any(word in p.command for word in _HEAD)]
        return self.state == "running" and len(main) >= 2 and all(p.is_alive for p in main)

    @property
    def public_url(self) -> str:
        """The endpoint, for other hosts; empty: it is not open to them."""
        return f"https://{self._public(self.ports.https)}" if self.ports and self.public_host else ""

    @property
    def public_grpc(self) -> str:
        """Its gRPC, for other hosts."""
        return self._public(self.ports.grpcs) if self.ports and self.public_host else ""

    def _public(self, port: int) -> str:
        return f"[{self.public_host}]:{port}" if is_ipv6(self.public_host) else f"{self.public_host}:{port}"

    @property
    def operator_key(self) -> str | None:
        """The API key for raymill's own calls to the endpoint; None: on this host none is asked for.

        Raises:
            RequestError: its file is not there, or others may read it.
        """
        return read_key_file(self.home.operator_key) if self.keys is KeyPolicy.ALL else None

    def environment(self) -> dict[str, str]:
        """Variables for a process that attaches to it."""
        if self.ports is None:
            return {"RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.dashboard_url}
        here = os.environ.get("PATH", "")
        return client_environment(
            self.home, self.ports, self.address, Path(self.token_path), Path(sys.executable).parent, here
        )

    def enter(self) -> None:
        """Make this process one that attaches: its environment, set before Ray is imported.

        Raises:
            ClusterError: Ray is imported already, with token auth off: it read its variables at import.
        """
        wanted = self.environment()
        mode = wanted.get("RAY_AUTH_MODE")
        if mode and "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != mode:
            raise ClusterError(
                f"ray was imported before the session at {self.root} was entered, and so without its token: "
                "enter it first, or set RAY_AUTH_MODE=token for this process"
            )
        os.environ.update(wanted)

    def serve_options(self) -> dict[str, Any]:
        """What every PUT of Serve's REST config of this session repeats: `proxy_location`, `http_options`."""
        return serve_options(self.ports) if self.ports else {}

    def config(self) -> ClusterConfig | None:
        """The cluster.toml it was started with; None: `up` did not start it.

        Raises:
            ClusterError: the file is lost or damaged.
        """
        if not self.managed:
            return None
        path = _config_path(self.home)
        try:
            return parse_config(json.loads(path.read_text()), str(path))
        except (OSError, ValueError) as err:
            raise ClusterError(f"session file {path} is damaged ({err}): `raymill down`, then `raymill up`") from err

    def document(self) -> dict[str, Any]:
        """For `--json` and for people; holds no secret."""
        public = {"public_url": self.public_url, "public_grpc": self.public_grpc}
        return {**asdict(self), **public, "alive": self.is_alive}


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
        _save(session)
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
        return _clear(home)


def load(home: Home) -> Session | None:
    """What `up` wrote of the session of that home, alive or not; None: there is none.

    Raises:
        ClusterError: the file is damaged.
    """
    path = state_path(home)
    try:
        document = json.loads(path.read_text())
        document["ports"] = Ports(**document["ports"])
        document["keys"] = KeyPolicy(document["keys"])
        document["pids"] = tuple(Process(**p) for p in document["pids"])
        return Session(**document)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as err:
        raise ClusterError(f"session file {path} is damaged ({err}): `raymill down`, then `raymill up`") from err


def state_path(home: Home) -> Path:
    """Where the session's state lies."""
    return home.cluster / "state.json"


def _config_path(home: Home) -> Path:
    return home.cluster / "config.json"


def scratch_path(home: Home) -> Path:
    """Short-named folder for sockets: a Unix socket's path ends at 107 characters, and homes may be deep."""
    return Path("/tmp") / f"raymill-{hashlib.sha256(str(home.root).encode()).hexdigest()[:8]}"


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
    write_json(_config_path(session.home), config.model_dump(mode="json"))
    say("starting Ray's head")
    start.head(session, config)
    session = replace(session, pids=_ours(session.home))
    _save(session)
    if serve:
        say("starting Serve")
        start.serve(session)
    start.front(session, config)
    session = replace(session, state="running", pids=_ours(session.home))
    if not session.is_alive:
        raise ClusterError(f"the head did not stay up: see {start.head_log(session.home)} and {session.scratch}")
    _save(session)
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


def _save(session: Session) -> None:
    write_json(state_path(session.home), asdict(session))


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
