"""Calls of `ModelInfer` as streams from the proxy: answered as by gRPC's own server, refused in gRPC's words."""

import asyncio
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymill.actors import grpc_heads, grpc_service, http2, proxy_streams
from raymill.actors.asgi import Reply, error_reply
from raymill.actors.open_inference_pb2 import ModelInferRequest, ModelInferResponse
from raymill.runtime.errors import RequestError, Unauthenticated
from tests.unit.actors.serving_parts import ListSink, model, replica
from tests.unit.actors.test_fastlane import Books, on_loop
from tests.unit.actors.test_proxy_streams import Client, Lined, Slow

CLIENT = [("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "grpc-python/1.70")]


def message(rows=1, name="taxi", **more):
    request = ModelInferRequest(model_name=name, **more)
    request.inputs.add(name="features", datatype="FP32", shape=[rows, 2])
    request.raw_input_contents.append(np.zeros((rows, 2), dtype="<f4").tobytes())
    data = request.SerializeToString()
    return b"\0" + len(data).to_bytes(4, "big") + data


class Asked(Client):
    """A client that calls."""

    def call(self, data, headers=(), end=True):
        stream = self.h2.get_next_available_stream_id()
        path = (":path", grpc_heads.INFER.decode())
        pseudo = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), path]
        self.h2.send_headers(stream, [*pseudo, *CLIENT, *headers])
        for at in range(0, len(data), 16_384):
            self.h2.send_data(stream, data[at : at + 16_384])
            self.exchange()
            self.connection._replies.flush()
            self.hear()
        if end:
            self.h2.end_stream(stream)
        return stream


@pytest.fixture(autouse=True)
def books(monkeypatch):
    found = Books()
    monkeypatch.setattr(grpc_service, "_books", [found])
    return found


def test_a_call_is_answered_with_its_message_and_status(tmp_path, books):
    async def test():
        found = await replica(tmp_path, model((1, "live", 1.0)), sink=ListSink())
        client = Asked(found)
        streams = [client.call(message(rows=n, id=f"r{n}")) for n in (1, 3)]
        assert await client.until(lambda: len(client.ended) == 2)
        for stream, rows in zip(streams, (1, 3), strict=True):
            data = client.bodies[stream]
            assert data[0] == 0 and int.from_bytes(data[1:5], "big") == len(data) - 5
            answer = ModelInferResponse.FromString(data[5:])
            assert answer.id == f"r{rows}" and answer.outputs[0].shape == [rows]
            assert len(answer.raw_output_contents[0]) == 4 * rows
            assert client.heads[stream] == {":status": "200", "content-type": "application/grpc", "grpc-status": "0"}
        assert books.statuses == [200, 200] and books.under_way == 0 and client.books.statuses == []
        found.stop()

    on_loop(test)


def test_what_is_refused_is_told_by_code_and_words(tmp_path, books):
    async def test():
        found = await replica(tmp_path, model((1, "live", 1.0)), sink=ListSink())
        client = Asked(found)
        asked = {
            client.call(message(name="nowhere")): (5, "there is no model 'nowhere'"),
            client.call(message()[:-1]): (3, "one whole message"),
            client.call(b""): (3, "one whole message"),
            client.call(message() + message()): (3, "one whole message"),
            client.call(b"\1" + message()[1:]): (3, "not compressed"),
            client.call(b"\0\0\0\0\3\xff\xff\xff"): (3, "no ModelInferRequest"),
            client.call(message(model_version="9")): (5, "version 9"),
        }
        assert await client.until(lambda: len(client.ended) == len(asked))
        for stream, (code, words) in asked.items():
            assert client.heads[stream]["grpc-status"] == str(code)
            assert words in unquote(client.heads[stream]["grpc-message"])
            assert client.bodies.get(stream, b"") == b""
        assert books.under_way == 0 and len(books.statuses) == len(asked)
        found.stop()

    on_loop(test)


def test_who_may_not_ask_is_told_before_its_message_is_read(books):
    async def test():
        client = Asked(Slow())
        client.fast.refusal = lambda headers, right, is_local: (
            None if headers.get("authorization") == "Bearer k" else error_reply(Unauthenticated("no key"))
        )
        refused = client.call(message(rows=2_000), end=False)
        await client.settled()
        assert client.heads[refused]["grpc-status"] == "16" and "no key" in client.heads[refused]["grpc-message"]
        let_in = client.call(message(), [("authorization", "Bearer k")])
        client.exchange()
        client.service.answer(0)
        await client.settled()
        assert client.heads[let_in]["grpc-status"] == "0" and books.statuses == [200]

    on_loop(test)


def test_large_messages_come_whole_and_too_large_ones_are_refused(monkeypatch):
    async def test():
        client = Asked(Slow())
        large = message(rows=40_000)
        stream = client.call(large)
        client.exchange()
        request = client.service.waiting[0][0].request
        assert len(request.raw_input_contents[0]) == 8 * 40_000
        client.service.body = b"r" * 100_000
        client.service.answer(0)
        for _ in range(20):
            await client.settled()
        assert len(client.bodies[stream]) == 100_005 and client.heads[stream]["grpc-status"] == "0"
        client = Asked(Slow())
        monkeypatch.setattr(proxy_streams, "MOST_MESSAGE_BYTES", 100_000)
        stream = client.call(large[:110_000], end=False)
        await client.settled()
        assert client.heads[stream]["grpc-status"] == "3" and not client.service.waiting

    on_loop(test)


def test_a_deadline_goes_with_the_call_and_who_leaves_is_not_computed_for(books):
    async def test():
        client = Asked(Lined())
        units = {"4999m": 4.999, "2S": 2.0, "1M": 60.0, "1H": 3600.0, "250000u": 0.25, "5n": 5e-9, "odd": None}
        for text in units:
            client.call(message(), [("grpc-timeout", text)])
        left = client.call(message())
        client.exchange()
        assert [call.timeout_s for call, _ in client.service.waiting] == [*units.values(), None]
        client.h2.reset_stream(left)
        client.exchange()
        assert [t.left for t in client.service.tickets] == [False] * len(units) + [True] and books.statuses == [499]

    on_loop(test)


def test_other_calls_are_not_taken_for_it():
    fields = [(b":method", b"POST"), (b":path", grpc_heads.INFER), (b"content-type", b"application/grpc+proto")]
    assert grpc_heads.read(fields) is not None
    for name, value in (
        (b":method", b"GET"),
        (b":path", b"/inference.GRPCInferenceService/ModelStreamInfer"),
        (b"content-type", b"application/json"),
        (b"grpc-encoding", b"gzip"),
    ):
        assert grpc_heads.read([*(f for f in fields if f[0] != name), (name, value)]) is None


@given(st.text(max_size=400))
def test_words_of_any_letters_come_back(words):
    block = grpc_heads.failure(3, words)[2]
    told = dict(http2.read_block(block, 1 << 20))
    assert told[b"grpc-status"] == b"3" and unquote(told[b"grpc-message"].decode("ascii")) == words
    assert len(grpc_heads.failure(3, words * 100)[2]) < http2.MAX_FRAME_BYTES


def test_a_refusal_of_the_application_is_one_of_grpc():
    async def test():
        client = Asked(Slow())
        stream = client.call(message())
        client.exchange()
        client.service.waiting[0][1](error_reply(RequestError("wrong: 100 %")))
        await client.settled()
        assert unquote(client.heads[stream]["grpc-message"]).startswith("wrong: 100 %")
        assert client.heads[stream]["grpc-status"] == "3"
        stream = client.call(message())
        client.exchange()
        client.service.waiting[1][1](Reply(500, error_reply(RequestError("x")).body))
        await asyncio.sleep(0)
        await client.settled()
        assert client.heads[stream]["grpc-status"] == "13"

    on_loop(test)
