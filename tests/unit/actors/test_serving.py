"""The replica as an ASGI application in this process: routes, versions, batches, errors; no Ray."""

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import orjson
import pyarrow as pa
import pytest

from raymill.actors import asgi, wire
from raymill.actors.lake import Lake
from raymill.actors.online_reader import LookUp
from raymill.actors.prediction_sink import LakeSink
from raymill.actors.rollout import Role, Route, generation, to_user_config
from raymill.runtime.records import RecordsActor
from tests.unit.actors.serving_parts import ListSink, Reader, Records, http, model, replica

ROW = {"trip": 7, "zone": "a", "miles": 5.0}
LIVE = model((1, "live", 1.0))


@pytest.fixture
def run(tmp_path):
    """`run(test, spec, …)`: `await test(replica, client)` with a started replica, stopped afterwards."""

    def run(test, *specs, **parts):
        async def whole():
            found = await replica(tmp_path, *specs, **parts)
            try:
                async with http(found) as client:
                    return await test(found, client)
            finally:
                await asyncio.to_thread(found.stop)

        return asyncio.run(whole())

    return run


def test_rows_are_answered_in_order_and_logged(run):
    sink = ListSink()

    async def test(found, client):
        rows = [{**ROW, "id": f"i{n}", "miles": float(n)} for n in range(3)]
        return (await client.post("/predict/taxi", json={"rows": rows, "at": "2013-05-01T09:15:00Z"})).json()

    answer = run(test, LIVE, sink=sink)
    assert (answer["model"], answer["version"]) == ("taxi", 1)
    assert [p["id"] for p in answer["predictions"]] == ["i0", "i1", "i2"]
    assert [p["long"] for p in answer["predictions"]] == pytest.approx([0.1, 0.101, 0.102])
    logged = sink.rows()
    assert [r["id"] for r in logged] == ["i0", "i1", "i2"]
    assert logged[2]["x"] == [2.0, 15.0]
    assert logged[2]["p"] == pytest.approx(answer["predictions"][2]["long"])
    assert (logged[2]["key"], orjson.loads(logged[2]["row"])["miles"]) == ("[7]", 2.0)


def test_arrow_in_gives_arrow_out_and_the_same_numbers(run):
    async def test(found, client):
        body = wire.write_stream(pa.table({"zone": ["a", "b"], "miles": [1.0, 2.0], "trip": [1, 2]}))
        answer = await client.post("/predict/taxi", content=body, headers={"content-type": wire.ARROW_STREAM})
        return pa.ipc.open_stream(answer.content).read_all().to_pylist()

    assert [r["p"] for r in run(test, LIVE)] == pytest.approx([0.101, 0.102])


def test_a_retry_gets_the_same_answer_though_the_version_changed(run):
    sink = ListSink()

    async def test(found, client):
        body = {"rows": [{**ROW, "id": "a"}]}
        first = (await client.post("/predict/taxi", json=body)).json()
        await found.reconfigure(to_user_config([model((2, "live", 1.0))]))
        again = (await client.post("/predict/taxi", json=body)).json()
        fresh = (await client.post("/predict/taxi", json={"rows": [ROW]})).json()
        return first, again, fresh

    first, again, fresh = run(test, LIVE, sink=sink)
    assert first == again
    assert fresh["version"] == 2
    assert len(sink.rows()) == 2


def test_concurrent_callers_share_batches_and_get_their_own_answers(run):
    reader = Reader()

    async def ask(client, n):
        answer = await client.post("/predict/taxi", json={"rows": [{**ROW, "miles": float(n), "id": f"i{n}"}]})
        return answer.json()["predictions"][0]

    async def test(found, client):
        return await asyncio.gather(*(ask(client, n) for n in range(200)))

    answers = run(test, LIVE, reader=reader)
    assert [a["id"] for a in answers] == [f"i{n}" for n in range(200)]
    assert [a["long"] for a in answers] == pytest.approx([0.1 + n / 1000 for n in range(200)])
    assert sum(reader.batches[1:]) == 200
    assert len(reader.batches) < 150


def test_one_callers_unknown_entity_is_its_own_error(run):
    async def ask(client, zone):
        return await client.post("/predict/taxi", json={"rows": [{**ROW, "zone": zone}]})

    async def test(found, client):
        return await asyncio.gather(*(ask(client, "nowhere" if n % 5 == 0 else "a") for n in range(40)))

    answers = run(test, LIVE)
    assert [a.status_code for a in answers] == [422 if n % 5 == 0 else 200 for n in range(40)]
    assert answers[0].json()["code"] == "unknown_entity"


def test_weights_split_the_rows_and_a_header_pins(run):
    spec = model((1, "live", 0.5), (2, "canary", 0.5))

    async def test(found, client):
        body = {"rows": [{**ROW, "id": f"i{n}"} for n in range(200)]}
        split = (await client.post("/predict/taxi", json=body)).json()
        body = {"rows": [{**ROW, "id": f"j{n}"} for n in range(9)]}
        pinned = (await client.post("/predict/taxi", json=body, headers={"x-raymill-version": "2"})).json()
        lost = await client.post("/predict/taxi", json=body, headers={"x-raymill-version": "9"})
        return split, pinned, lost

    split, pinned, lost = run(test, spec)
    assert "version" not in split
    by_version = {v: [p["long"] for p in split["predictions"] if p["version"] == v] for v in (1, 2)}
    assert all(len(p) > 50 for p in by_version.values())
    assert set(np.round(by_version[2], 3)) == {0.205}
    assert pinned["version"] == 2
    assert (lost.status_code, lost.json()["code"]) == (404, "unknown_version")


def test_a_shadow_computes_and_logs_and_answers_nobody(run):
    sink = ListSink()

    async def test(found, client):
        return (await client.post("/predict/taxi", json={"rows": [ROW]})).json()

    answer = run(test, model((1, "live", 1.0), (2, "shadow", 0.0)), sink=sink)
    assert answer["version"] == 1
    assert [(r["version"], r["role"]) for r in sink.rows()] == [(1, "live"), (2, "shadow")]


def test_a_version_that_does_not_load_takes_no_traffic_and_is_told(run):
    broken = model((1, "live", 0.5), (2, "canary", 0.5))

    async def test(found, client):
        await found.reconfigure(to_user_config([broken]))
        body = {"rows": [{**ROW, "id": f"i{n}"} for n in range(50)]}
        answer = (await client.post("/predict/taxi", json=body)).json()
        told = (await client.get("/v2/models/taxi")).json()
        state = (await client.get("/raymill/replica")).json()
        unready = await client.get("/v2/models/taxi/versions/2/ready")
        return answer, told, state, unready

    answer, told, state, unready = run(test, LIVE, records=Records(2))
    assert answer["version"] == 1
    assert (told["versions"], told["failed"]) == (["1"], {"2": "ValueError: damaged"})
    assert state["generation"] == generation(to_user_config([broken]))
    assert (unready.status_code, unready.json()) == (400, {"name": "taxi", "ready": False})


def test_a_replica_whose_only_version_is_broken_says_so(run):
    async def test(found, client):
        return await client.post("/predict/taxi", json={"rows": [ROW]}), await client.get("/v2/health/ready")

    answer, ready = run(test, LIVE, records=Records(1))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert (ready.status_code, ready.json()) == (400, {"ready": False})


def test_models_load_on_a_thread_of_their_own(run):
    threads = []

    async def test(found, client):
        apply = found.models.apply
        found.models.apply = lambda config: threads.append(threading.current_thread().name) or apply(config)
        await found.reconfigure(to_user_config([model((2, "live", 1.0))]))
        return await client.post("/predict/taxi", json={"rows": [ROW]})

    assert run(test, model((1, "live", 1.0))).json()["version"] == 2
    assert threads == ["loading_0"]


def ten_times(x):
    with np.errstate(over="ignore"):
        return x[:, 0] * np.float32(10)


def test_an_answer_that_is_not_finite_is_that_callers_error(run):
    big = {"name": "features", "shape": [1, 2], "datatype": "FP32", "data": [3e38, 0]}
    small = big | {"data": [1, 0]}

    async def infer(client, tensor):
        return await client.post("/v2/models/taxi/infer", json={"inputs": [tensor]})

    async def test(found, client):
        model_ = found.models.models["taxi"]
        found.models.models["taxi"] = replace(model_, programs={1: ten_times})
        return await asyncio.gather(*(infer(client, t) for t in (small, big, small)))

    answers = run(test, LIVE)
    assert [a.status_code for a in answers] == [200, 422, 200]
    assert answers[2].json()["outputs"][0]["data"] == [10.0]


def test_a_model_that_fails_always_is_not_ready_until_it_answers_again(run):
    def fails(x):
        raise RuntimeError("its memory is gone")

    async def ask(client, count):
        for _ in range(count):
            answer = await client.post("/predict/taxi", json={"rows": [ROW]})
        return answer.status_code, (await client.get("/v2/health/ready")).status_code

    async def test(found, client):
        model_ = found.models.models["taxi"]
        well = await ask(client, 1)
        found.models.models["taxi"] = replace(model_, programs={1: fails})
        ill = await ask(client, 20)
        one = (await client.get("/v2/models/taxi/ready")).json(), (await client.get("/v2/health/live")).status_code
        found.models.models["taxi"] = model_
        return well, ill, one, await ask(client, 40)

    well, ill, one, again = run(test, LIVE)
    assert (well, ill, again) == ((200, 200), (500, 400), (200, 200))
    assert one == ({"name": "taxi", "ready": False}, 200)


def test_a_full_line_answers_429(run):
    async def ask(client):
        return (await client.post("/predict/taxi", json={"rows": [ROW] * 50})).status_code

    async def test(found, client):
        return await asyncio.gather(*(ask(client) for _ in range(20)))

    statuses = run(test, replace(LIVE, max_queue_rows=100))
    assert set(statuses) == {200, 429}


def test_what_waited_longer_than_its_timeout_is_answered_and_not_computed(run):
    class Slow(Reader):
        def vectors(self, rows, at):
            time.sleep(0.1)
            return super().vectors(rows, at)

    reader = Slow()

    async def test(found, client):
        async def ask(**headers):
            return await client.post("/predict/taxi", json={"rows": [ROW] * 2}, headers=headers)

        first = asyncio.create_task(ask())
        await asyncio.sleep(0.02)
        late = await asyncio.gather(first, ask(timeout="0.01"), ask(timeout="60"), ask())
        return late, await ask(timeout="soon")

    answers, wrong = run(test, LIVE, reader=reader)
    assert [a.status_code for a in answers] == [200, 504, 200, 200]
    assert answers[1].json()["code"] == "expired" and sum(reader.batches[1:]) == 3 * 2  # the first is the warm-up
    assert wrong.status_code == 400 and "timeout is 'soon'" in wrong.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "no_such_path"),
        ("GET", "/predict/taxi", 405, "wrong_method"),
        ("POST", "/predict/nobody", 404, "unknown_model"),
        ("POST", "/predict/taxi", 400, "request_error"),
        ("GET", "/v2/models/nobody", 404, "unknown_model"),
        ("GET", "/v2/models/taxi/versions/x", 404, "unknown_version"),
        ("GET", "/v2/models/taxi/versions/9/ready", 400, None),
        ("POST", "/v2", 405, "wrong_method"),
        ("GET", "/v2/nothing", 404, "no_such_path"),
        ("GET", "/raymill/nothing", 404, "no_such_path"),
    ],
)
def test_wrong_paths_and_bodies_get_an_error_with_code_and_remedy(run, method, path, status, code):
    async def test(found, client):
        return await client.request(method, path, content=b"{")

    answer = run(test, LIVE)
    assert answer.status_code == status
    if code:
        assert answer.json()["code"] == code
        assert answer.json()["error"]
        assert answer.json()["remedy"]
    assert answer.headers.get("allow") == {405: "GET" if path == "/v2" else "POST"}.get(status)


def test_a_large_body_is_refused_before_it_is_read(run, monkeypatch):
    monkeypatch.setattr(asgi, "MAX_BODY_BYTES", 100)

    async def chunks():
        for _ in range(50):
            yield b"x" * 10

    async def test(found, client):
        return await client.post("/predict/taxi", content=b"x" * 101), await client.post(
            "/predict/taxi", content=chunks()
        )

    assert [a.status_code for a in run(test, LIVE)] == [413, 413]


def test_management_is_for_this_host_alone():
    assert [asgi.is_local(p) for p in ("127.0.0.1", "::1", "", "8.8.8.8", "x")] == [True, True, True, False, False]


def test_open_inference_protocol_documents(run):
    async def test(found, client):
        paths = ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/taxi", "/v2/models/taxi/ready")
        return [(await client.get(p)).json() for p in paths]

    server, live, ready, metadata, model_ready = run(test, LIVE)
    assert (set(server), live, ready) == ({"name", "version", "extensions"}, {"live": True}, {"ready": True})
    assert metadata["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 2]}]
    assert model_ready == {"name": "taxi", "ready": True}


def test_features_are_given_by_name(run):
    async def test(found, client):
        answer = await client.post("/raymill/features/taxi", json={"rows": [ROW], "at": 60_000_000})
        return pa.ipc.open_stream(answer.content).read_all().to_pylist()

    assert [(r["miles"], r["minute"]) for r in run(test, LIVE)] == [(5.0, 1.0)]


class AgedReader(Reader):
    """Tells one age, of a view that the second row is nothing to; what is above 9 miles is unknown."""

    def look_up(self, rows, at):
        x = self.vectors(rows, at)
        return LookUp(np.where(x > 9, np.nan, x), np.array([[5], [-1]])[: len(x)], ("taxi",))


def test_features_come_with_their_ages_where_that_is_asked_for(run):
    async def test(found, client):
        body = {"rows": [ROW, {**ROW, "miles": 10.0}], "at": 60_000_000}
        paths = ("?ages=1", "?ages=0", "?ages=yes")
        return [await client.post(f"/raymill/features/taxi{p}", json=body) for p in paths]

    with_ages, without, wrong = run(test, LIVE, reader=AgedReader())
    rows = pa.ipc.open_stream(with_ages.content).read_all().to_pylist()
    assert [(r["miles"], r["minute"], r["age_us:taxi"]) for r in rows] == [(5.0, 1.0, 5), (None, 1.0, None)]
    assert "age_us:taxi" not in pa.ipc.open_stream(without.content).read_all().column_names
    assert (wrong.status_code, "ages='yes'" in wrong.text) == (400, True)


def test_inputs_that_come_with_the_request_have_no_ages(run):
    async def test(found, client):
        return await client.post("/raymill/features/taxi?ages=1", json={"rows": [ROW], "at": 60_000_000})

    answer = run(test, LIVE)
    assert (answer.status_code, "have no ages" in answer.text) == (400, True)


def test_what_is_recorded_can_be_read(run, tmp_path):
    records = RecordsActor(tmp_path)
    records.start()
    version = records.register("taxi", "model", b"d1", None, "t1", {"auc": 0.75}, 0.5)
    records.promote("taxi", 1, reason="first")
    spec = model(plan=None)
    route = Route(version=1, digest=version.digest, role=Role.LIVE)
    lake = Lake(tmp_path / "lake")
    sink = LakeSink(lambda model: lake, tmp_path / "lock", lambda *_: False)
    tensor = {"name": "features", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}

    async def test(found, client):
        answer = (await client.post("/v2/models/taxi/infer", json={"inputs": [tensor]})).json()
        name = answer["parameters"]["prediction_id"]
        paths = ("models", "models?model=nobody", "drift", "cost", f"lineage/{name}", "lineage/nothing")
        return [await client.get(f"/raymill/{p}") for p in paths]

    models, nobody, drift, cost, lineage, nothing = run(
        test, replace(spec, routes=(route,)), records=records, sink=sink
    )
    assert [(v["version"], v["stage"], v["metrics"]) for v in models.json()] == [(1, "live", {"auc": 0.75})]
    assert (nobody.status_code, nobody.json()["code"]) == (404, "unknown_model")
    assert (drift.json(), cost.json()["bill_usd"]) == ([], 0.0)
    assert (lineage.json()["version"]["digest"], lineage.json()["prediction"]["version"]) == (version.digest, 1)
    assert (nothing.status_code, nothing.json()["code"]) == (404, "unknown_prediction")
    records.stop()


def test_an_id_that_two_replicas_are_asked_gets_one_answer_and_is_logged_once(tmp_path):
    spec = model((1, "live", 0.5), (2, "canary", 0.5))
    lake = Lake(tmp_path / "lake")
    body = {"rows": [{**ROW, "id": f"i{n}"} for n in range(40)], "at": "2013-05-01T09:15:00Z"}

    async def whole():
        sinks = [LakeSink(lambda name: lake, tmp_path / "lock", lambda *segment: True) for _ in range(2)]
        replicas = [await replica(tmp_path, spec, sink=sink) for sink in sinks]
        answers = []
        for found in replicas:
            async with http(found) as client:
                answers.append((await client.post("/predict/taxi", json=body)).json())
        for found in replicas:
            await asyncio.to_thread(found.stop)
        return answers

    first, second = asyncio.run(whole())
    assert first == second
    assert {p["version"] for p in first["predictions"]} == {1, 2}
    logged = lake.read("predictions", columns=["id", "version"]).to_pylist()
    assert sorted(logged, key=lambda r: r["id"]) == sorted(
        ({"id": p["id"], "version": p["version"]} for p in first["predictions"]), key=lambda r: r["id"]
    )
