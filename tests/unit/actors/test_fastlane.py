"""The fast lane beside uvicorn's own: the same bytes, the same answers, in order; what is odd is left to uvicorn."""

import asyncio
import gc
from contextlib import asynccontextmanager
from functools import partial

import orjson
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from raymill.actors import fast_server, fastlane, http2, http_head, proxy_sockets, selftest, stream_replies
from raymill.actors.answering import HttpCall
from raymill.actors.asgi import Reply
from raymill.actors.fast_server import Fast
from raymill.actors.fastlane import FastLane
from raymill.actors.lane import Ticket
from raymill.actors.proxy_sockets import ProxySockets
from raymill.actors.proxy_streams import Streams
from raymill.actors.rollout import to_user_config
from raymill.actors.selftest import converse, masked, post
from raymill.actors.serving import ServingReplica
from tests.unit.actors.serving_parts import ListSink, model, replica

LIVE = model((1, "live", 1.0))
ROW = {"trip": 7, "zone": "a", "miles": 5.0}


def rows(*names, **more):
    return orjson.dumps({"rows": [{**ROW, "id": n} for n in names], "at": "2013-05-01T09:15:00Z", **more})


class Slow:
    """Answers when told to, each with the model's name that it was asked for."""

    def __init__(self):
        self.waiting = []

    def submit(self, call, done):
        self.waiting.append((call, done))

    def answer(self, place):
        call, done = self.waiting[place]
        done(Reply(200, call.model.encode()))


class Books:
    """How many are under way, and the statuses of those that are not."""

    def __init__(self):
        self.under_way, self.statuses = 0, []

    def begin(self):
        self.under_way += 1

    def end(self, status, seconds, request_id, path):
        self.under_way -= 1
        self.statuses.append(status)


async def echo(scope, receive, send):
    """An application that says which path it got."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": scope["path"][:5].encode().ljust(5)})


def connection(service, books=None):
    """A connection in memory; must be called inside a loop."""
    config = uvicorn.Config(lambda: echo, factory=True, lifespan="off", log_config=None)
    config.load()
    fast = Fast(service, lambda app: books or Books())
    found = FastLane(fast, config=config, server_state=uvicorn.server.ServerState(), app_state={})
    wire = selftest.Wire()
    found.connection_made(wire)
    return found, wire, fast


def bodies(sent):
    """Bodies of the replies sent so far."""
    found, rest = [], bytes(sent)
    while rest:
        head, _, rest = rest.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        found.append(rest[:length])
        rest = rest[length:]
    return found


def on_loop(test):
    asyncio.run(test())


def test_self_test_finds_no_difference():
    async def test():
        found = await selftest.differences(lambda home: ServingReplica(home, **selftest.stand_ins()))
        assert found == selftest.Differences("", "")

    on_loop(test)


def test_self_test_tells_what_differs():
    class Broken(ServingReplica):
        def submit(self, call, done):
            return super().submit(call, lambda reply: done(Reply(reply.status, reply.body + self.tail())))

        def tail(self):
            self.calls = getattr(self, "calls", 0) + 1
            return b" " * (self.calls % 2)

    async def test():
        found = await selftest.differences(lambda home: Broken(home, **selftest.stand_ins()))
        assert found.lane.startswith("rows: ") and "is not" in found.lane and found.streams

    on_loop(test)


def test_self_test_tells_of_streams_alone_where_those_differ(monkeypatch):
    send = stream_replies.Replies.send

    async def found():
        return await selftest.differences(lambda home: ServingReplica(home, **selftest.stand_ins()))

    for broken, told in (
        (lambda self, stream, block, body, trailers=b"": send(self, stream, block, body + b" ", trailers), "is not"),
        (lambda self, *_: None, "no answer"),
    ):
        monkeypatch.setattr(stream_replies.Replies, "send", broken)
        monkeypatch.setattr(selftest, "ANSWER_WITHIN_S", 0.2)
        lane, streams = asyncio.run(found())
        assert lane == "" and streams.startswith("rows: ") and told in streams


def test_http2_is_for_the_proxy_and_where_streams_are_taken():
    class Told(selftest.Wire):
        def __init__(self, peer="127.0.0.1"):
            super().__init__()
            self.peer, self.protocol = peer, None

        def get_extra_info(self, name, default=None):
            return (self.peer, 1) if name == "peername" else super().get_extra_info(name, default)

        def set_protocol(self, protocol):
            self.protocol = protocol

    async def test():
        _, _, fast = connection(Slow())
        begins = http2.PREFACE + http2.settings()

        def begun(wire, before=b""):
            made = FastLane(fast, **fast.arguments)
            made.connection_made(wire)
            for data in (before, begins):
                made.data_received(data)
            return bytes(wire.sent)

        assert begun(Told()).startswith(b"HTTP/1.1 400 ")
        fast.as_streams = partial(Streams, fast)
        assert begun(Told("192.0.2.9")).startswith(b"HTTP/1.1 400 ")
        after = Told()
        begun(after, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        assert after.protocol is None
        wire = Told()
        assert begun(wire)[3] == http2.SETTINGS and type(wire.protocol) is Streams
        assert wire.protocol in fast.arguments["server_state"].connections
        wire.protocol.connection_lost(None)
        assert wire.protocol not in fast.arguments["server_state"].connections

    on_loop(test)


def test_replies_leave_in_the_order_of_the_requests():
    async def test():
        books, service = Books(), Slow()
        protocol, wire, _ = connection(service, books)
        protocol.data_received(b"".join(post(f"/predict/m{n}", b"x", last=False) for n in range(3)))
        service.answer(2)
        service.answer(1)
        assert wire.sent == b""
        service.answer(0)
        assert bodies(wire.sent) == [b"m0", b"m1", b"m2"]
        assert (books.under_way, books.statuses) == (0, [200, 200, 200])

    on_loop(test)


def test_a_request_for_uvicorn_waits_for_the_replies_before_it():
    async def test():
        service = Slow()
        protocol, wire, _ = connection(service)
        between = b"GET /else HTTP/1.1\r\nHost: h\r\n\r\n"
        protocol.data_received(post("/predict/m0", b"x", last=False) + between + post("/predict/m1", b"x", last=False))
        await asyncio.sleep(0.01)
        assert wire.sent == b""
        service.answer(0)
        await asyncio.sleep(0.01)
        assert bodies(wire.sent)[:2] == [b"m0", b"/else"]
        # What came in one read behind a request of uvicorn's stays with uvicorn.
        assert bodies(wire.sent)[2:] == [b"/pred"]
        protocol.data_received(post("/predict/m2", b"x", last=False))
        service.answer(1)
        assert bodies(wire.sent)[3:] == [b"m2"]

    on_loop(test)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_where_the_bytes_are_cut_makes_no_difference(cuts):
    data = b"".join(post(f"/predict/m{n}", b"y" * 9 * n, last=False) for n in range(3))

    async def test():
        service = Slow()
        protocol, wire, _ = connection(service)
        at = 0
        for cut in [*cuts, len(data)]:
            protocol.data_received(data[at : at + cut]) if data[at : at + cut] else None
            at += cut
        assert [(c.model, len(c.body)) for c, _ in service.waiting] == [(f"m{n}", 9 * n) for n in range(3)]
        for place in range(3):
            service.answer(place)
        assert bodies(wire.sent) == [b"m0", b"m1", b"m2"]
        protocol.connection_lost(None)

    on_loop(test)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /predict/m HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /predict/m HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n",
        b"POST /predict/m HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Encoding: gzip\r\n\r\n",
        b"POST /predict/m HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n\r\n",
        b"POST /predict/m HTTP/1.0\r\nHost: h\r\nContent-Length: 3\r\n\r\n",
        b"POST /predict/m?x=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n",
        b"POST /predict/%6d HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n",
        b"POST /predict/m/n HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n",
        b"POST /v2/models/m HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n",
        b"GET /predict/m HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n",
        b"POST /predict/m HTTP/1.1\r\nHost: h\r\n\r\n",
        b"POST /predict/m HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
        b"POST /predict/m HTTP/1.1\r\nHost: h\r\nContent-Length: -3\r\n\r\n",
        b"POST /predict/m HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /predict/m HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nX-Request-Id: \xff\r\n\r\n",
        b"POST /predict/m HTTP/1.1\nHost: h\nContent-Length: 3\r\n\r\n",
        b"POST /predict/m HTTP/1.1\r\nHost : h\r\nContent-Length: 3\r\n\r\n",
    ],
)
def test_an_odd_head_is_left_to_uvicorn(head):
    assert http_head.read_head(head) is None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 90), st.integers(0, 10))
def test_no_bytes_make_the_head_raise(noise, at, gone):
    plain = post("/predict/m", b"", "accept: */*")
    http_head.read_head(plain[:at] + noise + plain[at + gone :])


def test_a_caller_who_leaves_is_not_computed_for_and_is_counted():
    async def test():
        books = Books()

        class Queue:
            def submit(self, call, done):
                self.ticket = fastlane.Ticket(None, done)
                return self.ticket

        queue = Queue()
        protocol, _, _ = connection(queue, books)
        protocol.data_received(post("/predict/m", b"x", last=False))
        assert books.under_way == 1
        protocol.connection_lost(None)
        assert (queue.ticket.left, books.under_way, books.statuses) == (True, 0, [499])

    on_loop(test)


def test_a_server_that_stops_answers_what_it_has_read_and_then_closes():
    async def test():
        service = Slow()
        protocol, wire, _ = connection(service)
        protocol.data_received(post("/predict/m0", b"x", last=False) * 2)
        protocol.shutdown()
        assert not wire.closed
        service.answer(0)
        assert not wire.closed
        service.answer(1)
        assert wire.closed
        assert bodies(wire.sent) == [b"m0", b"m0"]
        assert wire.sent.count(b"connection: close") == 1

    on_loop(test)


def test_more_requests_in_a_row_than_may_be_under_way_wait():
    async def test():
        service = Slow()
        protocol, wire, _ = connection(service)
        protocol.data_received(post("/predict/m", b"x", last=False) * 200)
        assert len(service.waiting) == fastlane.PIPELINED
        for place in range(200):
            service.answer(place)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert len(bodies(wire.sent)) == 200

    on_loop(test)


@pytest.mark.parametrize("begun", [b"POST /predict/m HT", post("/predict/m", b"xyz")[:-1], b"GET /else HT"])
def test_a_request_that_never_becomes_whole_is_refused(begun, monkeypatch):
    monkeypatch.setattr(fastlane, "PATIENCE_S", 0.02)

    async def test():
        protocol, wire, _ = connection(Slow())
        protocol.data_received(begun)
        for _ in range(200):
            await asyncio.sleep(0.01)
            if wire.closed:
                break
        assert wire.closed
        assert wire.sent.startswith(b"HTTP/1.1 408 ")
        assert orjson.loads(bodies(wire.sent)[0])["code"] == "too_slow"

    on_loop(test)


def test_a_head_without_end_is_refused():
    async def test():
        protocol, wire, _ = connection(Slow())
        for _ in range(80):
            protocol.data_received(
                b"GET / HTTP/1.1\r\nHost: h\r\n"
                if not wire.sent and not protocol._inside
                else b"a: " + b"b" * 1000 + b"\r\n"
            )
        assert wire.closed
        assert wire.sent.startswith(b"HTTP/1.1 431 ")

    on_loop(test)


def test_heads_seen_before_are_not_parsed_again_and_not_kept_without_bound():
    fast = Fast(Slow())
    block = post("/predict/m", b"")
    assert fast.head(block) is fast.head(block)
    assert fast.head(post("/predict/m", b"", "x-request-id: 1")).request_id == "1"
    for n in range(3 * fast_server._KNOWN_HEADS):
        fast.head(post("/predict/m", b"", f"a: {n}"))
    assert len(fast._heads) <= fast_server._KNOWN_HEADS


@asynccontextmanager
async def served(found):
    """The replica on a port of this host, by uvicorn with the fast lane."""
    found.fast = Fast(found)
    config = uvicorn.Config(
        found.__serve_build_asgi_app__(), port=0, lifespan="off", log_level="error", http=partial(FastLane, found.fast)
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], server
    finally:
        server.should_exit = True
        await running


async def ask(port, data):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    reply = await reader.read()
    writer.close()
    return reply


def test_many_callers_on_a_socket_get_their_own_answers(tmp_path):
    async def test():
        found = await replica(tmp_path, LIVE, sink=ListSink())
        async with served(found) as (port, _):
            replies = await asyncio.gather(
                *(ask(port, post("/predict/taxi", rows(f"i{n}") if n % 7 else b"{")) for n in range(150))
            )
        await asyncio.to_thread(found.stop)
        assert found.fast.requests == 150
        for n, reply in enumerate(replies):
            assert reply.startswith(b"HTTP/1.1 200 " if n % 7 else b"HTTP/1.1 400 ")
            assert not n % 7 or orjson.loads(bodies(reply)[0])["predictions"][0]["id"] == f"i{n}"

    on_loop(test)


def test_both_lanes_answer_the_same_on_a_pipelines_model(tmp_path):
    tensor = {"name": "features", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
    sent = [
        post("/predict/taxi", rows("a", "b")),
        post("/predict/taxi", rows("a")),
        post("/predict/taxi", rows("c", extra=1)),
        post("/predict/taxi", rows("c").replace(b'"a"', b'"nowhere"')),
        post("/predict/taxi", rows("x", "x")),
        post("/predict/taxi", b"\xff\xfe"),
        post("/predict/taxi", b""),
        post("/v2/models/taxi/infer", orjson.dumps({"inputs": [tensor]}), "x-raymill-version: 01"),
        post("/v2/models/taxi/versions/x/infer", orjson.dumps({"inputs": [tensor]})),
        post("/v2/models/taxi/infer", orjson.dumps({"inputs": [tensor | {"datatype": "FP64"}]})),
    ]

    async def test():
        found = await replica(tmp_path, LIVE, sink=ListSink())
        app, fast = selftest.as_serve_does(found.__serve_build_asgi_app__()), Fast(found)
        for data in sent:
            quick, plain = (
                await converse(partial(FastLane, fast), app, data),
                await converse(HttpToolsProtocol, app, data),
            )
            assert masked(quick) == masked(plain)
        assert fast.requests == len(sent)
        await found.reconfigure(to_user_config([LIVE]))
        await asyncio.to_thread(found.stop)

    on_loop(test)


def test_a_call_names_what_was_asked():
    head = http_head.read_head(post("/v2/models/m/versions/3/infer", b"xy", "a: 1", "a: 2").removesuffix(b"xy"))
    assert (head.model, head.infer, head.version, head.length, head.keep_alive) == ("m", True, "3", 2, False)
    assert head.headers["a"] == "2"
    assert HttpCall(head.model, head.infer, head.version, head.headers, b"xy").version == "3"


def test_a_request_leaves_nothing_for_the_garbage_collector(tmp_path):
    infer = orjson.dumps({"inputs": [{"name": "features", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]})
    kinds = (
        post("/predict/taxi", rows("a"), last=False),
        post("/v2/models/taxi/infer", infer, last=False),  # the first of them by the ordinary way, the others not
        post("/v2/models/other/infer", infer, last=False),
    )

    async def test():
        found = await replica(tmp_path, LIVE)
        lane, wire, _ = connection(found)

        async def each(times):
            for data in kinds * times:
                before = len(wire.sent)
                lane.data_received(data)
                while len(wire.sent) == before:
                    await asyncio.sleep(0.001)

        await each(3)
        gc.collect()
        gc.disable()
        try:
            await each(5)
            return sum(isinstance(o, (fastlane._Due, Ticket, HttpCall)) for o in gc.get_objects())
        finally:
            gc.enable()

    assert asyncio.run(test()) == 0


def test_the_server_listens_on_a_unix_socket_too_and_ends_its_connections_with_the_others(tmp_path):
    async def test():
        found = await replica(tmp_path, LIVE, sink=ListSink())
        async with served(found) as (port, server):
            folder = tmp_path / "s"
            names = dict(zip(proxy_sockets._RANGE, (str(port), str(port)), strict=True))
            beside = ProxySockets(found.fast, {proxy_sockets.SOCKETS_VARIABLE: str(folder), **names})
            await beside.open("10.0.0.7")
            path = folder / f"10.0.0.7_{port}.sock"
            assert oct(path.stat().st_mode & 0o777) == "0o600"
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(post("/predict/taxi", rows("a"), last=False))
            head = await reader.readuntil(b"\r\n\r\n")
            plain = await ask(port, post("/predict/taxi", rows("a")))
            body = await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
            assert plain.endswith(body)
            assert len(server.server_state.connections) == 1
            beside.close()
            assert not path.exists()
            server.should_exit = True
            assert await reader.read() == b""

    on_loop(test)
