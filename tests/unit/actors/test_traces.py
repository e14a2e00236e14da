"""Traces of requests: what is told of both lanes and gRPC, and that nothing else changes."""

import asyncio
import gzip
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import orjson
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import StatusCode

from raymill.actors import traces
from raymill.actors.fast_server import Fast
from raymill.actors.fastlane import FastLane
from raymill.actors.oip_grpc import GrpcCall
from raymill.actors.open_inference_pb2 import ModelInferRequest
from raymill.actors.selftest import converse, post
from raymill.actors.trace_export import otlp
from raymill.actors.traces import Traces
from tests.unit.actors import serving_parts
from tests.unit.actors.serving_parts import model

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-00"}


class Seen:
    """A replica whose traces are kept."""

    def __init__(self, found, ratio):
        self.kept = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBasedTraceIdRatio(ratio))
        provider.add_span_processor(SimpleSpanProcessor(self.kept))
        self.replica = found
        found.traces = Traces(provider.get_tracer("test"))

    def spans(self):
        return {s.name: s for s in self.kept.get_finished_spans()}

    def tree(self):
        """(name, name of its parent) of all spans, sorted; absent: it has none here."""
        spans = self.kept.get_finished_spans()
        names = {s.context.span_id: s.name for s in spans}
        return sorted((s.name, names.get(s.parent.span_id, "the caller") if s.parent else "") for s in spans)


@pytest.fixture
def run(tmp_path):
    def run(test, ratio=1.0):
        async def whole():
            found = await serving_parts.replica(tmp_path, model((1, "live", 1.0)))
            try:
                async with serving_parts.http(found) as client:
                    return await test(Seen(found, ratio), client)
            finally:
                found.stop()

        return asyncio.run(whole())

    return run


def rows(count=1, zone="a"):
    return {"rows": [{"zone": zone, "miles": 1.0} for _ in range(count)]}


STAGES = [
    ("batch taxi", "predict taxi"),
    ("decode", "predict taxi"),
    ("encode", "predict taxi"),
    ("features", "batch taxi"),
    ("log", "batch taxi"),
    ("model", "batch taxi"),
    ("predict taxi", "the caller"),
    ("queue", "predict taxi"),
]


def test_a_callers_trace_goes_on_through_every_stage(run):
    async def test(seen, client):
        answer = await client.post("/predict/taxi", json=rows(3), headers=SAMPLED)
        assert answer.status_code == 200 and seen.tree() == STAGES
        found = seen.spans()
        assert {f"{s.context.trace_id:032x}" for s in found.values()} == {TRACE}
        assert f"{found['predict taxi'].parent.span_id:016x}" == "b7ad6b7169203331"
        told = dict(found["predict taxi"].attributes)
        assert (told["raymill.rows"], told["raymill.versions"], told["http.response.status_code"]) == (3, (1,), 200)
        ends = [found[n].end_time for n in ("decode", "queue", "features", "model", "log", "encode", "predict taxi")]
        assert ends == sorted(ends)
        assert found["queue"].end_time == found["batch taxi"].start_time

    run(test, ratio=0.0)  # the caller's decision holds, whatever the ratio


def test_what_is_not_sampled_leaves_no_trace_and_gets_the_same(run):
    async def test(seen, client):
        body = rows() | {"at": "2026-01-05T06:30:00Z"}
        body["rows"][0]["id"] = "one"
        answers = [(await client.post("/predict/taxi", json=body, headers=h)).content for h in ({}, UNSAMPLED, SAMPLED)]
        assert len(set(answers)) == 1
        assert len(seen.spans()) == len(STAGES)  # of the last one alone

    run(test, ratio=0.0)


def test_requests_that_were_computed_together_are_linked(run):
    async def test(seen, client):
        asked = [client.post("/predict/taxi", json=rows()) for _ in range(3)]
        await asyncio.gather(*asked)
        spans = seen.kept.get_finished_spans()
        requests = {s.context.span_id: s for s in spans if s.name == "predict taxi"}
        [batch] = [s for s in spans if s.name == "batch taxi"]
        assert batch.attributes["raymill.requests"] == 3 and len({s.context.trace_id for s in requests.values()}) == 3
        assert {batch.parent.span_id, *(link.context.span_id for link in batch.links)} == set(requests)
        linked = [s for s in requests.values() if [link.context for link in s.links] == [batch.context]]
        assert len(linked) == 2

    run(test)


@pytest.mark.parametrize(
    ("body", "headers", "status", "names"),
    [
        (rows(zone="nowhere"), {}, 422, {"predict taxi", "decode", "queue", "batch taxi", "features"}),
        ({"rows": []}, {}, 400, {"predict taxi", "decode"}),
        (rows(), {"timeout": "0"}, 504, {"predict taxi", "decode"}),
    ],
)
def test_a_request_that_fails_has_its_status_in_its_trace(run, body, headers, status, names):
    async def test(seen, client):
        answer = await client.post("/predict/taxi", json=body, headers={**headers, **SAMPLED})
        span = seen.spans()["predict taxi"]
        assert answer.status_code == span.attributes["http.response.status_code"] == status
        assert (span.status.status_code is StatusCode.ERROR) == (status >= 500)
        assert set(seen.spans()) == names
        assert not seen.replica.traces._open and not seen.replica.traces._waiting

    run(test)


def test_a_grpc_call_is_traced_by_its_metadata(run):
    async def test(seen, client):
        tensor = ModelInferRequest.InferInputTensor(name="features", datatype="FP32", shape=[1, 2])
        tensor.contents.fp32_contents.extend([1.0, 2.0])
        request = ModelInferRequest(model_name="taxi", inputs=[tensor]).SerializeToString()
        future = asyncio.get_running_loop().create_future()
        seen.replica.submit(GrpcCall.of(request, SAMPLED), future.set_result)
        assert (await future).status == 200
        assert seen.tree() == [stage for stage in STAGES if stage[0] != "features"]  # they came ready

    run(test)


def test_the_fast_lane_is_traced_and_keeps_no_head_of_a_trace(run):
    async def test(seen, client):
        fast = Fast(seen.replica)
        headers = [f"{name}: {value}" for name, value in SAMPLED.items()]
        sent = post("/predict/taxi", orjson.dumps(rows()), *headers)
        reply = await converse(partial(FastLane, fast), None, sent)
        assert reply.startswith(b"HTTP/1.1 200") and fast.requests == 1
        assert seen.tree() == STAGES and fast._heads == {}

    run(test)


def test_spans_go_to_the_collector_that_the_environment_names(monkeypatch):
    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    provider = TracerProvider()
    for processor in otlp():
        provider.add_span_processor(processor)
    provider.get_tracer("test").start_span("predict taxi").end()
    provider.shutdown()
    server.shutdown()
    [(path, body)] = got
    assert path == "/v1/traces" and b"predict taxi" in (body if body[:2] != b"\x1f\x8b" else gzip.decompress(body))


def test_a_caller_who_has_gone_is_told_of_after_a_while(run, monkeypatch):
    async def test(seen, client):
        monkeypatch.setattr(traces, "ABANDONED_S", 0.0)
        lane = seen.replica._lane("taxi", seen.replica.models.named("taxi").spec)
        asked = asyncio.create_task(client.post("/predict/taxi", json=rows()))
        while not lane.line:
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert "predict taxi" not in seen.spans()
        await client.post("/predict/taxi", json=rows())
        assert seen.spans() and any(s.attributes.get("raymill.abandoned") for s in seen.kept.get_finished_spans())

    run(test)
