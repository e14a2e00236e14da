"""What happens to those who come while no replica runs: who may wake the endpoint, and what they are told."""

import asyncio
import json
import time
from types import SimpleNamespace

import grpc
import pytest

from raymill.actors import grpc_service, held_calls, waiting_room
from raymill.actors.door import Door
from raymill.actors.waiting_room import LazyDoor, WaitingRoom
from raymill.cluster import environment
from raymill.cluster.ports import choose
from raymill.runtime.api_keys import ApiKey, KeyPolicy, Right, digest_of
from raymill.runtime.errors import Unavailable

ELSEWHERE = {"x-forwarded-for": "10.0.0.7"}
KEY = {"authorization": "Bearer rm_mine"}


class Book:
    away = False

    def keys_changed_since(self, stamp):
        if self.away:
            raise Unavailable("the records do not answer")
        return 1, [ApiKey(digest=digest_of("rm_mine"), tenant="acme", rights=(Right.PREDICT,), created_s=1.0)]


def door(policy=KeyPolicy.BEYOND, book=None):
    return LazyDoor(Door(policy, book or Book()))


def asked(path="/predict/taxi", headers=None, policy=KeyPolicy.BEYOND, book=None, answer=(200, "text/plain", b"mine")):
    """Status, headers and body for the caller, and how many requests have got to Serve."""
    woken, sent = [], []

    async def app(scope, receive, send):
        woken.append(scope["path"])
        status, kind, body = answer
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:2], "more_body": True})
        await send({"type": "http.response.body", "body": body[2:]})

    async def send(message):
        sent.append(message)

    raw = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw, "client": ("127.0.0.1", 9)}
    asyncio.run(WaitingRoom(app, door(policy, book))(scope, None, send))
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:]), len(woken)


@pytest.mark.parametrize(
    ("headers", "policy", "status"),
    [
        ({}, KeyPolicy.OFF, 200),
        ({}, KeyPolicy.BEYOND, 200),
        ({}, KeyPolicy.ALL, 401),
        (ELSEWHERE, KeyPolicy.OFF, 403),
        (ELSEWHERE, KeyPolicy.BEYOND, 401),
        (ELSEWHERE | {"authorization": "Bearer rm_wrong"}, KeyPolicy.BEYOND, 401),
        (ELSEWHERE | KEY, KeyPolicy.BEYOND, 200),
        (KEY, KeyPolicy.ALL, 200),
    ],
)
def test_only_who_may_ask_wakes_the_endpoint(headers, policy, status):
    found, _, body, woken = asked(headers=headers, policy=policy)
    assert (found, woken) == (status, int(status == 200))
    assert body == b"mine" if woken else json.loads(body)["code"]
    assert asked("/raymill/status", KEY, KeyPolicy.ALL)[::3] == (403, 0)  # another right


def test_who_needs_no_key_to_hear_that_the_endpoint_lives_hears_it_and_wakes_nobody():
    for path in ("/healthz", "/v2/health/live"):
        assert asked(path, ELSEWHERE)[::3] == (200, 0)
        assert asked(path, ELSEWHERE | KEY)[::3] == (200, 1)
    assert asked("/v2/health/ready", ELSEWHERE)[::3] == (401, 0)
    status, headers, body, woken = asked("/docs", ELSEWHERE)  # the page is for anybody, too
    assert (status, headers["content-type"], woken) == (200, "text/html; charset=utf-8", 0) and b"<html" in body
    assert asked("/-/healthz", ELSEWHERE)[::3] == (200, 1)  # Serve's own, which wakes nobody


def test_while_keys_can_not_be_looked_up_nobody_is_let_in_and_nobody_is_later():
    book = Book()
    book.away = True
    assert asked(headers=KEY, policy=KeyPolicy.ALL, book=book)[::3] == (503, 0)
    book.away = False
    assert asked(headers=KEY, policy=KeyPolicy.ALL, book=book)[::3] == (200, 1)


@pytest.mark.parametrize(("status", "code"), [(408, "unavailable"), (429, "overloaded"), (503, "unavailable")])
def test_what_serve_tells_in_plain_text_is_told_in_our_form(status, code):
    found, headers, body, _ = asked(answer=(status, "text/plain", b"Request timed out"))
    assert found == status and headers["content-type"] == "application/json" and int(headers["retry-after"]) > 0
    told = json.loads(body)
    assert told["code"] == code and told["error"] and told["remedy"] and int(headers["content-length"]) == len(body)
    replicas = (status, "application/json", b'{"error": "mine"}')
    assert asked(answer=replicas)[::2] == (status, replicas[2])
    assert asked(answer=(404, "text/plain", b"not here"))[::2] == (404, b"not here")


@pytest.mark.parametrize(
    ("timeout", "held_for", "status", "code"),
    [
        ("0.5", [b"0.5"], 504, "expired"),
        ("0", [b"0.001"], 504, "expired"),  # 0 is for ever to Serve
        ("90", [b"7"], 408, "unavailable"),  # longer than anybody is held: as without
        ("soon", [b"7"], 408, "unavailable"),  # the replica says what is wrong with it
    ],
)
def test_nobody_is_held_for_longer_than_the_timeout_of_the_request(monkeypatch, timeout, held_for, status, code):
    monkeypatch.setenv(waiting_room.HELD_VARIABLE, "60")
    seen, sent = [], []

    async def serve(scope, receive, send):
        seen.extend(v for k, v in scope["headers"] if k == b"x-request-timeout-seconds")
        await send({"type": "http.response.start", "status": 408, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"Request timed out"})

    async def send(message):
        sent.append(message)

    headers = [(b"timeout", timeout.encode()), (b"x-request-timeout-seconds", b"7")]
    scope = {"type": "http", "method": "POST", "path": "/predict/taxi", "headers": headers, "client": ("127.0.0.1", 9)}
    asyncio.run(WaitingRoom(serve, door())(scope, None, send))
    assert (seen, sent[0]["status"], json.loads(sent[1]["body"])["code"]) == (held_for, status, code)


class Pair:
    """A server where calls wait, before one that is told of its replica a little later."""

    def __init__(self, unknown_for=3, woken=200, policy=KeyPolicy.BEYOND, held_s=5.0):
        self.unknown_for, self.woken, self.policy, self.held_s = unknown_for, woken, policy, held_s
        self.wakings, self.passed = [], []

    async def __aenter__(self):
        self._http = await asyncio.start_server(self._wake, "127.0.0.1", 0)
        self._behind, self._before = grpc.aio.server(), grpc.aio.server()
        behind = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._answer),
            "ServerReady": grpc.unary_unary_rpc_method_handler(self._answer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        self._behind.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(grpc_service.SERVICE, behind),))
        ports = {
            "http_port": self._http.sockets[0].getsockname()[1],
            "grpc_port": self._behind.add_insecure_port("127.0.0.1:0"),
        }
        self.held = held_calls.HeldCalls(door(self.policy), grpc_service._abort, held_s=self.held_s, **ports)
        methods = grpc_service._Methods(grpc_service.NoAccounts(), self.held)
        self._before.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(grpc_service.SERVICE, methods.handlers()),)
        )
        port = self._before.add_insecure_port("127.0.0.1:0")
        await self._behind.start()
        await self._before.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        return self

    async def __aexit__(self, *_):
        await self.channel.close()
        await self._before.stop(0)
        await self._behind.stop(0)
        self._http.close()

    async def _wake(self, reader, writer):
        self.wakings.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        await asyncio.sleep(0.1)
        body = b'{"error": "e", "code": "c", "remedy": "r"}'
        again = b"retry-after: %d\r\n" % waiting_room.RETRY_AFTER_S if self.woken >= 400 else b""
        writer.write(b"HTTP/1.1 %d X\r\n%bcontent-length: %d\r\n\r\n%b" % (self.woken, again, len(body), body))
        await writer.drain()
        writer.close()

    async def _answer(self, message, context):
        self.passed.append(dict(context.invocation_metadata()))
        self.unknown_for -= 1
        if self.unknown_for >= 0:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "nobody here")
        if message == b"refuse":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a replica says no")
        return message[::-1]

    async def _stream(self, messages, context):
        async for message in messages:
            yield message[::-1]

    def infer(self, message=b"abc", metadata=(), timeout=20):
        return self.channel.unary_unary(f"/{grpc_service.SERVICE}/ModelInfer")(
            message, metadata=metadata, timeout=timeout
        )


def run(pair, use):
    async def inner():
        async with pair as opened:
            return await use(opened)

    return asyncio.run(inner())


@pytest.fixture(autouse=True)
def no_replica_here(monkeypatch):
    monkeypatch.setattr(grpc_service, "_here", [])


async def left(pair):
    """How many calls still wait: one that is refused is counted until just after its caller has heard."""
    for _ in range(100):
        if pair.held.waiting:
            await asyncio.sleep(0.02)
    return pair.held.waiting


async def code_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details()


def test_calls_wait_until_a_replica_answers_and_one_of_them_wakes_it():
    async def use(pair):
        metadata = tuple((KEY | ELSEWHERE | {"traceparent": "t"}).items())
        calls = [pair.infer(b"%d!" % n, metadata) for n in range(20)]
        assert await asyncio.gather(*calls) == [(b"%d!" % n)[::-1] for n in range(20)]
        assert len(pair.wakings) == 1 and await left(pair) == 0
        assert "authorization: bearer rm_mine" in pair.wakings[0] and "x-forwarded-for: 10.0.0.7" in pair.wakings[0]
        for passed in pair.passed:  # so the replica's door sees who asks
            assert passed["authorization"] == "Bearer rm_mine" and passed["x-forwarded-for"] == "10.0.0.7"
            assert passed["traceparent"] == "t" and held_calls.PASSED in passed

    run(Pair(unknown_for=30), use)


def test_a_stream_waits_too():
    async def use(pair):
        call = pair.channel.stream_stream(f"/{grpc_service.SERVICE}/ModelStreamInfer")(iter([b"ab", b"cd"]), timeout=20)
        assert [answer async for answer in call] == [b"ba", b"dc"]

    run(Pair(), use)


def test_a_call_without_a_key_wakes_nobody_over_grpc():
    async def use(pair):
        assert (await code_of(pair.infer(metadata=tuple(ELSEWHERE.items()))))[0] == "UNAUTHENTICATED"
        assert (await code_of(pair.infer(metadata=((held_calls.PASSED, "1"),))))[0] == "UNAVAILABLE"
        assert pair.wakings == [] and pair.passed == [] and await left(pair) == 0

    run(Pair(), use)


def test_what_a_replica_says_no_to_and_what_can_not_be_woken_is_told():
    async def use(pair):
        return await code_of(pair.infer(b"refuse")), await left(pair)

    assert run(Pair(unknown_for=0), use) == (("INVALID_ARGUMENT", "a replica says no"), 0)
    assert run(Pair(woken=429), use) == (("RESOURCE_EXHAUSTED", "e (r)"), 0)
    assert run(Pair(woken=408), use) == (("UNAVAILABLE", "e (r)"), 0)


def test_nobody_waits_longer_than_is_held_nor_than_the_deadline():
    async def use(pair):
        begun = time.monotonic()
        code, _ = await code_of(pair.infer(timeout=20))
        return code, time.monotonic() - begun < 3, await left(pair)

    assert run(Pair(unknown_for=10**6, held_s=1.0), use) == ("UNAVAILABLE", True, 0)


def test_the_proxy_is_told_by_the_variables_that_up_sets(monkeypatch):
    told = environment.serve_environment(choose("auto"))
    for name in (waiting_room.GRPC_VARIABLE, waiting_room.HTTP_VARIABLE, waiting_room.HELD_VARIABLE):
        monkeypatch.setenv(name, told[name])
    owner = type("gRPCProxy", (), {"factory": lambda self: None})()
    assert grpc_service._held_calls(SimpleNamespace(service_handler_factory=owner.factory)) is not None
    owner = type("Replica", (), {"factory": lambda self: None, "_metrics_manager": None})()
    assert grpc_service._held_calls(SimpleNamespace(service_handler_factory=owner.factory)) is None
    assert grpc_service._held_calls(None) is None
    module, function = environment.WAITING_ROOM.split(":")
    assert module == waiting_room.__name__ and callable(getattr(waiting_room, function))
