"""Starting the processes of a session: the head by `ray start`, Serve by its REST config."""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import yaml

from raymill.cluster import processes, serve_proxy
from raymill.cluster.environment import (
    HEAD_INSTANCE,
    INSTANCE_LABEL,
    TYPE_LABEL,
    autoscaling_document,
    cluster_environment,
)
from raymill.cluster.front import CERTIFICATE, PRIVATE_KEY, Front, haproxy_text, is_ipv6
from raymill.cluster.processes import SESSION_MARK
from raymill.cluster.providers import namespace
from raymill.cluster.session import Session
from raymill.cluster.spec import HEAD_TYPE, ClusterConfig
from raymill.runtime.errors import ClusterError
from raymill.runtime.home import Home
from raymill.runtime.whole_files import PRIVATE, write_whole

HEAD_TIMEOUT_S = 120.0
SERVE_TIMEOUT_S = 90.0
FRONT_TIMEOUT_S = 20.0
FRONT_KEEPER = "raymill.cluster.front_keeper"
"""Module that the front's process runs."""
RAY_FOLDER = "r"
"""Ray's folder within the scratch folder: Ray opens its own to everybody, ours around it is closed."""
MIN_DISK_MB = 2_000
"""Free disk below which Ray's logs and spilled objects, or the lake, would soon fail."""
OWN_MEMORY_MB = 2_500
"""Memory of the control processes, replicas and two worker nodes, as measured, beside the object stores."""


def check_machine(home: Home, config: ClusterConfig) -> None:
    """Refuse a machine that is too small.

    Raises:
        ClusterError: names what is short, how much there is, and how much is needed.
    """
    workers = sum(kind.object_store_mb * kind.max_workers for kind in config.node_types.values())
    stores_mb = config.head.object_store_mb + (0 if config.provider.isolate else workers)
    home.root.mkdir(parents=True, exist_ok=True)
    have_need = {
        f"disk at {home.root}": (shutil.disk_usage(home.root).free >> 20, MIN_DISK_MB),
        "disk at /tmp": (shutil.disk_usage("/tmp").free >> 20, MIN_DISK_MB),
        "shared memory at /dev/shm": (shutil.disk_usage("/dev/shm").free >> 20, stores_mb),
        "memory": (psutil.virtual_memory().available >> 20, OWN_MEMORY_MB + stores_mb),
    }
    short = [f"{what}: {have} MB free, {need} MB needed" for what, (have, need) in have_need.items() if have < need]
    if short:
        raise ClusterError("; ".join(short) + ": free some, or lower object_store_mb and max_workers in cluster.toml")


def own_address() -> str:
    """This machine's address as Ray picks it: that of the route outward, else loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))  # sends nothing: UDP only asks for the route
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def head_log(home: Home) -> Path:
    """What `ray start` of the head printed."""
    return home.cluster / "logs" / "head.log"


def head(session: Session, config: ClusterConfig) -> None:
    """Run `ray start --head` to its end.

    Raises:
        ClusterError: it failed or hung; holds the end of its log.
    """
    home, ports = session.home, session.ports
    assert ports is not None
    scratch = Path(session.scratch)
    _own_folder(scratch)
    document = home.cluster / "autoscaling.yaml"
    document.write_text(yaml.safe_dump(autoscaling_document(config, home, session.address, scratch), sort_keys=False))
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
        f"--node-ip-address={session.address.rpartition(':')[0]}",
        f"--port={ports.gcs}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={ports.dashboard}",
        f"--dashboard-agent-listen-port={ports.agent}",
        f"--ray-client-server-port={ports.client}",
        f"--temp-dir={scratch / RAY_FOLDER}",
        f"--num-cpus={config.head.cpus}",
        f"--num-gpus={config.head.gpus}",
        f"--memory={config.head.memory_mb << 20}",
        f"--object-store-memory={config.head.object_store_mb << 20}",
        f"--resources={json.dumps(config.head.resources)}",
        f"--labels={INSTANCE_LABEL}={HEAD_INSTANCE},{TYPE_LABEL}={HEAD_TYPE}",
        f"--autoscaling-config={document}",
        *("--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"),
    ]
    interface = namespace.network_of(home.root).name if session.isolate else ""
    environment = {
        **cluster_environment(os.environ, session.environment(), home, scratch, ports, interface, session.keys),
        **serve_proxy.lay_launcher(scratch / "ha"),
    }
    log = head_log(home)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command,
                env=environment,
                cwd=home.cluster,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=HEAD_TIMEOUT_S,
                start_new_session=True,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as err:
            raise ClusterError(f"`ray start --head` hung for {HEAD_TIMEOUT_S:.0f} s: see {log} and {scratch}") from err
    if code != 0:
        raise ClusterError(f"`ray start --head` failed with {code}; the end of {log}:\n{_tail(log)}")


def serve(session: Session) -> None:
    """Start Serve's controller and HAProxy, without an application, and wait until the port answers.

    Raises:
        ClusterError: the dashboard refuses, or the port stays shut.
    """
    assert session.ports is not None
    put_serve(session, {**session.serve_options(), "applications": []})
    deadline = time.monotonic() + SERVE_TIMEOUT_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", session.ports.serve)) == 0:
                return
        time.sleep(0.05)
    raise ClusterError(
        f"Serve's proxy does not listen on {session.serve_url}: see serve/ in the logs under {session.scratch}"
    )


def ray_token() -> Path:
    """Ray's token file, made if it is not there, readable by its owner only."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists() or not path.read_text().strip():
            write_whole(path, secrets.token_hex(32), mode=PRIVATE)
        path.chmod(0o600)
    except OSError as err:
        raise ClusterError(f"Ray's token {path} can not be written ({err.strerror}): mend its folder's owner") from err
    return path


def front(session: Session, config: ClusterConfig) -> None:
    """Start the front for other hosts, if there is to be one and it does not run, and wait until its ports answer.

    Raises:
        ClusterError: it does not come up; holds the end of its log.
    """
    listen, ports = config.listen, session.ports
    assert ports is not None
    gcs = next((p for p in session.pids if "gcs/gcs_server" in p.command), None)
    if not listen.host or gcs is None or front_runs(session):
        return
    folder = Path(session.scratch) / "front"
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, file in ((CERTIFICATE, listen.certificate), (PRIVATE_KEY, listen.private_key)):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(Path(file).expanduser().absolute())
    plan = Front(
        host=listen.host, https=ports.https, grpcs=ports.grpcs, serve=ports.serve, grpc=ports.grpc, folder=folder
    )
    text = folder / "haproxy.cfg"
    text.write_text(haproxy_text(plan))
    log = session.home.cluster / "logs" / "front.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        keeper = subprocess.Popen(
            [sys.executable, "-m", FRONT_KEEPER, str(text), str(gcs.pid)],
            env={**os.environ, SESSION_MARK: str(session.home.root)},
            cwd=session.home.cluster,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + FRONT_TIMEOUT_S
    host = session.public_host
    while not all(map(functools.partial(_answers, host), (ports.https, ports.grpcs))):
        if keeper.poll() is not None or time.monotonic() > deadline:
            processes.end(processes.with_descendants(filter(None, [processes.describe(keeper.pid)])))
            raise ClusterError(f"the front at {listen.host} does not come up; the end of {log}:\n{_tail(log)}")
        time.sleep(0.05)


def _answers(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if is_ipv6(host) else socket.AF_INET) as probe:
        return probe.connect_ex((host, port)) == 0


def front_runs(session: Session) -> bool:
    """Whether the front's keeper runs."""
    return any(FRONT_KEEPER in p.command for p in processes.marked(SESSION_MARK, session.root))


def put_serve(session: Session, document: dict[str, Any]) -> None:
    """PUT Serve's whole REST config."""
    request = urllib.request.Request(
        f"{session.dashboard_url}/api/serve/applications/",
        data=json.dumps(document).encode(),
        method="PUT",
        headers={"Authorization": f"Bearer {session.token}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=SERVE_TIMEOUT_S):
            return
    except urllib.error.HTTPError as err:
        said = err.read().decode(errors="replace")[-800:]
        raise ClusterError(f"Serve did not start: {request.full_url} answers {err.code}: {said}") from err
    except OSError as err:
        raise ClusterError(
            f"Ray's dashboard {session.dashboard_url} does not answer ({err}): see {session.scratch}"
        ) from err


def _own_folder(scratch: Path) -> None:
    """The scratch folder, which nobody else may have laid there."""
    scratch.mkdir(mode=0o700, exist_ok=True)
    if scratch.is_symlink() or scratch.stat().st_uid != os.getuid():
        raise ClusterError(f"{scratch} belongs to another user: remove it")
    scratch.chmod(0o700)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
