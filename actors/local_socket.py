"""The replica's server on a Unix socket, too, for a proxy on the same host: half of what TCP takes in the kernel.

uvicorn is given its listening sockets by Serve and knows of no other, so the socket is opened here, with the protocol
that uvicorn asks for each connection; such connections are uvicorn's own in all else, its shutdown included. What
Serve's proxy is told to use is decided by its launcher (`cluster/serve_proxy.py`): where there is no such socket, TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from raymill.actors.fastlane import Fast
from raymill.runtime.home import SOCKETS_VARIABLE

_log = logging.getLogger(__name__)

TAKEN_AT_ONCE = 256
"""Connections that are taken in one turn of the event loop. A server of uvloop's takes one: of two hundred that a
proxy opens for a burst the last would wait two hundred turns, and each turn computes a batch for those before."""
_AGAIN_S = 1.0
"""After which it is tried again where the process has no descriptor left for a connection."""
_RANGE = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")
_LOOK_S, _LOOKS = 0.05, 600


class LocalSocket:
    """Of one replica; used on the event loop of its server."""

    def __init__(self, fast: Fast, environment: Mapping[str, str]) -> None:
        self._fast, self._environment = fast, environment
        self._listener: _Listener | None = None

    async def open(self, address: str) -> None:
        """Open it, as soon as uvicorn listens; nothing, where no folder is named.

        Args:
            address: this node's, by which Serve's proxy knows the replica.
        """
        folder = self._environment.get(SOCKETS_VARIABLE)
        if not folder or not all(name in self._environment for name in _RANGE):
            return
        for _ in range(_LOOKS):
            if (found := self._listening()) is not None:
                break
            await asyncio.sleep(_LOOK_S)
        else:
            return
        host, port = found
        _, writer = await asyncio.open_connection("127.0.0.1" if host in ("0.0.0.0", "::") else host, port)
        writer.close()  # all that is wanted is the protocol's arguments
        while self._fast.arguments is None:
            await asyncio.sleep(_LOOK_S)
        arguments = self._fast.arguments
        path = Path(folder, f"{address}_{port}.sock")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a replica that was killed
        self._listener = _Listener(path, lambda: self._fast.protocol(**arguments))

    def close(self) -> None:
        """Take no further connections; those that are open are uvicorn's to end."""
        if self._listener is not None:
            self._listener.close()

    def _listening(self) -> tuple[str, int] | None:
        low, high = (int(self._environment[name]) for name in _RANGE)
        for one in psutil.Process().net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and low <= one.laddr.port <= high:
                return one.laddr.ip, one.laddr.port
        return None


class _Listener:
    """A Unix socket that takes all connections that wait."""

    def __init__(self, path: Path, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Listen at `path`, which is the owner's alone; `protocol` makes that of a connection."""
        self._path, self._protocol = path, protocol
        self._loop = asyncio.get_running_loop()
        self._begun: set[asyncio.Task[object]] = set()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.setblocking(False)
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.listen(2048)
        self._loop.add_reader(self._socket, self._take)

    def close(self) -> None:
        """Take none any more."""
        self._loop.remove_reader(self._socket)
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _take(self) -> None:
        for _ in range(TAKEN_AT_ONCE):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as err:
                _log.error("no connection is taken for %.0f s: %s", _AGAIN_S, err)
                self._loop.remove_reader(self._socket)
                self._loop.call_later(_AGAIN_S, self._wait)
                return
            begun = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
            self._begun.add(begun)
            begun.add_done_callback(self._begun.discard)

    def _wait(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._take)
