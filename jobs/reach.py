"""How this process reaches the endpoint of a session: as its operator, and as a caller; keys included."""

from __future__ import annotations

from raymill.actors.endpoint import Endpoint
from raymill.cluster.session import Session
from raymill.runtime.client import Client


def endpoint_of(session: Session) -> Endpoint:
    """The application on the session's Serve, to deploy and to change.

    Raises:
        RequestError: the operator's key is not there, or others may read it.
    """
    return Endpoint(
        session.dashboard_url,
        session.home,
        url=session.serve_url,
        serve_options=session.serve_options(),
        keys=session.keys,
    )


def client_of(session: Session, *, deadline_s: float = 60.0) -> Client:
    """A caller of it on this host, with the operator's key where one is needed.

    Raises:
        RequestError: as `endpoint_of`.
    """
    return Client(session.serve_url, key=session.operator_key, deadline_s=deadline_s)
