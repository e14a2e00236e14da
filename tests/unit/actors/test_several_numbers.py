"""Models that answer a row with k numbers: the same ones on every way out, logged, and never mixed with another k."""

import asyncio
import io
import json
from dataclasses import replace

import numpy as np
import orjson
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from raymill.actors import oip, oip_grpc, surroundings, wire
from raymill.actors.answering import HttpCall
from raymill.actors.gathering import KnownTicket
from raymill.actors.lake import Lake
from raymill.actors.model_set import ModelSet
from raymill.actors.oip import Infer
from raymill.actors.open_inference_pb2 import ModelInferRequest, ModelInferResponse
from raymill.actors.prediction_rows import SCHEMA, decode, encode
from raymill.actors.prediction_sink import LakeSink
from raymill.actors.predictions import PredictionLog
from raymill.actors.rollout import ColumnForm, Role, Route, odd_ones, to_user_config
from raymill.actors.serving import ServingReplica
from raymill.runtime.errors import TooLarge
from tests.unit.actors.serving_parts import ListSink, http, model
from tests.unit.actors.test_known_bodies import ID
from tests.unit.actors.test_predictions import batch, scored

X = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
NAMES = ("a", "b", "c")
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def softprob(classes=4):
    import xgboost

    wanted = {"objective": "multi:softprob", "num_class": classes, "nthread": 1}
    booster = xgboost.train(wanted, xgboost.DMatrix(X, np.arange(len(X)) % classes), 3)
    return bytes(booster.save_raw("ubj")), booster.inplace_predict(X)


def net(outputs=4):
    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs))
    out = io.BytesIO()
    rows = {0: torch.export.Dim("rows", min=1)}
    torch.export.save(torch.export.export(whole, (torch.zeros(4, 3),), dynamic_shapes=(rows,)), out)
    with torch.inference_mode():
        return out.getvalue(), whole(torch.from_numpy(X)).numpy()


MODELS = {"xgboost": softprob, "torch": net}


def served_alone(*routes, **changes):
    """A model without a pipeline, whose rows carry its inputs."""
    columns = {name: ColumnForm("float64", True) for name in NAMES}
    routes = routes or ((1, "live", 1.0),)
    alone = {"plan": None, "inputs": NAMES, "columns": columns, "required": NAMES, "key": ()}
    return model(*routes, **(alone | changes))


class Programs:
    def __init__(self, **programs):
        self.programs = programs

    def program(self, digest):
        return self.programs[digest]


def run(home, test, *specs, sink=None, load=surroundings.load_program, **programs):
    """`await test(replica, client)` with a replica of these programs, by digest."""

    async def whole():
        found = ServingReplica(home, records=Programs(**programs), sink=sink or ListSink(), load=load)
        found.start()
        try:
            await found.reconfigure(to_user_config(specs or [served_alone()]))
            async with http(found) as client:
                return await test(found, client)
        finally:
            await asyncio.to_thread(found.stop)

    return asyncio.run(whole())


def tensor(x, **more):
    return {"inputs": [{"name": "features", "shape": list(x.shape), "datatype": "FP32", **more}]}


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(2, 5)), elements=NUMBERS))
def test_every_codec_gives_the_numbers_back_row_by_row(p):
    rows, outputs = p.shape
    spec = replace(served_alone(), outputs=outputs)
    infer = Infer(X[:rows], [str(i) for i in range(rows)], "id", None, False)
    for laid in (p, np.asfortranarray(p)):
        text, _ = oip.write_infer(spec, infer, 1, laid)
        (told,) = orjson.loads(text)["outputs"]
        assert told["shape"] == [rows, outputs]
        assert np.array_equal(np.array(told["data"], np.float32).reshape(told["shape"]), p)
        body, length = oip.write_infer(spec, replace(infer, binary=True), 1, laid)
        assert body[length:] == p.tobytes()
        for is_raw in (False, True):
            message = oip_grpc.write_infer(spec, replace(infer, binary=is_raw), 1, laid)
            assert list(message.outputs[0].shape) == [rows, outputs]
            held = message.raw_output_contents[0] if is_raw else message.outputs[0].contents.fp32_contents
            assert np.array_equal(np.frombuffer(held, np.float32) if is_raw else np.array(held), p.ravel())
        versions = np.ones(rows, np.int64)
        said = orjson.loads(wire.write_json(spec, infer.ids, versions, laid))["predictions"]
        assert np.array_equal(np.array([s["long"] for s in said], np.float32), p)
        table = pa.ipc.open_stream(wire.write_arrow(spec, infer.ids, versions, laid)).read_all()
        assert table.schema.field("p").type == wire.type_of(outputs) == pa.list_(pa.float32(), outputs)
        assert np.array_equal(np.array(table["p"].to_pylist(), np.float32), p)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_four_numbers_answers_with_them_on_every_way_and_they_are_logged(kind, tmp_path):
    data, wanted = MODELS[kind]()
    sink = ListSink()

    async def test(found, client):
        x = X[:5]
        metadata = (await client.get("/v2/models/taxi")).json()["outputs"]
        assert metadata == [{"name": "long", "datatype": "FP32", "shape": [-1, 4]}]
        flat = (await client.post("/v2/models/taxi/infer", json=tensor(x, data=x.ravel().tolist()))).json()
        head = tensor(x, parameters={"binary_data_size": x.nbytes}) | {"parameters": {"binary_data_output": True}}
        head = json.dumps(head).encode()
        length = {"inference-header-content-length": str(len(head))}
        raw = await client.post("/v2/models/taxi/infer", content=head + x.tobytes(), headers=length)
        rows = [{"id": f"r{i}", **dict(zip(NAMES, row, strict=True))} for i, row in enumerate(x.tolist())]
        told = (await client.post("/predict/taxi", json={"rows": rows})).json()
        stream = wire.write_stream(pa.table({name: x[:, j] for j, name in enumerate(NAMES)}))
        arrow = await client.post("/predict/taxi", content=stream, headers={"content-type": wire.ARROW_STREAM})
        again = (await client.post("/predict/taxi", json={"rows": rows[:1] + rows[3:4]})).json()
        document = (await client.get("/openapi.json")).json()
        return flat, raw, told, arrow, again, document, await over_grpc(found, x)

    flat, raw, told, arrow, again, document, message = run(tmp_path, test, sink=sink, d1=data)
    ready = np.array(flat["outputs"][0]["data"], np.float32).reshape(flat["outputs"][0]["shape"])
    assert np.allclose(ready, wanted[:5], atol=1e-6)
    assert raw.content[int(raw.headers["inference-header-content-length"]) :] == ready.tobytes()
    assert list(message.outputs[0].shape) == [5, 4] and message.raw_output_contents[0] == ready.tobytes()
    assert np.array_equal(np.array([p["long"] for p in told["predictions"]], np.float32), ready)
    assert np.array_equal(np.array(pa.ipc.open_stream(arrow.content).read_all()["p"].to_pylist(), np.float32), ready)
    assert again["predictions"] == [told["predictions"][0], told["predictions"][3]]
    OpenAPIV31SpecValidator(document).validate()
    answer = document["components"]["schemas"]["taxi.Answer"] | {"components": document["components"]}
    Draft202012Validator(answer).validate(told)
    logged = {r["id"]: r for r in sink.rows()}
    assert len(logged) == 25  # flat, raw, rows, Arrow, gRPC; the retry has known ids
    assert logged["r2"]["p"] is None and np.array_equal(np.float32(logged["r2"]["scores"]), ready[2])


async def over_grpc(found, x):
    message = ModelInferRequest(model_name="taxi", raw_input_contents=[x.tobytes()])
    message.inputs.add(name=oip.INPUT, datatype="FP32", shape=x.shape)
    done = asyncio.get_running_loop().create_future()
    found.submit(oip_grpc.GrpcCall(message), done.set_result)
    return ModelInferResponse.FromString((await done).body)


def test_bodies_of_a_known_form_get_what_the_ordinary_way_gives(tmp_path):
    async def ask(found, rows, bare):
        replies = [asyncio.get_running_loop().create_future() for _ in rows]
        bodies = [json.dumps(tensor(row[None], data=row.tolist())).encode() for row in rows]
        calls = [HttpCall("taxi", True, None, {}, body, bare) for body in bodies]
        tickets = [found.submit(call, r.set_result) for call, r in zip(calls, replies, strict=True)]
        return [(r.status, ID.sub(b"*", r.body)) for r in await asyncio.gather(*replies)], tickets

    async def test(found, client):
        await ask(found, X[:1], True)
        quick, tickets = await ask(found, X, True)
        plain, _ = await ask(found, X, False)
        assert all(isinstance(t, KnownTicket) for t in tickets)
        return quick, plain

    quick, plain = run(tmp_path, test, d1=softprob()[0])
    assert quick == plain and {status for status, _ in quick} == {200}
    assert json.loads(quick[0][1])["outputs"][0]["shape"] == [1, 4]


def load_wide(data):
    """`2` gives two numbers a row, the second of which is not finite where the first input is negative."""
    outputs = int(data)

    def program(x):
        found = np.repeat(np.nan_to_num(x[:, :1]), outputs, axis=1)
        found[:, -1] = np.where(x[:, 0] < 0, np.inf, found[:, -1])
        return found[:, 0] if outputs == 1 else found

    return program


def test_one_number_that_is_not_finite_makes_the_row_that_callers_error_alone(tmp_path):
    async def test(found, client):
        rows = np.array([[1, 0, 0], [-1, 0, 0], [2, 0, 0]], np.float32)
        asked = [client.post("/v2/models/taxi/infer", json=tensor(r[None], data=r.tolist())) for r in rows]
        return [r.status_code for r in await asyncio.gather(*asked)]

    for routes in (((1, "live", 1.0),), ((1, "live", 0.5), (2, "canary", 0.5))):
        spec = served_alone(*routes)
        assert run(tmp_path, test, spec, load=load_wide, d1=b"3", d2=b"3") == [200, 422, 200]


@pytest.mark.parametrize(("role", "weight"), [("canary", 0.5), ("shadow", 0.0)])
def test_a_version_of_another_k_is_refused_as_one_that_does_not_load_and_may_take_its_place(role, weight, tmp_path):
    async def test(found, client):
        beside = dict(found.models.failures), found.models.models["taxi"].spec.outputs
        body = tensor(X[:1], data=[1, 2, 3])
        pinned = await client.post("/v2/models/taxi/versions/2/infer", json=body)
        await found.reconfigure(to_user_config([served_alone((2, "live", 1.0))]))
        return beside, pinned.json(), (await client.post("/v2/models/taxi/infer", json=body)).json()

    spec = served_alone((1, "live", 0.5), (2, role, weight))
    (failures, outputs), pinned, promoted = run(tmp_path, test, spec, load=load_wide, d1=b"3", d2=b"2")
    assert "2 numbers a row, version 1 beside it with 3" in failures["taxi"][2] and outputs == 3
    assert pinned["code"] == "unknown_version"
    assert promoted["outputs"][0] == {"name": "long", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 1.0]}


def test_a_pipelines_model_and_one_of_too_many_numbers_are_not_loaded():
    def failure(spec, data):
        models = ModelSet(fetch=lambda digest: data, load=load_wide, open_reader=lambda spec: None)
        models.apply(to_user_config([spec]))
        return models.failures["taxi"][1]

    assert "serve it alone" in failure(model((1, "live", 1.0)), b"2")
    assert "4096 may be" in failure(served_alone(), b"5000")


def test_the_live_version_says_how_many_numbers_are_right():
    routes = tuple(
        Route(version=v, digest="d", role=Role(r), weight=w) for v, r, w in ((1, "canary", 0.9), (2, "live", 0.1))
    )
    spec = replace(served_alone(), routes=routes)
    assert odd_ones(spec, {1: 3, 2: 1})[0] == 1 and list(odd_ones(spec, {1: 3, 2: 1})[1]) == [1]
    assert odd_ones(spec, {1: 3}) == (3, {}) and odd_ones(spec, {}) == (1, {})


def test_an_answer_has_a_size_that_can_be_sent():
    spec = replace(served_alone(), outputs=4096)
    with pytest.raises(TooLarge, match="4096 may be"):
        oip.check_shape([4097, 3], spec)
    assert oip.check_shape([4096, 3], spec) == (4096, 3)


def several(*ids, p=((0.25, 0.75),), **fields):
    return replace(scored(*ids, **fields), p=np.repeat(np.array(p, np.float32), len(ids), axis=0))


def test_an_answer_of_several_numbers_is_known_again_also_after_a_restart_and_not_mixed_with_one_of_one(tmp_path):
    log = PredictionLog(tmp_path, ListSink(), replica="r1")
    log.start()
    log.record(several("a", "b"), [])
    assert log.record(several("c", "b", p=((0.5, 0.5),)), [])[1].tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert log.record(scored("b", p=0.125), [])[1].tolist() == [0.125]
    log.stop()
    heir = PredictionLog(tmp_path, ListSink(), replica="r2")
    heir.start()
    assert heir.record(several("a", "z", p=((0.5, 0.5),), version=2), [])[1].tolist() == [[0.25, 0.75], [0.5, 0.5]]
    heir.stop()


def test_a_table_from_before_gets_the_column_once_and_keeps_its_rows(tmp_path):
    old, lake = SCHEMA.remove(SCHEMA.get_field_index("scores")), Lake(tmp_path / "lake")
    lake.append("predictions", batch("a", "b").select(old.names), batch_id="s0", by="at")
    seen = []
    sink = LakeSink(lambda model: lake, tmp_path / "lock", lambda *segment: seen.append(segment) or True)
    sink.ship("s1", batch("b", "c", p=0.75))
    mixed = decode(b"".join(encode(s, "r", 2.0) for s in (several("d"), scored("e"), several("f", p=((1, 2, 3),)))))
    sink.ship("s2", mixed)
    version = lake.version("predictions")
    sink.ship("s3", batch("g"))
    assert lake.version("predictions") == version + 1
    LakeSink(lambda model: Lake(tmp_path / "lake"), tmp_path / "lock", lambda *s: True).ship("s4", several_batch("h"))
    for _ in range(2):
        rows = sorted(lake.read("predictions").to_pylist(), key=lambda r: r["id"])
        assert [(r["id"], r["p"], r["scores"]) for r in rows] == [
            ("a", 0.5, None), ("b", 0.5, None), ("c", 0.75, None), ("d", None, [0.25, 0.75]), ("e", 0.5, None),
            ("f", None, [1, 2, 3]), ("g", 0.5, None), ("h", None, [0.25, 0.75]),
        ]  # fmt: skip
        assert lake.compact("predictions", fewest=2) or _  # merged, the rows are the same


def several_batch(*ids):
    return decode(encode(several(*ids), "r", 1.0))
