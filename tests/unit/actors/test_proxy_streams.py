"""Requests as streams of HTTP/2, asked by a client of another make: answered as over HTTP/1.1, each alone."""

import asyncio
from itertools import cycle, pairwise

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors import http2, lane, proxy_streams, selftest, stream_replies
from raymill.actors.asgi import Reply
from raymill.actors.fast_server import Fast
from raymill.actors.fastlane import FastLane
from raymill.actors.http2 import Malformed
from raymill.actors.proxy_streams import Streams
from tests.unit.actors import test_fastlane
from tests.unit.actors.serving_parts import ListSink, replica
from tests.unit.actors.test_fastlane import LIVE, Books, connection, on_loop, rows


class Wire(selftest.Wire):
    """A connection in memory that counts what is written to it."""

    writes = 0

    def write(self, data):
        self.writes += 1
        super().write(data)

    def get_write_buffer_size(self):
        return 0

    def get_extra_info(self, name, default=None):
        return default


class Slow(test_fastlane.Slow):
    """Answers with the model's name, or with `body`."""

    body = None

    def answer(self, place):
        call, done = self.waiting[place]
        done(Reply(200, self.body or call.model.encode()))


class Lined(Slow):
    """Gives tickets, as a lane does."""

    def __init__(self):
        super().__init__()
        self.tickets = []

    def submit(self, call, done):
        super().submit(call, done)
        self.tickets.append(lane.Ticket(None, done))
        return self.tickets[-1]


class Client:
    """What speaks to a connection in memory: h2, and what it has heard of each stream."""

    def __init__(self, service, app=None, window=None):
        config = uvicorn.Config(lambda: app or echo, factory=True, lifespan="off", log_config=None)
        config.load()
        self.books = Books()
        self.fast = Fast(service, lambda app: self.books)
        self.server = uvicorn.server.ServerState()
        arguments = {"config": config, "server_state": self.server, "app_state": {}}
        FastLane(self.fast, **arguments)
        self.connection = Streams(self.fast, arguments)
        self.service = service
        self.wire = Wire()
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="latin-1"))
        if window is not None:
            self.h2.local_settings = h2.settings.Settings(
                client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
            )
        self.takes = True
        """Whether windows are opened again for what came."""
        self.heads, self.bodies, self.ended, self.reset, self.over = {}, {}, [], {}, None
        self.connection.connection_made(self.wire)
        self.h2.initiate_connection()
        self.exchange()

    def ask(self, path, body=b"", headers=(), end=True):
        stream = self.h2.get_next_available_stream_id()
        pseudo = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", path)]
        self.h2.send_headers(stream, [*pseudo, ("content-length", str(len(body))), *headers])
        self.h2.send_data(stream, body, end_stream=end)
        return stream

    async def until(self, is_there):
        """Whether it came to be."""
        for _ in range(5_000):
            self.exchange()
            if is_there():
                return True
            await asyncio.sleep(0.001)
        return False

    def exchange(self):
        self.connection.data_received(self.h2.data_to_send())
        self.hear()

    def hear(self):
        sent = bytes(self.wire.sent)
        self.wire.sent.clear()
        for kind, payload in frames_of(sent):
            if kind == http2.GOAWAY:  # h2 takes it for the end
                self.over = http2.number(payload[:4]), http2.number(payload[4:8])
                sent = sent.replace(http2.frame(kind, 0, 0, payload), b"")
        events = self.h2.receive_data(sent) if sent else []
        for event in events:
            if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                self.heads.setdefault(event.stream_id, {}).update(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] = self.bodies.get(event.stream_id, b"") + event.data
                if self.takes:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                self.ended.append(event.stream_id)
            elif isinstance(event, h2.events.StreamReset):
                self.reset[event.stream_id] = event.error_code

    async def settled(self):
        """Everything that is on its way has come."""
        for _ in range(20):
            await asyncio.sleep(0)
            self.exchange()


async def echo(scope, receive, send):
    """An application that says what it got."""
    body = (await receive())["body"]
    said = f"{scope['method']} {scope['path']} {scope['query_string'].decode()} {len(body)}".encode()
    await send({"type": "http.response.start", "status": 201, "headers": [(b"x-app", b"1")]})
    await send({"type": "http.response.body", "body": said})


def test_a_stream_is_answered_as_the_request_is_over_http1(tmp_path):
    async def test():
        found = await replica(tmp_path, LIVE, sink=ListSink())
        client = Client(found)
        asked = {
            "/predict/taxi": rows("a"),
            "/predict/nowhere": rows("b"),
            "/v2/models/taxi/infer": b"{",
            "/v2/models/taxi/versions/9/infer": b"{}",
        }
        streams = {path: client.ask(path, body) for path, body in asked.items()}
        assert await client.until(lambda: len(client.ended) == len(asked))
        for path, body in asked.items():
            plain, wire, _ = connection(found)
            plain.data_received(selftest.post(path, body))
            while not wire.closed:
                await asyncio.sleep(0.001)
            status, _, rest = bytes(wire.sent).partition(b"\r\n")
            head = client.heads[streams[path]]
            assert status.split()[1].decode() == head[":status"] and rest.endswith(client.bodies[streams[path]])
            over_http1 = {line.partition(b":")[0].decode() for line in rest.partition(b"\r\n\r\n")[0].split(b"\r\n")}
            assert set(head) - {":status"} == over_http1 - {"connection"}
        assert sorted(client.books.statuses) == [200, 400, 400, 404] and client.books.under_way == 0
        found.stop()

    on_loop(test)


def test_the_callers_name_of_a_request_comes_back_and_others_get_one():
    async def test():
        client = Client(Slow())
        one, two = client.ask("/predict/a", b"1", [("x-request-id", "given")]), client.ask("/predict/b", b"1")
        client.exchange()
        for place in (1, 0):
            client.service.answer(place)
        await client.settled()
        assert client.ended == [two, one]  # as they come, not as they were asked
        assert client.bodies == {one: b"a", two: b"b"}
        assert client.heads[one]["x-request-id"] == "given" and len(client.heads[two]["x-request-id"]) == 36

    on_loop(test)


def test_what_is_odd_goes_to_the_application():
    async def test():
        client = Client(Slow())
        streams = [
            client.ask("/predict/a?x=1", b"12"),
            client.ask("/elsewhere", b"123"),
            client.ask("/predict/a", b"1234", [("content-encoding", "gzip")]),
        ]
        await client.settled()
        assert [client.bodies[s] for s in streams] == [
            b"POST /predict/a x=1 2",
            b"POST /elsewhere  3",
            b"POST /predict/a  4",
        ]
        assert client.heads[streams[0]] == {":status": "201", "x-app": "1"} and not client.service.waiting

        async def broken(scope, receive, send):
            raise ValueError(scope["path"])

        client = Client(Slow(), app=broken)
        stream = client.ask("/elsewhere", b"")
        await client.settled()
        assert client.heads[stream][":status"] == "500" and b"failed on this request" in client.bodies[stream]

    on_loop(test)


def test_replies_of_one_batch_are_written_together():
    async def test():
        client = Client(Slow())
        streams = [client.ask("/predict/a", b"1") for _ in range(40)]
        client.exchange()
        client.wire.writes = 0
        for place in range(40):
            client.service.answer(place)
        await client.settled()
        assert client.ended == streams and client.wire.writes == -(-40 // stream_replies.WRITTEN_TOGETHER)

    on_loop(test)


def test_a_caller_who_leaves_is_not_computed_for_and_harms_nobody():
    async def test():
        client = Client(Lined())
        left, stays = client.ask("/predict/a", b"1"), client.ask("/predict/b", b"1")
        client.exchange()
        client.h2.reset_stream(left)
        client.exchange()
        assert [t.left for t in client.service.tickets] == [True, False] and client.books.statuses == [499]
        client.service.answer(0)
        client.service.answer(1)
        await client.settled()
        assert client.bodies == {stays: b"b"} and client.books.under_way == 0
        client.ask("/predict/c", b"1")
        client.exchange()
        client.connection.connection_lost(None)
        assert client.service.tickets[-1].left and client.books.statuses == [499, 200, 499]
        assert client.connection not in client.server.connections

    on_loop(test)


@pytest.mark.parametrize("window", [0, 1, 1000, 70_000])
def test_a_reply_waits_for_the_window_that_the_proxy_gives(window):
    async def test():
        client = Client(Slow(), window=window)
        streams = [client.ask(f"/predict/{'a' * n}", b"1") for n in (1, 900, 3_000)]
        client.takes = False
        client.exchange()
        for place in range(3):
            client.service.answer(place)
        await client.settled()
        for stream, size in zip(streams, (1, 900, 3_000), strict=True):
            assert len(client.bodies.get(stream, b"")) == min(window, size)
            if stream not in client.ended:
                client.h2.increment_flow_control_window(size, stream)
        await client.settled()
        assert [len(client.bodies[s]) for s in streams] == [1, 900, 3_000] and sorted(client.ended) == streams

    on_loop(test)


def test_replies_wait_for_the_window_of_the_connection_and_pass_no_other():
    async def test():
        client = Client(Slow(), window=1 << 20)
        client.takes = False
        streams = [client.ask(f"/predict/{'a' * 3_000}", b"1") for _ in range(30)]
        client.exchange()
        for place in range(30):
            client.service.answer(place)
        await client.settled()
        assert sum(map(len, client.bodies.values())) == http2.FIRST_WINDOW
        client.h2.increment_flow_control_window(30 * 3_000)
        await client.settled()
        assert client.ended == streams and set(map(len, client.bodies.values())) == {3_000}

    on_loop(test)


def test_a_large_reply_leaves_when_no_other_can_wait_behind_it():
    async def test():
        client = Client(Slow())
        client.service.body = b"x" * 50_000
        large, small = client.ask("/predict/large", b"1"), client.ask("/predict/small", b"1")
        client.exchange()
        client.service.answer(0)
        await asyncio.sleep(0)
        client.hear()
        assert client.over == (http2.MAX_STREAM, http2.NO_ERROR)  # nothing further, please
        client.ask("/predict/late", b"1")  # was on its way
        await client.settled()  # the ping is answered
        assert not client.bodies
        client.service.body = b"y"
        client.service.answer(1)
        await client.settled()
        assert large not in client.bodies and len(client.service.waiting) == 3
        client.service.answer(2)
        for _ in range(10):
            await client.settled()
        assert len(client.bodies[large]) == 50_000 and client.bodies[small] == b"y" and large in client.ended

    on_loop(test)


def test_a_server_that_stops_answers_what_was_asked_and_then_closes(monkeypatch):
    async def test():
        monkeypatch.setattr(stream_replies, "PATIENCE_S", 0.05)
        client = Client(Slow())
        stream = client.ask("/predict/a", b"1")
        client.exchange()
        client.connection.shutdown()
        await client.settled()
        assert client.over == (http2.MAX_STREAM, http2.NO_ERROR)
        await asyncio.sleep(0.1)
        assert not client.wire.closed
        client.service.answer(0)
        await client.settled()
        assert client.bodies == {stream: b"a"}
        await asyncio.sleep(0.1)
        assert client.wire.closed

    on_loop(test)


def test_a_length_that_lies_and_a_body_that_is_too_large_are_refused():
    async def test():
        client = Client(Slow())
        short = client.ask("/predict/a", b"12", [], end=False)
        client.h2.end_stream(short)
        lies = client.h2.get_next_available_stream_id()
        client.exchange()
        client.connection.data_received(raw_request(lies, b"/predict/a", b"12", length=3))
        await client.settled()
        assert len(client.service.waiting) == 1
        assert client.reset == {} or client.reset == {lies: http2.PROTOCOL_ERROR}
        client = Client(Slow())
        large = client.ask("/predict/a", b"", [], end=False)
        for _ in range(3):
            client.h2.send_data(large, bytes(16_000))
            client.exchange()
        await client.settled()
        assert client.heads[large][":status"] == "413" and not client.service.waiting
        fine = client.ask("/predict/a", b"1")
        client.exchange()
        client.service.answer(0)
        await client.settled()
        assert client.bodies[fine] == b"a"

    on_loop(test)


def test_more_streams_than_may_be_are_refused_and_the_others_stay(monkeypatch):
    async def test():
        client = Client(Slow())
        monkeypatch.setattr(proxy_streams, "MOST_STREAMS", 2)
        streams = [client.ask("/predict/a", b"1") for _ in range(3)]
        client.exchange()
        await client.settled()
        assert client.reset == {streams[2]: http2.REFUSED_STREAM} and len(client.service.waiting) == 2

    on_loop(test)


def raw_request(stream, path, body, length=None):
    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b"content-length": b"%d" % (length or len(body)),
    }
    return http2.message(stream, b"".join(http2.field(k, v) for k, v in fields.items()), body)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_it_does_not_matter_in_which_pieces_the_bytes_come(sizes, continued):
    async def test():
        client = Client(Slow())
        sent = b""
        for n in range(8):
            whole = raw_request(1 + 2 * n, b"/predict/m%d" % n, b"b" * n * 10)
            head, block = 9, int.from_bytes(whole[:3], "big")
            if n % 4 < continued:  # in three parts, as a large head is
                cuts = [0, block // 3, block // 2, block]
                parts = [whole[head + a : head + b] for a, b in pairwise(cuts)]
                kinds = [(http2.HEADERS, 0), (http2.CONTINUATION, 0), (http2.CONTINUATION, http2.END_HEADERS)]
                frames = [http2.frame(k, f, 1 + 2 * n, p) for (k, f), p in zip(kinds, parts, strict=True)]
                whole = b"".join(frames) + whole[head + block :]
            sent += whole
        at = 0
        for size in cycle(sizes):
            client.connection.data_received(sent[at : at + size])
            at += size
            if at >= len(sent):
                break
        asked = [(call.model, call.body) for call, _ in client.service.waiting]
        assert asked == [(f"m{n}", b"b" * n * 10) for n in range(8)]

    on_loop(test)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.builds(
                http2.frame,
                st.integers(0, 12),
                st.integers(0, 255),
                st.sampled_from([0, 1, 2, 3, 5, 7, http2.MAX_STREAM]),
                st.one_of(st.binary(max_size=40), st.just(raw_request(1, b"/predict/a", b"1")[9:-10])),
            ),
        ),
        max_size=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_whatever_comes_is_answered_or_ends_the_connection(frames):
    async def test():
        client = Client(Slow())
        for data in frames:
            if client.wire.closed:
                break
            client.connection.data_received(data)
        for _, done in list(client.service.waiting):
            done(Reply(200, b"x"))
        await asyncio.sleep(0)
        if client.wire.closed:
            assert http2.GOAWAY in dict(frames_of(bytes(client.wire.sent)))
        else:
            for _ in range(3):
                await asyncio.sleep(0)
        client.connection.connection_lost(None)
        assert not client.connection._streams and client.books.under_way == 0

    on_loop(test)


def frames_of(sent):
    """Kinds and payloads."""
    found = []
    while sent:
        end = 9 + int.from_bytes(sent[:3], "big")
        found.append((sent[3], sent[9:end]))
        sent = sent[end:]
    return found


texts = st.binary(max_size=300).filter(lambda t: not {10, 13, 0} & set(t))


@given(st.lists(st.tuples(texts.filter(len), texts), max_size=10))
def test_a_block_is_read_as_it_was_written(fields):
    assert http2.read_block(b"".join(http2.field(*one) for one in fields), 1 << 20) == fields


@given(st.binary(max_size=80))
def test_no_block_is_read_by_what_another_said(block):
    try:
        first = http2.read_block(block, 1 << 10)
    except Malformed:
        return
    assert http2.read_block(block, 1 << 10) == first


def test_a_header_can_not_end_a_line():
    for bad in (b"a\r\nb: c", b"a\nb", b"\0"):
        with pytest.raises(Malformed):
            http2.read_block(http2.field(b"x", bad), 1 << 10)
    with pytest.raises(Malformed):
        http2.read_block(http2.field(b"x", b"y" * 2_000), 1 << 10)
