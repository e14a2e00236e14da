"""A cluster that `up` did not start: what raymill can say of it, so that a run knows which parts to skip."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from raymill.cluster.session import Session, load
from raymill.runtime.errors import ClusterError
from raymill.runtime.home import current_home

PLAIN_HOME = "~/.raymill"
"""Home on a cluster that `up` did not start."""


def current(address: str | None = None) -> Session:
    """The session that this process should use: the running one of its home, else the plain cluster it can reach.

    Raises:
        ClusterError: no cluster runs.
    """
    session = load(current_home())
    if session and session.is_alive and address in (None, "auto", session.address):
        return session
    return attach(address)


def attach(address: str | None = None) -> Session:
    """Join a running cluster and describe it; the process is connected to it afterwards.

    Nothing is known of such a cluster's environment: it has no autoscaler of ours and no markets, and Serve runs
    there with whatever variables its owner set.

    Raises:
        ClusterError: no cluster runs there, or it does not let us in.
    """
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if token.exists():  # as `ray start` does; Ray reads the variable when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")

    import ray

    try:
        if not ray.is_initialized():
            ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as err:
        raise ClusterError(
            f"no Ray cluster at {address or os.environ.get('RAY_ADDRESS') or 'this machine'} ({err}): "
            "start one with `raymill up`, or with `ray start --head`"
        ) from err
    node = ray._private.worker.global_worker.node
    found = str(ray.get_runtime_context().gcs_address)
    home = current_home(PLAIN_HOME)
    known = load(home)
    if known and known.is_alive and known.address == found:
        return known
    dashboard = os.environ.get("RAY_API_SERVER_ADDRESS") or f"http://{node.webui_url or '127.0.0.1:8265'}"
    token_path = str(token) if token.exists() else ""
    return Session(
        root=str(home.root),
        state="running",
        managed=False,
        has_autoscaler=False,
        address=found,
        dashboard_url=dashboard,
        serve_url=_serve_url(dashboard, token_path),
        token_path=token_path,
        started_s=0.0,
    )


def lacks(session: Session) -> tuple[str, ...]:
    """What a run on it has to do without, `what: why` each; nothing, where `up` started it."""
    if session.managed:
        return ()
    why = "this cluster was not started by `raymill up`"
    return (
        f"nodes on demand: {why}, so a gang takes the free CPUs there are",
        f"cost: {why}, so its nodes have no price and no hours",
        f"Serve behind HAProxy, short drains: {why}, so Serve runs with its owner's variables",
    )


def _serve_url(dashboard: str, token_path: str) -> str:
    """Where Serve listens, if it runs, else its default."""
    headers = {"Authorization": f"Bearer {Path(token_path).read_text().strip()}"} if token_path else {}
    request = urllib.request.Request(f"{dashboard}/api/serve/applications/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            options = json.load(answer).get("http_options") or {}
    except (OSError, ValueError):  # no dashboard: nothing better is known than the default
        options = {}
    host = options.get("host") or "127.0.0.1"
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{options.get('port') or 8000}"
