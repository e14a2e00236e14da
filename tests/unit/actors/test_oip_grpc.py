"""The Open Inference Protocol over gRPC: a real server and client on loopback, against the same replica over HTTP."""

import asyncio

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymill.actors import grpc_service, oip, oip_grpc
from raymill.actors import open_inference_pb2 as pb
from raymill.runtime.errors import RequestError
from tests.unit.actors.serving_parts import http, model, replica

METHOD = f"/{grpc_service.SERVICE}/"


def request(x, **fields):
    """Rows as raw data."""
    x = np.asarray(x, dtype="<f4")
    given = {"model_name": "taxi", "id": "mine", "raw_input_contents": [x.tobytes()]}
    found = pb.ModelInferRequest(**(given | fields))
    found.inputs.add(name=oip.INPUT, datatype="FP32", shape=x.shape)
    return found


class Channel:
    """A client of a server that offers what a Serve replica would."""

    def __init__(self, home):
        self._home = home

    async def __aenter__(self):
        self.replica = await replica(self._home, model((3, "live", 1.0), (4, "canary", 0.0)))
        grpc_service.answer_with(self.replica)
        self.server = grpc.aio.server()
        grpc_service.add_to_server(None, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        return self

    async def __aexit__(self, *_):
        await self.channel.close()
        await self.server.stop(0)
        self.replica.stop()

    async def call(self, name, message, answer):
        ask = self.channel.unary_unary(
            METHOD + name, request_serializer=lambda m: m.SerializeToString(), response_deserializer=answer.FromString
        )
        return await ask(message, timeout=10)

    async def infer(self, message):
        return await self.call("ModelInfer", message, pb.ModelInferResponse)


def run(tmp_path, use):
    async def inner():
        async with Channel(tmp_path) as channel:
            return await use(channel)

    return asyncio.run(inner())


def test_a_tensor_gets_the_answer_that_http_gives_it_raw_or_not(tmp_path):
    x = [[1.5, 2.0], [np.nan, 4.0]]

    async def use(channel):
        raw = await channel.infer(request(x))
        plain = request(x, raw_input_contents=[])
        plain.inputs[0].contents.fp32_contents.extend([1.5, 2.0, np.nan, 4.0])
        plain = await channel.infer(plain)
        async with http(channel.replica) as client:
            head = {"inputs": [{"name": oip.INPUT, "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.0]}]}
            answer = (await client.post("/v2/models/taxi/infer", json=head)).json()
        return raw, plain, answer

    raw, plain, answer = run(tmp_path, use)
    assert (raw.model_name, raw.model_version, raw.id) == ("taxi", "3", "mine")
    assert raw.outputs[0].name == "long" and list(raw.outputs[0].shape) == [2] and raw.outputs[0].datatype == "FP32"
    found = np.frombuffer(raw.raw_output_contents[0], "<f4")
    assert list(plain.outputs[0].contents.fp32_contents) == found.tolist() and not plain.raw_output_contents
    assert answer["outputs"][0]["data"] == [found[0]]
    assert raw.parameters["prediction_id"].string_param != plain.parameters["prediction_id"].string_param


def test_metadata_and_readiness_say_what_is_served(tmp_path):
    async def use(channel):
        return (
            await channel.call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse),
            await channel.call("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse),
            await channel.call("ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse),
            await channel.call("ModelReady", pb.ModelReadyRequest(name="taxi", version="4"), pb.ModelReadyResponse),
            await channel.call("ModelMetadata", pb.ModelMetadataRequest(name="taxi"), pb.ModelMetadataResponse),
        )

    live, ready, server, model_ready, metadata = run(tmp_path, use)
    assert live.live and ready.ready and model_ready.ready and server.name == "raymill"
    assert list(metadata.versions) == ["3", "4"] and list(metadata.inputs[0].shape) == [-1, 2]


FAULTS = {
    "no such model": (request([[1, 2]], model_name="bus"), "NOT_FOUND", "there is no model 'bus'"),
    "no such version": (request([[1, 2]], model_version="9"), "NOT_FOUND", "does not serve version 9"),
    "a version that is no number": (request([[1, 2]], model_version="new"), "NOT_FOUND", "names no version"),
    "too few columns": (request([[1]]), "INVALID_ARGUMENT", r"takes \[rows, 2\]"),
    "bytes that lie": (request([[1, 2]], raw_input_contents=[b"abc"]), "INVALID_ARGUMENT", "3 bytes"),
    "data twice": (request([[1, 2]], raw_input_contents=[b"a", b"b"]), "INVALID_ARGUMENT", "once"),
    "no data": (request([[1, 2]], raw_input_contents=[]), "INVALID_ARGUMENT", "0 values"),
    "infinite": (request([[np.inf, 2]]), "INVALID_ARGUMENT", "infinite"),
    "no inputs": (pb.ModelInferRequest(model_name="taxi"), "INVALID_ARGUMENT", "0 inputs"),
    "a long id": (request([[1, 2]], id="x" * 200), "INVALID_ARGUMENT", "200 characters"),
    "another output": (
        request([[1, 2]], outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="y")]),
        "INVALID_ARGUMENT",
        "no output 'y'",
    ),
}


def test_what_can_not_be_answered_is_refused_with_the_reason(tmp_path):
    async def use(channel):
        for what, (message, code, words) in FAULTS.items():
            with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
                await channel.infer(message)
            assert caught.value.code().name == code, what
        with pytest.raises(grpc.aio.AioRpcError, match="has no version '7'"):
            await channel.call(
                "ModelMetadata", pb.ModelMetadataRequest(name="taxi", version="7"), pb.ModelMetadataResponse
            )
        assert (await channel.infer(request([[1, 2]]))).model_version == "3"  # the neighbours go on

    run(tmp_path, use)


def test_bytes_that_are_no_message_are_refused_and_not_answered_with_our_trace(tmp_path):
    async def use(channel):
        ask = channel.channel.unary_unary(METHOD + "ModelInfer")
        with pytest.raises(grpc.aio.AioRpcError, match="no ModelInferRequest") as caught:
            await ask(b"\xff\xff\xff", timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(tmp_path, use)


def test_a_stream_answers_in_order_with_errors_in_their_places(tmp_path):
    async def use(channel):
        sent = [request([[i, 0]], id=str(i), model_name="bus" if i % 7 == 3 else "taxi") for i in range(200)]
        ask = channel.channel.stream_stream(
            METHOD + "ModelStreamInfer",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        got = [answer async for answer in ask(iter(sent), timeout=20)]
        assert len(got) == 200
        for i, answer in enumerate(got):
            if i % 7 == 3:
                assert "there is no model 'bus'" in answer.error_message
            else:
                assert answer.infer_response.id == str(i)
                p = np.frombuffer(answer.infer_response.raw_output_contents[0], "<f4")[0]
                assert p == pytest.approx(0.3 + i / 1000, abs=1e-6)

    run(tmp_path, use)


def test_a_hundred_callers_at_once_each_get_their_own_answer(tmp_path):
    async def use(channel):
        answers = await asyncio.gather(*(channel.infer(request([[i, 0]], id=str(i))) for i in range(300)))
        assert [a.id for a in answers] == [str(i) for i in range(300)]
        p = [np.frombuffer(a.raw_output_contents[0], "<f4")[0] for a in answers]
        assert p == pytest.approx([0.3 + i / 1000 for i in range(300)], abs=1e-6)

    run(tmp_path, use)


def test_a_call_from_another_host_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(grpc_service, "_is_local", lambda peer: False)

    async def use(channel):
        with pytest.raises(grpc.aio.AioRpcError, match="on its own host alone") as caught:
            await channel.infer(request([[1, 2]]))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.aio.AioRpcError, match="on its own host alone"):
            await channel.call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)

    run(tmp_path, use)


@pytest.mark.parametrize(
    ("peer", "local"),
    [("ipv4:127.0.0.1:50", True), ("ipv6:%5B::1%5D:50", True), ("unix:/x", True), ("ipv4:203.0.113.9:50", False)],
)
def test_peers_are_told_apart_by_their_address(peer, local):
    assert grpc_service._is_local(peer) is local


@given(st.binary(max_size=200))
def test_whatever_bytes_come_they_are_read_or_refused_with_a_reason(data):
    try:
        call = oip_grpc.GrpcCall.of(data, {})
        oip_grpc.read_infer(call.request, model((3, "live", 1.0)))
    except RequestError as err:
        assert err.message
