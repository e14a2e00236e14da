"""A Ray cluster that raymill may use, as a value, and the file in which `up` writes down what it started."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from raymill.cluster.environment import client_environment, serve_options
from raymill.cluster.front import is_ipv6
from raymill.cluster.ports import Ports
from raymill.cluster.processes import Process
from raymill.cluster.spec import ClusterConfig, parse_config
from raymill.runtime.api_keys import KeyPolicy, read_key_file
from raymill.runtime.errors import ClusterError
from raymill.runtime.home import Home
from raymill.runtime.whole_files import write_json

_HEAD = ("gcs/gcs_server", "raylet/raylet", "dashboard/dashboard.py", "autoscaler/v2/monitor.py")
"""Words in the command lines of the head's own processes; a head without one of them is dead to us."""


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
        path = config_path(self.home)
        try:
            return parse_config(json.loads(path.read_text()), str(path))
        except (OSError, ValueError) as err:
            raise ClusterError(f"session file {path} is damaged ({err}): `raymill down`, then `raymill up`") from err

    def document(self) -> dict[str, Any]:
        """For `--json` and for people; holds no secret."""
        public = {"public_url": self.public_url, "public_grpc": self.public_grpc}
        return {**asdict(self), **public, "alive": self.is_alive}


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


def config_path(home: Home) -> Path:
    """Where the checked cluster.toml lies that the session was started with."""
    return home.cluster / "config.json"


def scratch_path(home: Home) -> Path:
    """Short-named folder for sockets: a Unix socket's path ends at 107 characters, and homes may be deep."""
    return Path("/tmp") / f"raymill-{hashlib.sha256(str(home.root).encode()).hexdigest()[:8]}"


def save(session: Session) -> None:
    """Write down what is started, or about to be."""
    write_json(state_path(session.home), asdict(session))
