"""Small requests to predict through Serve's HAProxy as streams: they outlive their replica, none waits for another."""

import csv
import http.client
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from raymill.actors import grpc_heads
from raymill.actors.open_inference_pb2 import ModelInferRequest, ModelInferResponse
from raymill.cluster import serve_proxy
from raymill.cluster.ports import choose
from raymill.runtime.home import SOCKETS_VARIABLE
from tests.actors import streaming_replica
from tests.actors.test_proxy_retries import configuration, connects

BESIDE = f"HTTP{serve_proxy._BESIDE}"


@pytest.fixture
def proxied(tmp_path):
    """Starts Serve's HAProxy by our launcher before so many replicas."""
    started = []
    folder = Path(tempfile.mkdtemp(prefix="rms"))  # a socket's path is short

    def start(count, by_sockets=True):
        command = [sys.executable, streaming_replica.__file__, str(folder)]
        replicas = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
        started.extend(replicas)
        ports = choose("auto")
        path = configuration(tmp_path, ports, [int(p.stdout.readline()) for p in replicas])
        binary = serve_proxy.lay_launcher(tmp_path / "ha")["RAY_SERVE_HAPROXY_BINARY_PATH"]
        environment = {**os.environ, SOCKETS_VARIABLE: str(folder) if by_sockets else ""}
        started.append(subprocess.Popen([binary, "-db", "-f", str(path), "-dR"], env=environment))
        end = time.monotonic() + 20
        while time.monotonic() < end and not connects("127.0.0.1", ports.serve):
            time.sleep(0.02)
        return SimpleNamespace(ports=ports, replicas=replicas, port=ports.serve, text=path.read_text())

    yield start
    for process in started:
        process.kill()
        process.wait()
    shutil.rmtree(folder)


def ask(port, body, path="/predict/a", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, body, {name: str(value) for name, value in headers.items()})
    reply = connection.getresponse()
    found = reply.status, reply.read()
    connection.close()
    return found


def counts(proxy):
    """Requests that each backend had."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{proxy.ports.haproxy_stats}/stats;csv", timeout=10).read().decode()
    rows = csv.DictReader(io.StringIO(text.removeprefix("# ")))
    return {row["pxname"]: int(row["stot"]) for row in rows if row["svname"] == "BACKEND"}


@pytest.mark.parametrize("by_sockets", [True, False])
def test_small_requests_to_predict_come_as_streams_and_all_others_do_not(proxied, by_sockets):
    proxy = proxied(1, by_sockets)
    assert proxy.text.count("unix@") == by_sockets * 4  # by HTTP and gRPC, each way
    small = b"s" * serve_proxy.STREAMED_BYTES
    for path in ("/predict/a", "/v2/models/a/infer", "/v2/models/a/versions/1/infer"):
        assert ask(proxy.port, small, path) == (200, small)
    assert ask(proxy.port, small, "/predict/a?odd=1") == (200, b"app")
    assert counts(proxy)[BESIDE] == 4 and counts(proxy)["HTTP"] == 0
    large = b"l" * (serve_proxy.STREAMED_BYTES + 1)
    assert ask(proxy.port, large) == (200, large)
    assert ask(proxy.port, iter([b"chunk", b"s"])) == (200, b"app")
    assert ask(proxy.port, b"", "/elsewhere") == (200, b"app")
    assert counts(proxy)[BESIDE] == 4 and counts(proxy)["HTTP"] == 3


def test_answers_of_any_size_are_whole(proxied):
    proxy = proxied(1)
    infer = calls(proxy)
    for size in (0, 1, 12_288, 12_289, 65_536, 300_000, 3_000_000):
        assert ask(proxy.port, b"x", size=size) == (200, b"x".ljust(size, b"."))
        answer = infer(ModelInferRequest(id="x"), metadata=[("size", str(size))], timeout=20)
        assert answer.id == "x" and answer.raw_output_contents == [bytes(size)]
    large = ModelInferRequest(id="y", raw_input_contents=[bytes(3_000_000)])
    assert infer(large, timeout=20).id == "y"
    assert counts(proxy)[f"gRPC{serve_proxy._BESIDE}"] == 8 and counts(proxy)["gRPC"] == 0


def calls(proxy):
    """`ModelInfer` of gRPC's own client."""
    channel = grpc.insecure_channel(f"127.0.0.1:{proxy.ports.grpc}")
    return channel.unary_unary(
        grpc_heads.INFER.decode(), ModelInferRequest.SerializeToString, ModelInferResponse.FromString
    )


def test_a_killed_replica_costs_no_call_of_grpc(proxied):
    proxy = proxied(2)
    infer, found = calls(proxy), []

    def call(n):
        found.append(infer(ModelInferRequest(id=f"{n}"), metadata=[("wait", "0.5")], timeout=20).id == f"{n}")

    callers = [threading.Thread(target=call, args=(n,)) for n in range(30)]
    for caller in callers:
        caller.start()
    time.sleep(0.2)
    proxy.replicas[0].send_signal(signal.SIGKILL)
    for caller in callers:
        caller.join()
    assert found == [True] * 30


def test_a_call_of_grpc_that_is_refused_or_too_late_is_told_so(proxied):
    proxy = proxied(1)
    infer = calls(proxy)
    with pytest.raises(grpc.RpcError) as told:
        infer(ModelInferRequest(id="x"), metadata=[("wait", "30")], timeout=0.3)
    assert told.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    with pytest.raises(grpc.RpcError) as told:
        infer(ModelInferRequest(id="x"), metadata=[("refused", "100 % wrong")], timeout=20)
    assert told.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "100 % wrong" in told.value.details()


def together(proxy, count, during=lambda: None, size=0, **headers):
    """What so many callers got who ask at once with bodies of that size, while something happens."""
    found = []

    def call(n):
        body = (b"%d" % n).ljust(size, b".")
        found.append(ask(proxy.port, body, **headers) == (200, body))

    callers = [threading.Thread(target=call, args=(n,)) for n in range(count)]
    for caller in callers:
        caller.start()
    time.sleep(0.1)
    during()
    for caller in callers:
        caller.join()
    return found


@pytest.mark.parametrize("size", [1, serve_proxy.STREAMED_BYTES])
def test_a_killed_replica_costs_nobody_anything(proxied, size):
    proxy = proxied(2)
    kill = lambda: proxy.replicas[0].send_signal(signal.SIGKILL)  # noqa: E731
    assert together(proxy, 60, kill, size, wait=0.5) == [True] * 60
    assert together(proxy, 60) == [True] * 60


def test_a_request_that_kills_its_replica_is_asked_of_another(proxied, tmp_path):
    proxy = proxied(2)
    for n in range(3):
        assert ask(proxy.port, b"x", ends=tmp_path / "ended") == (200, b"x"), n
    assert sorted(p.poll() is None for p in proxy.replicas) == [False, True]


def test_a_replica_that_stops_under_load_costs_nobody_anything(proxied):
    proxy = proxied(2)
    found, ends = [], threading.Event()

    def call():
        while not ends.is_set():
            found.append(ask(proxy.port, b"x", wait=0.02))

    callers = [threading.Thread(target=call) for _ in range(20)]
    for caller in callers:
        caller.start()
    time.sleep(0.5)
    proxy.replicas[0].send_signal(signal.SIGTERM)
    assert proxy.replicas[0].wait(15) is not None
    time.sleep(1)
    ends.set()
    for caller in callers:
        caller.join()
    assert set(found) == {(200, b"x")} and len(found) > 500


def test_who_does_not_read_a_large_answer_holds_nobody_up(proxied):
    proxy = proxied(1)
    size = 8_000_000
    slow = []
    for _ in range(3):
        slow.append(socket.socket())
        slow[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow[-1].connect(("127.0.0.1", proxy.port))
        slow[-1].sendall(b"POST /predict/a HTTP/1.1\r\nHost: a\r\nSize: %d\r\nContent-Length: 1\r\n\r\nx" % size)
        begun = time.monotonic()
        assert all(together(proxy, 30))
        assert time.monotonic() - begun < 5
    for one in slow:
        got = 0
        while got < size and (data := one.recv(1 << 20)):
            got += len(data)
        assert got > size
        one.close()
