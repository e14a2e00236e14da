"""Open-loop load: requests leave at a constant rate whatever the answers do, each answer is held against its own row.

`OpenLoop` runs it as a process of its own beside a benchmark (`python -m benchmarks.open_loop FOLDER`, which ends with
its stdin). Latency counts from the moment at which a request was due, so a server that stalls is charged for all who
had to wait. Invariants: a request has an id of its own and is sent once, never again; its answer counts only if it
echoes that id and holds what the version that it names gives for that request's inputs, else it has failed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import orjson

ANSWER_WITHIN_S = 60.0
"""A request without an answer for so long has failed."""
_WAKE_S = 0.0005
_TOLERANCE = 1e-5
_OK = ""


@dataclass(frozen=True)
class Sent:
    """What became of requests, in the order in which they were due."""

    due_s: npt.NDArray[np.float64]
    """When each was due, on the clock of `time.monotonic`."""
    latency_s: npt.NDArray[np.float64]
    """From then to its last byte; NaN: it failed."""
    version: npt.NDArray[np.int64]
    """Which version answered; 0: none."""
    failure: npt.NDArray[np.str_]
    """Why it failed; empty: it did not."""

    def __len__(self) -> int:
        return len(self.due_s)

    def between(self, begin_s: float, end_s: float) -> Sent:
        """Those due in [begin_s, end_s)."""
        a, b = np.searchsorted(self.due_s, [begin_s, end_s])
        return Sent(self.due_s[a:b], self.latency_s[a:b], self.version[a:b], self.failure[a:b])

    @property
    def failures(self) -> Counter[str]:
        """Reason → how many failed by it."""
        return Counter(self.failure[self.failure != _OK].tolist())

    def quantile_s(self, q: float) -> float:
        """A quantile of the latency of those that were answered."""
        return float(np.nanquantile(self.latency_s, q)) if np.isfinite(self.latency_s).any() else float("nan")


class OpenLoop:
    """The load on one model, in a process of its own; `stop` ends it and tells what became of every request."""

    def __init__(
        self,
        url: str,
        model: str,
        x: npt.NDArray[np.float32],
        expected: dict[int, npt.NDArray[np.float32]],
        rate: float,
    ) -> None:
        """Args: the endpoint; its model; the inputs [rows, n], sent in turn; version → its answers; requests a second.

        Raises:
            ValueError: two rows have the same answer, so that one caller's could pass for the other's.
        """
        answers = np.concatenate(list(expected.values()))
        if np.diff(np.sort(answers)).min(initial=1.0) < 2 * _TOLERANCE:
            raise ValueError("two rows or versions have the same answer: choose inputs that tell them apart")
        self._place = {"url": url, "model": model, "rate": rate}
        self._x, self._expected = x, expected
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()

    def start(self, folder: Path) -> None:
        """Begin to send; the process keeps its files in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        (folder / "place.json").write_text(json.dumps(self._place))
        np.savez(folder / "rows.npz", x=self._x, **{str(v): p for v, p in self._expected.items()})
        command = [sys.executable, "-m", "benchmarks.open_loop", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[1])

    def stop(self) -> Sent:
        """Send no more, wait for the answers under way; what became of all."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait(ANSWER_WITHIN_S + 30):
            raise RuntimeError(f"the load ended with {self._process.returncode}")
        with np.load(self._folder / "sent.npz") as found:
            return Sent(*(found[name] for name in ("due_s", "latency_s", "version", "failure")))


class Connection(asyncio.Protocol):
    """A kept HTTP/1.1 connection; answers come in the order of the requests."""

    def __init__(self, on_idle: Callable[[Connection], None], on_end: Callable[[Connection], None]) -> None:
        self._on_idle, self._on_end = on_idle, on_end
        self._waiting: deque[Callable[[int, bytes], None]] = deque()
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self.closes = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, request: bytes, done: Callable[[int, bytes], None]) -> None:
        """`done` gets status and body; status 0: the connection ended before the answer was whole."""
        assert self._transport is not None
        self._waiting.append(done)
        self._transport.write(request)

    def abort(self) -> None:
        """Leave, whatever is under way."""
        assert self._transport is not None
        self._waiting.clear()
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        while self._waiting and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            if len(self._buffer) < end + 4 + length:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + length], self._buffer[end + 4 + length :]
            self.closes = self.closes or b"connection: close" in head
            self._waiting.popleft()(int(head[9:12]), body)
            if not self._waiting and not self.closes:
                self._on_idle(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closes = True
        self._on_end(self)
        while self._waiting:
            self._waiting.popleft()(0, b"")


class Requests:
    """The requests of one load as bytes, and what their answers must say."""

    def __init__(self, host: str, model: str, x: npt.NDArray[np.float32], expected: dict[int, Any]) -> None:
        self._head = (
            f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        ).encode()
        self._bodies = [
            orjson.dumps({"inputs": [{"name": "features", "shape": [1, x.shape[1]], "datatype": "FP32", "data": row}]})
            for row in x.astype(float).tolist()
        ]
        self._expected = {v: p.tolist() for v, p in expected.items()}

    def data(self, n: int, prefix: str = "r") -> bytes:
        """Request `n`."""
        body = b'{"id":"%s%d",' % (prefix.encode(), n) + self._bodies[n % len(self._bodies)][1:]
        return self._head + b"Content-Length: %d\r\n\r\n" % len(body) + body

    def judge(self, n: int, status: int, body: bytes, prefix: str = "r") -> tuple[int, str]:
        """The version that answered request `n`, and what is wrong with the answer; empty: nothing."""
        if status != 200:
            return 0, f"{status} {body[:200].decode(errors='replace')}" if status else "the connection ended"
        document = orjson.loads(body)
        version, value = int(document["model_version"]), document["outputs"][0]["data"]
        if document.get("id") != f"{prefix}{n}":
            return version, "the answer of another request"
        right = self._expected.get(version)
        if right is None or len(value) != 1 or abs(value[0] - right[n % len(right)]) > _TOLERANCE:
            return version, "a wrong value"
        return version, _OK


class Load:
    """The sending side; one event loop."""

    def __init__(self, url: str, requests: Requests, rate: float) -> None:
        parsed = httpx.URL(url)
        self._host, self._port = parsed.host, parsed.port or 80
        self._requests, self._rate = requests, rate
        self._idle: deque[Connection] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._due: list[float] = []
        self._found: dict[int, tuple[float, int, str]] = {}

    async def run(self, ends: asyncio.Event) -> Sent:
        """Send until `ends` is set, then wait for what is under way."""
        begun = time.monotonic()
        while not ends.is_set():
            while (due := begun + len(self._due) / self._rate) <= time.monotonic():
                self._due.append(due)
                self._send(len(self._due) - 1)
            await asyncio.sleep(_WAKE_S)
        last = time.monotonic() + ANSWER_WITHIN_S
        while len(self._found) < len(self._due) and time.monotonic() < last:
            await asyncio.sleep(0.01)
        lost = (float("nan"), 0, "no answer")
        found = [self._found.get(n, lost) for n in range(len(self._due))]
        latency, versions, failures = zip(*found, strict=True) if found else ((), (), ())
        return Sent(
            np.array(self._due), np.array(latency, float), np.array(versions, np.int64), np.array(failures, np.str_)
        )

    def _send(self, n: int) -> None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closes:
                connection.send(self._requests.data(n), lambda *answer: self._note(n, *answer))
                return
        task = asyncio.get_running_loop().create_task(self._open(n))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self, n: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(self._idle.append, lambda _: None), self._host, self._port
            )
        except OSError as err:
            self._found[n] = (float("nan"), 0, f"no connection: {err}")
            return
        connection.send(self._requests.data(n), lambda *answer: self._note(n, *answer))

    def _note(self, n: int, status: int, body: bytes) -> None:
        version, failure = self._requests.judge(n, status, body)
        latency = time.monotonic() - self._due[n] if failure == _OK else float("nan")
        self._found[n] = (latency, version, failure)


async def _main(folder: Path) -> None:
    place = json.loads((folder / "place.json").read_text())
    with np.load(folder / "rows.npz") as rows:
        x, expected = rows["x"], {int(v): rows[v] for v in rows.files if v != "x"}
    requests = Requests(httpx.URL(place["url"]).host, place["model"], x, expected)
    ends = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ends.set)
    sent = await Load(place["url"], requests, place["rate"]).run(ends)
    np.savez(
        folder / "sent.npz",
        due_s=sent.due_s,
        latency_s=sent.latency_s,
        version=sent.version,
        failure=sent.failure,
    )


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
