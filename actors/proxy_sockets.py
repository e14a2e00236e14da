"""How a proxy's connections come in: on the same host by a Unix socket, which takes the kernel less than TCP.

uvicorn is given its listening sockets by Serve and knows of no other, so the socket is opened here, with the protocol
that uvicorn asks for each connection; such connections are uvicorn's own in all else, its shutdown included. What
Serve's proxy is told to use is decided by its launcher (`cluster/serve_proxy.py`): where there is no such socket, TCP,
whose connections are taken here beside uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from raymill.actors.fast_server import Fast
from raymill.actors.fastlane import FastLane
from raymill.runtime.home import SOCKETS_VARIABLE

_log = logging.getLogger(__name__)

TAKEN_AT_ONCE = 256
"""Connections that are taken in one turn of the event loop. A server of uvloop's takes one: of two hundred that a
proxy opens for a burst the last would wait two hundred turns, and each turn computes a batch for those before."""
_AGAIN_S = 1.0
"""After which it is tried again where the process has no descriptor left for a connection."""
_RANGE = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")
_LOOK_S, _LOOKS = 0.05, 600


class ProxySockets:
    """Of one replica; used on the event loop of its server."""

    def __init__(self, fast: Fast, environment: Mapping[str, str]) -> None:
        self._fast, self._environment = fast, environment
        self._listeners: list[_Listener] = []
        self._path: Path | None = None

    async def open(self, address: str) -> None:
        """Take connections as soon as uvicorn listens; the TCP port's connections alone, where no folder is named.

        Args:
            address: this node's, by which Serve's proxy knows the replica.
        """
        if not all(name in self._environment for name in _RANGE):
            return
        for _ in range(_LOOKS):
            if (found := self._listening()) is not None:
                break
            await asyncio.sleep(_LOOK_S)
        else:
            return
        host, port, descriptor = found
        _, writer = await asyncio.open_connection("127.0.0.1" if host in ("0.0.0.0", "::") else host, port)
        writer.close()  # all that is wanted is the protocol's arguments
        while self._fast.arguments is None:
            await asyncio.sleep(_LOOK_S)
        arguments = self._fast.arguments
        self._listen(socket.socket(fileno=os.dup(descriptor)), descriptor, arguments)
        if folder := self._environment.get(SOCKETS_VARIABLE):
            path = Path(folder, f"{address}_{port}.sock")
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of a replica that was killed
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(str(path))
            self._path = path
            path.chmod(0o600)
            listening.listen(2048)
            self._listen(listening, descriptor, arguments)

    def close(self) -> None:
        """Take no further connections; those that are open are uvicorn's to end."""
        for listener in self._listeners:
            listener.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _listen(self, listening: socket.socket, descriptor: int, arguments: Mapping[str, Any]) -> None:
        """Take connections there, as long as the descriptor is that of Serve's socket."""
        its = _inode(descriptor)
        self._listeners.append(
            _Listener(listening, lambda: FastLane(self._fast, **arguments), lambda: _inode(descriptor) == its)
        )

    def _listening(self) -> tuple[str, int, int] | None:
        """Address, port and descriptor of Serve's socket."""
        low, high = (int(self._environment[name]) for name in _RANGE)
        for one in psutil.Process().net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and low <= one.laddr.port <= high:
                return one.laddr.ip, one.laddr.port, one.fd
        return None


class _Listener:
    """Takes all connections that wait at a listening socket."""

    def __init__(
        self, listening: socket.socket, protocol: Callable[[], asyncio.Protocol], goes_on: Callable[[], bool]
    ) -> None:
        """`listening` is the listener's from now on; `protocol` makes that of a connection.

        Once the server does not go on, none is taken: it waits for those that it has, and would wait for a new one.
        """
        self._protocol, self._goes_on = protocol, goes_on
        self._loop = asyncio.get_running_loop()
        self._begun: set[asyncio.Task[object]] = set()
        self._socket = listening
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._take)

    def close(self) -> None:
        """Take none any more."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _take(self) -> None:
        if not self._goes_on():
            self.close()
            return
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
            begun.add_done_callback(self._ended)

    def _ended(self, begun: asyncio.Task[object]) -> None:
        self._begun.discard(begun)
        if not begun.cancelled() and (err := begun.exception()) is not None:
            _log.error("a connection was not begun", exc_info=err)

    def _wait(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._take)


def _inode(descriptor: int) -> int:
    """By which a socket is known; -1: the descriptor is closed."""
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return -1
