"""Serve's own books, kept for requests that never pass through Serve: its counters, latencies and requests under way.

Serve counts the requests under way for draining (a replica leaves when none is left) and for autoscaling; its panels
show the counters. Both live in the replica's metrics manager, found behind the ASGI application of its server.
Counters are exact; of the latencies of a busy second a sample is noted, since each costs as much as a small model.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from raymill.runtime.errors import Unavailable

ROUTE = "/"
EVERY_S = 0.25
MOST_LATENCIES = 100
"""Latencies of one status that are noted each `EVERY_S`."""
LOGGED_ONE_OF = 1000
GONE = 499
"""Status of a caller who had gone, by which Serve counts it too."""
_METHOD = "POST"

_access = logging.getLogger("raymill.access")


class ServeAccounts:
    """Of one replica."""

    def __init__(self, replica: Any, grpc_method: str = "", code_of: Callable[[int], str] = str) -> None:
        """Of HTTP's requests, or of those of one gRPC method (`/package.Service/Method`), with their codes' names."""
        from ray.serve._private.common import RequestMetadata, RequestProtocol

        self._manager = replica._metrics_manager
        self._protocol = RequestProtocol.GRPC if grpc_method else RequestProtocol.HTTP
        self._method, self._code_of = grpc_method or _METHOD, code_of
        deployment = replica._deployment_id
        self._names = {"app_name": deployment.app_name, "deployment_name": deployment.name}
        self._request = RequestMetadata(
            request_id="",
            internal_request_id="",
            call_method="__call__",
            route=ROUTE,
            app_name=deployment.app_name,
            is_streaming=True,
            _request_protocol=self._protocol,
            _http_method="" if grpc_method else _METHOD,
            _grpc_service_method=grpc_method,
            is_direct_ingress=True,
        )
        self._seconds: dict[int, list[float]] = {}
        self._count = 0
        self._waits = False
        self._change = 0
        """By how much more requests are under way than Serve knows."""
        self._settles = False
        self._manager.inc_num_ongoing_requests(self._request)
        self._manager.dec_num_ongoing_requests(self._request)

    def begin(self) -> None:
        """A request is under way: the replica does not leave before it is answered.

        Serve is told at the end of this turn of the event loop, of what was not answered in it.
        """
        self._changed(1)

    def end(self, status: int, seconds: float, request_id: str, path: str) -> None:
        """It was answered so."""
        self._changed(-1)
        self._seconds.setdefault(status, []).append(seconds)
        if not self._waits:
            self._waits = True
            asyncio.get_running_loop().call_later(EVERY_S, self.publish)
        self._count += 1
        if self._count % LOGGED_ONE_OF == 0 or status >= 500:
            _access.info(
                json.dumps(
                    {"time": round(time.time(), 3), "status": status, "ms": round(seconds * 1e3, 3), "path": path}
                    | {"request_id": request_id, "one_of": 1 if status >= 500 else LOGGED_ONE_OF}
                )
            )

    def _changed(self, by: int) -> None:
        self._change += by
        if not self._settles:
            self._settles = True
            asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        change, self._change, self._settles = self._change, 0, False
        tell = self._manager.inc_num_ongoing_requests if change > 0 else self._manager.dec_num_ongoing_requests
        for _ in range(abs(change)):
            tell(self._request)

    def publish(self) -> None:
        """Hand what has gathered to Serve."""
        gathered, self._seconds, self._waits = self._seconds, {}, False
        for status, seconds in gathered.items():
            step = -(-len(seconds) // MOST_LATENCIES)
            noted = seconds[::step]
            for one in noted:
                self._note(status, one * 1e3)
            if len(noted) < len(seconds):
                self._add(status, len(seconds) - len(noted), (sum(seconds) - sum(noted)) * 1e3)

    def _note(self, status: int, latency_ms: float) -> None:
        """One request, as Serve notes it."""
        # An answer with an error status is no exception of the deployment: Serve counts those apart.
        self._manager.record_request_metrics(route=ROUTE, latency_ms=latency_ms, is_error=status == GONE)
        self._manager.record_ingress_request_metrics(
            protocol=self._protocol,
            method=self._method,
            route=ROUTE,
            latency_ms=latency_ms,
            is_error=status >= 400,
            status_code=self._code_of(status),
            **self._names,
        )

    def _add(self, status: int, count: int, latency_ms: float) -> None:
        """More requests of that status, their latencies together: counters alone."""
        manager = self._manager
        manager._user_code_time_accumulator.add(latency_ms)
        if status == GONE:
            manager._error_counter.inc(count, tags={"route": ROUTE, "exception_type": "Unknown"})
        else:
            manager._request_counter.inc(count, tags={"route": ROUTE})
        ingress = manager._ingress_metrics.get(self._protocol)
        if ingress is None:  # HAProxy's metrics are on, and count the requests
            return
        code = self._code_of(status)
        tags = {"route": ROUTE, "method": self._method, "application": self._names["app_name"], "status_code": code}
        ingress.request_counter.inc(count, tags=ingress.request_tags(**tags))
        if status >= 400:
            ingress.request_error_counter.inc(count, tags=ingress.request_error_tags(**tags))
            deployment = self._names["deployment_name"]
            ingress.deployment_request_error_counter.inc(
                count, tags=ingress.deployment_error_tags(**tags, deployment=deployment)
            )


def open_access_log() -> None:
    """Write sampled requests to standard error, which Ray keeps in the worker's own log file."""
    if not _access.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("raymill.access %(message)s"))
        _access.addHandler(handler)
        _access.setLevel(logging.INFO)
        _access.propagate = False


def accounts_of(app: Any) -> ServeAccounts:
    """The books of the replica behind a server's ASGI application.

    Raises:
        Unavailable: there is no Serve replica behind it.
    """
    open_access_log()
    for _ in range(16):
        replica = getattr(app, "__self__", None)
        if replica is not None and hasattr(replica, "_metrics_manager"):
            return ServeAccounts(replica)
        app = next((inner for name in ("app", "_app") if (inner := getattr(app, name, None)) is not None), None)
    raise Unavailable("no replica of Serve was found behind the server's application")
