"""Requests that no client should send, at a real server on loopback with the fast lane open.

Each is answered with 200 (a mutation may leave a request sound), with 4xx and a reason, or the connection is closed;
never with a 5xx, never with silence. Meanwhile neighbours send sound requests and check each answer.
"""

import asyncio
import random
import re
from contextlib import asynccontextmanager
from functools import partial

import orjson
import pytest
import uvicorn

from raymill.actors import fastlane, wire
from raymill.actors.fast_server import NoAccounts
from raymill.actors.fastlane import FastLane
from raymill.actors.rollout import to_user_config
from raymill.actors.selftest import requests as sound_requests
from raymill.actors.selftest import spec, stand_ins
from raymill.actors.serving import ServingReplica

SILENCE_S = 20.0
AT_ONCE = 24
SOUND = list(sound_requests().values())
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r]*\r\n(.*?)\r\n\r\n", re.DOTALL)
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def mutated(chance: random.Random) -> tuple[str, list[bytes]]:
    """A kind of malformed request, and the pieces in which it is sent."""
    data = bytearray(chance.choice(SOUND))
    end = data.index(b"\r\n\r\n") + 4
    kind = chance.choice(list(KINDS))
    data = bytearray(KINDS[kind](chance, data, end))
    pieces = [bytes(data)]
    if chance.random() < 0.3 and len(data) > 2:
        cut = chance.randrange(1, len(data))
        pieces = [bytes(data[:cut]), bytes(data[cut:])]
    return kind, pieces


def _flipped(chance, data, end):
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return data


def _flipped_body(chance, data, end):
    for _ in range(chance.randint(1, 4)):
        if len(data) > end:
            data[chance.randrange(end, len(data))] = chance.randrange(256)
    return data


def _truncated(chance, data, end):
    return data[: chance.randrange(1, len(data))]


def _lying_length(chance, data, end):
    said = chance.choice(
        [b"0", b"1", b"99999999999", b"-1", b"1e3", b"0x10", b"", b" 5", b"5, 5", b"18446744073709551617"]
    )
    return re.sub(rb"Content-Length: \d+", b"Content-Length: " + said, bytes(data))


def _two_lengths(chance, data, end):
    return bytes(data).replace(b"Content-Length", b"Content-Length: 3\r\nContent-Length", 1)


def _smuggled(chance, data, end):
    return bytes(data).replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nContent-Length", 1)


def _chunked(chance, data, end):
    body = bytes(data[end:])
    head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", bytes(data[:end]))
    cut = chance.randrange(len(body) + 1)
    sizes = [(cut, body[:cut]), (len(body) - cut, body[cut:])]
    lie = chance.choice([0, 0, 1, -1, 1 << 40])
    chunks = b"".join(b"%x\r\n%b\r\n" % (max(0, size + lie), part) for size, part in sizes if size)
    return head + chunks + chance.choice([b"0\r\n\r\n", b"0\r\n", b"", b"zz\r\n\r\n"])


def _long_header(chance, data, end):
    return bytes(data).replace(
        b"Host:", b"X-Long: " + b"a" * chance.choice([10_000, 70_000, 200_000]) + b"\r\nHost:", 1
    )


def _many_headers(chance, data, end):
    return bytes(data).replace(b"Host:", b"".join(b"X-%d: y\r\n" % i for i in range(3000)) + b"Host:", 1)


def _strange_header(chance, data, end):
    line = chance.choice(
        [b"Expect: 100-continue", b"Upgrade: websocket", b"Upgrade: h2c", b"Content-Encoding: gzip", b"X\x00Y: z",
         b": y",
         b"no colon", b"Inference-Header-Content-Length: 4294967296", b"Inference-Header-Content-Length: -4",
         b"x-raymill-version: 1e9", b"timeout: NaN", b"Connection: upgrade", b"Host: a\r\nHost: b", b"X:\x80\xff"]
    )  # fmt: skip
    return bytes(data).replace(b"Host:", line + b"\r\nHost:", 1)


def _strange_line(chance, data, end):
    line = chance.choice(
        [b"GET", b"POST", b"POST  /predict/selftest HTTP/1.1", b"POST /predict/selftest HTTP/9.9", b"PRI * HTTP/2.0",
         b"POST /predict/%ff%00/x HTTP/1.1", b"POST /predict/../v2 HTTP/1.1", b"post /predict/selftest HTTP/1.1",
         b"POST http://other/predict/selftest HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"\x16\x03\x01\x02\x00", b"",
         b"POST /" + b"a" * 20_000 + b" HTTP/1.1", b"DELETE /v2/models/selftest/infer HTTP/1.1"]
    )  # fmt: skip
    return line + bytes(data)[data.index(b"\r\n") :]


def _wrong_tensor(chance, data, end):
    tensor = {"name": "features", "shape": [2, 1], "datatype": "FP32", "data": [1.5, 2.0]}
    field = chance.choice(["name", "shape", "datatype", "data", "parameters"])
    tensor[field] = chance.choice(
        [None, 7, "x", [], [2], [2, 1, 1], [-1, 1], [10**18, 1], [True, 1], ["1", "2"], [[1], 2], [1e400],
         {"binary_data_size": 8},
         {"binary_data_size": -8}, "FP64", "BYTES", 1e308, [None, 1.0]]
    )  # fmt: skip
    return _posted(b"/v2/models/selftest/infer", orjson.dumps({"inputs": [tensor] * chance.choice([0, 1, 1, 1, 2])}))


def _wrong_rows(chance, data, end):
    rows = chance.choice(
        [None, 7, [], [[]], [None], [{}], [{"amount": {}}], [{"amount": 1e308, "id": ""}], [{"amount": 1,
         "id": "a" * 999}],
         [{"amount": 1, "no": 2}], [{"amount": True}], {"amount": 1}, [{"amount": 1, "at": "soon"}],
          [{"amount": 1}] * 9000]
    )  # fmt: skip
    document = {"rows": rows, "at": chance.choice(["2020-01-01T00:00:00Z", "never", -1, 1 << 62, None, [1]])}
    return _posted(b"/predict/selftest", orjson.dumps(document))


def _damaged_arrow(chance, data, end):
    body = bytearray(chance.choice(ARROW))
    for _ in range(chance.randint(1, 6)):
        body[chance.randrange(len(body))] = chance.randrange(256)
    return _posted(b"/predict/selftest", bytes(body[: chance.randint(1, len(body))]), wire.ARROW_STREAM.encode())


def _pipelined(chance, data, end):
    def kept(one):
        return one.replace(b"Connection: close\r\n", b"")

    several = [kept(chance.choice(SOUND)) for _ in range(chance.randint(1, 90))]
    return b"".join(several) + bytes(_flipped(chance, data, end))


def _noise(chance, data, end):
    return chance.randbytes(chance.randint(1, 3000)) + chance.choice([b"", b"\r\n\r\n"])


def _posted(path, body, kind=b"application/json"):
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Type: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    return head % (path, kind, len(body)) + body


ARROW = [r[r.index(b"\r\n\r\n") + 4 :] for r in SOUND if wire.ARROW_STREAM.encode() in r and b"{" not in r[-40:]]
KINDS = {
    f.__name__.strip("_"): f
    for f in (
        _flipped, _flipped_body, _truncated, _lying_length, _two_lengths, _smuggled, _chunked, _long_header,
        _many_headers,
        _strange_header, _strange_line, _wrong_tensor, _wrong_rows, _damaged_arrow, _pipelined, _noise,
    )
}  # fmt: skip


def replies(data: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each whole reply."""
    found, at = [], 0
    while match := _STATUS.match(data, at):
        length = _LENGTH.search(match[2])
        end = match.end() + (int(length[1]) if length else 0)
        found.append((int(match[1]), data[match.end() : end]))
        at = end
    return found


async def send(port: int, pieces: list[bytes]) -> bytes:
    """What comes back until the server closes; the sender ends its half, as a client that has said all does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.write_eof()
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


class Neighbour:
    """Sends sound requests over one connection for as long as the others misbehave."""

    def __init__(self, number):
        self.number, self.answered, self.ends = number, 0, False

    async def run(self, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while not self.ends:
            value = self.number + self.answered % 7
            body = orjson.dumps({"rows": [{"id": f"n{self.number}-{self.answered}", "amount": value}]})
            writer.write(_posted(b"/predict/selftest", body).replace(b"Connection: close\r\n", b""))
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SILENCE_S)
            answer = orjson.loads(await reader.readexactly(int(_LENGTH.search(head)[1])))["predictions"][0]
            assert answer["id"] == f"n{self.number}-{self.answered}"
            assert answer["p"] == pytest.approx(0.1 + value / 100, abs=1e-6)
            self.answered += 1
            await asyncio.sleep(0)
        writer.close()


@asynccontextmanager
async def endpoint(home):
    """A replica behind a real server; the replica and the port."""
    replica = ServingReplica(home, **stand_ins())
    replica.fast._accounts_of = lambda app: NoAccounts()
    replica.start()
    await replica.reconfigure(to_user_config([spec()]))
    app = replica.__serve_build_asgi_app__()
    server = uvicorn.Server(
        uvicorn.Config(app, http=partial(FastLane, replica.fast), lifespan="off", log_config=None, port=0)
    )
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        yield replica, server.servers[0].sockets[0].getsockname()[1]
        assert not replica.fast.reason and replica.fast.requests
    finally:
        server.should_exit = True
        await serving
        replica.stop()


async def besiege(home, count, seed):
    """Send so many malformed requests; what was wrong with the answers, and how many sound ones were answered."""
    async with endpoint(home) as (_, port):
        return await _besiege(port, count, seed)


async def _besiege(port, count, seed):
    neighbours = [Neighbour(10 * i) for i in range(2)]
    watching = [asyncio.create_task(n.run(port)) for n in neighbours]
    wrong, kinds, gate, chance = [], {}, asyncio.Semaphore(AT_ONCE), random.Random(seed)

    async def one(kind, pieces):
        async with gate:
            try:
                answers = replies(await asyncio.wait_for(send(port, pieces), SILENCE_S))
            except TimeoutError:
                wrong.append((kind, "silence", pieces))
                return
        for status, body in answers:
            reason = status == 200 or status == 100 or b"error" in body or body.startswith(b"Invalid HTTP")
            if not (200 <= status < 500 or status == 100) or not reason:
                wrong.append((kind, status, body[:200], pieces))
        kinds.setdefault(kind, set()).update(status for status, _ in answers)

    await asyncio.gather(*(one(*mutated(chance)) for _ in range(count)))
    for neighbour in neighbours:
        neighbour.ends = True
    await asyncio.gather(*watching)
    return wrong, kinds, sum(n.answered for n in neighbours)


def check(home, count, seed):
    wrong, kinds, answered = asyncio.run(besiege(home, count, seed))
    assert not wrong, wrong[:3]
    assert kinds.keys() == KINDS.keys() and {s for found in kinds.values() for s in found} >= {200, 400, 404, 413}
    assert answered > count // 100


def test_malformed_requests_are_refused_or_closed_and_neighbours_get_their_own_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(fastlane, "PATIENCE_S", 1.0)
    check(tmp_path, 800, 1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_malformed_requests_do_no_harm(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(fastlane, "PATIENCE_S", 1.0)
    check(tmp_path, 10_000, seed)


def test_a_slow_sender_is_let_go_and_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(fastlane, "PATIENCE_S", 0.3)

    async def drip(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for byte in SOUND[0][:-1]:
                writer.write(bytes([byte]))
                await writer.drain()
                if reader.at_eof():
                    break
                await asyncio.sleep(0.01)
            return await asyncio.wait_for(reader.read(), SILENCE_S)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def whole():
        async with endpoint(tmp_path) as (_, port):
            neighbour = Neighbour(1)
            watching = asyncio.create_task(neighbour.run(port))
            slow = await asyncio.gather(*(drip(port) for _ in range(20)))
            neighbour.ends = True
            await watching
            return slow, neighbour.answered

    slow, answered = asyncio.run(whole())
    assert all(not s or s.startswith(b"HTTP/1.1 408") for s in slow) and answered > 10
