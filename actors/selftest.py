"""The start-up test of the fast lane: the same bytes down both lanes must come back as the same bytes.

It runs in memory beside the replica, with a small model of its own and its own folder, through the uvicorn, httptools
and middleware that are installed; what differs is told, and the fast lane stays shut. The same requests as streams
must get the same replies; else no streams are taken.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from raymill.actors import http2, wire
from raymill.actors.fast_server import Fast
from raymill.actors.fastlane import FastLane
from raymill.actors.proxy_streams import Streams
from raymill.actors.rollout import ColumnForm, ModelSpec, Role, Route, to_user_config

ANSWER_WITHIN_S = 5.0
_MODEL = "selftest"
_VARIES = (
    re.compile(rb"date: [^\r]*"),
    re.compile(rb"[0-9A-HJKMNP-TV-Z]{26}"),  # fresh prediction ids
    re.compile(rb"x-request-id: (?!given)[^\r]*"),
)


class Wire(asyncio.Transport):
    """A connection in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default


class Differences(NamedTuple):
    """What is answered differently than uvicorn and the application answer; empty: nothing."""

    lane: str
    streams: str


async def differences(make: Callable[[Path], Any]) -> Differences:
    """Ask all ways.

    Args:
        make: a replica for a folder, whose models are those of `stand_ins`.
    """
    with tempfile.TemporaryDirectory(prefix="raymill-selftest-") as folder:
        replica = make(Path(folder))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, replica.start)
        try:
            await replica.reconfigure(to_user_config([spec()]))
            return await _compare(replica, requests())
        finally:
            await loop.run_in_executor(None, replica.stop)


async def _compare(replica: Any, sent: Mapping[str, bytes]) -> Differences:
    app = as_serve_does(replica.__serve_build_asgi_app__())
    fast = Fast(replica, refusal=replica.door.refusal)
    streams = ""
    for what, data in sent.items():
        taken = fast.requests
        quick, plain = await converse(partial(FastLane, fast), app, data), await converse(HttpToolsProtocol, app, data)
        if fast.reason:
            return Differences(fast.reason, fast.reason)
        if fast.requests == taken:
            return Differences(f"{what}: the fast lane did not take it", "there is no fast lane")
        if masked(quick) != masked(plain):
            return Differences(f"{what}: {_begins(quick)} is not {_begins(plain)}", "there is no fast lane")
        if not streams and _is_one(data):
            try:
                streamed = await _as_stream(fast, app, data)
            except Exception as err:  # noqa: BLE001 - whatever breaks in what is installed
                streamed = f"{type(err).__name__}: {err}".encode()
            if masked(streamed) != masked(plain):
                streams = f"{what}: {_begins(streamed)} is not {_begins(plain)}"
    return Differences("", streams)


async def converse(protocol: Callable[..., Any], app: Any, data: bytes) -> bytes:
    """Send bytes down a connection whose last request says `Connection: close`; what comes back until it closes."""
    connection, transport = protocol(**_arguments(app)), Wire()
    connection.connection_made(transport)
    connection.data_received(data)
    await _until(lambda: transport.closed)
    connection.connection_lost(None)
    return bytes(transport.sent) if transport.closed else b"no answer"


async def _as_stream(fast: Fast, app: Any, data: bytes) -> bytes:
    """The reply that HTTP/1.1 would have, to the request as a stream."""
    connection, transport = Streams(fast, _arguments(app)), Wire()
    connection.connection_made(transport)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    method, path, _ = first.split(b" ")
    pairs = [line.partition(b": ") for line in lines]
    fields = {name.lower(): text for name, _, text in pairs} | {b":method": method, b":path": path}
    fields[b":authority"] = fields.pop(b"host")
    del fields[b"connection"]
    block = b"".join([http2.field(*one) for one in sorted(fields.items())])  # with those that begin with a colon first
    connection.data_received(http2.PREFACE + http2.settings() + http2.message(1, block, body))
    await _until(lambda: bool(_as_http1(bytes(transport.sent))))
    connection.connection_lost(None)
    return _as_http1(bytes(transport.sent)) or b"no answer"


def _as_http1(frames: bytes) -> bytes:
    """The one reply among frames; empty: it is not whole."""
    found: dict[int, bytes] = {}
    at = ended = 0
    while at < len(frames):
        upper, lower, kind, flags, stream = http2.FRAME_HEAD.unpack_from(frames, at)
        begin = at + http2.FRAME_HEAD.size
        at = begin + (upper << 8 | lower)
        if stream:
            found[kind] = found.get(kind, b"") + frames[begin:at]
            ended |= flags & http2.END_STREAM
    if not ended:
        return b""
    (_, status), *fields = http2.read_block(found[http2.HEADERS], 1 << 14)
    lines = [b"%b: %b\r\n" % one for one in [*fields, (b"connection", b"close")]]
    return b"".join([STATUS_LINE[int(status)], *lines, b"\r\n", found.get(http2.DATA, b"")])


def _arguments(app: Any) -> dict[str, Any]:
    """With which uvicorn makes a connection's protocol."""
    config = Config(lambda: app, factory=True, lifespan="off", log_config=None, log_level=None, access_log=False)
    config.load()
    return {"config": config, "server_state": ServerState(), "app_state": {}}


async def _until(is_so: Callable[[], bool]) -> None:
    end = asyncio.get_running_loop().time() + ANSWER_WITHIN_S
    while not is_so() and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.0005)


def _is_one(data: bytes) -> bool:
    """Whether it is a single request."""
    return data.count(b" HTTP/1.1\r\n") == 1


def _begins(reply: bytes) -> str:
    return repr(reply[:400])


def masked(reply: bytes) -> bytes:
    """A reply without what differs from one to the next on either lane."""
    for varies in _VARIES:
        reply = varies.sub(b"*", reply)
    return reply


def requests() -> dict[str, bytes]:
    """What is sent: good and bad requests of both routes, and two in a row."""
    row = {"id": "a", "amount": 2.5}
    rows = orjson.dumps({"rows": [row, {"id": "b", "amount": None}], "at": "2020-01-01T00:00:00Z"})
    tensor = {"name": "features", "shape": [2, 1], "datatype": "FP32"}
    infer = orjson.dumps({"id": "q", "inputs": [{**tensor, "data": [1.5, 2]}]})
    one = orjson.dumps({"inputs": [{**tensor, "shape": [1, 1], "data": [2.5]}]})
    head = orjson.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": 8}}],
            "outputs": [{"name": "p", "parameters": {"binary_data": True}}],
        }
    )
    raw = head + np.array([1.5, 2.0], dtype="<f4").tobytes()
    arrow = wire.write_stream(pa.table({"id": ["c"], "amount": [1.0]}))
    predict, v2 = f"/predict/{_MODEL}", f"/v2/models/{_MODEL}"
    return {
        "rows": post(predict, rows),
        "a row again": post(predict, rows),
        "rows of no such model": post("/predict/other", rows),
        "nothing": post(predict, b""),
        "rows that are no JSON": post(predict, b'{"rows": ['),
        "a wrong type": post(predict, orjson.dumps({"rows": [{"amount": "much"}]})),
        "a pinned version": post(predict, rows.replace(b'"a"', b'"d"'), "x-raymill-version: 2"),
        "an unknown version": post(predict, rows, "x-raymill-version: 9"),
        "Arrow": post(predict, arrow, f"content-type: {wire.ARROW_STREAM}"),
        "Arrow for JSON": post(predict, rows, f"accept: {wire.ARROW_STREAM}", "x-request-id: given-1"),
        "a tensor": post(f"{v2}/infer", infer),
        "a row": post(f"{v2}/infer", one),
        "a row of a form that is known by now": post(f"{v2}/infer", one.replace(b"2.5", b"-3e-1")),
        "a tensor for a version": post(f"{v2}/versions/2/infer", infer),
        "a binary tensor": post(f"{v2}/infer", raw, f"Inference-Header-Content-Length: {len(head)}"),
        "a lying size": post(f"{v2}/infer", raw[:-4], f"Inference-Header-Content-Length: {len(head)}"),
        "two in a row": post(predict, rows, last=False) + post(f"{v2}/infer", infer),
    }


def post(path: str, body: bytes, *headers: str, last: bool = True) -> bytes:
    """The bytes of a request."""
    lines = [f"POST {path} HTTP/1.1", "Host: selftest", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, *(["Connection: close"] if last else []), "", ""]).encode() + body


def spec() -> ModelSpec:
    """The model that is asked."""
    routes = (
        Route(version=1, digest="1", role=Role.LIVE, weight=1.0),
        Route(version=2, digest="2", role=Role.CANARY, weight=0.0),
    )
    columns = {"amount": ColumnForm("float64", True)}
    return ModelSpec(
        name=_MODEL, label="p", inputs=("amount",), routes=routes, plan=1, columns=columns, required=("amount",)
    )


def stand_ins() -> dict[str, Any]:
    """What stands for registry, sink, features and programs of a replica under test."""
    return {"records": _StandIn(), "sink": _StandIn(), "open_reader": lambda spec: _StandIn(), "load": _load}


class _StandIn:
    def program(self, digest: str) -> bytes:
        return digest.encode()

    def ship(self, segment: str, rows: pa.Table) -> None:
        """Nothing."""

    def vectors(self, rows: pa.Table, at: Any) -> Any:
        return rows.column("amount").cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(-1, 1)


def _load(program: bytes) -> Any:
    return lambda x: (np.nan_to_num(x[:, 0]) / 100 + int(program) / 10).astype(np.float32)


def as_serve_does(app: Any) -> Any:
    """Serve's own middleware around the application, where Serve is installed."""
    from ray.serve._private.http_util import RequestIdMiddleware

    return RequestIdMiddleware(app)
