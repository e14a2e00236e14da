"""Batch prediction without Ray: the job's plan and one worker, against the endpoint's own answers."""

import asyncio
import io
import json
import os
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import write_deltalake

from raymill.actors import batch_duplicates, batch_input, batch_worker, envelope, surroundings
from raymill.actors.batch_duplicates import note_duplicates
from raymill.actors.batch_job import plan_job
from raymill.actors.batch_output import Output
from raymill.actors.batch_plan import BatchPlan, BatchRequest
from raymill.actors.batch_worker import BatchWorker
from raymill.actors.entities import key_hashes
from raymill.actors.envelope import Envelope
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.online import OnlineStore
from raymill.actors.rollout import ColumnForm, ModelSpec, Role, Route, to_user_config
from raymill.actors.serving import ServingReplica
from raymill.actors.wire import ARROW_STREAM, write_stream
from raymill.runtime import Col, FeatureView, OnDemand, Source, col
from raymill.runtime.errors import Conflict, ContractError, ModelError, RequestError
from raymill.runtime.home import Home
from tests.unit.actors.serving_parts import ListSink, http
from tests.unit.actors.test_load_notes import ended, started
from tests.unit.actors.test_model_files import FUNCTION, X, Y, lightgbm_model

xgboost = pytest.importorskip("xgboost")

AT = 1_367_000_000_000_000
UTC = pa.timestamp("us", "UTC")
TRIPS = Source(
    "trips",
    key=["trip"],
    time="start",
    schema={
        "trip": Col("int64"),
        "zone": Col("string"),
        "start": Col("timestamp"),
        "miles": Col("float64", nullable=False),
    },
)
VIEWS = [
    FeatureView("zone", TRIPS, entity="zone", features={"mean": col("miles").mean("1d")}, required=True),
    OnDemand("trip", features={"miles": col("miles") * 1.0}),
]
PLAN = FeaturePlan.of_views(VIEWS, TRIPS, name="taxi")
EVENTS = 2000


def events():
    rng = np.random.default_rng(1)
    return pa.table(
        {
            "trip": np.arange(EVENTS),
            "zone": [f"z{i}" for i in rng.integers(0, 7, EVENTS)],
            "start": pa.array(AT + np.sort(rng.integers(0, 3_600_000_000, EVENTS)), UTC),
            "miles": rng.normal(3, 1, EVENTS),
        }
    )


@pytest.fixture(scope="module")
def programs():
    x = np.random.default_rng(2).normal(3, 1, (500, 2)).astype(np.float32)
    settings = {"objective": "binary:logistic", "nthread": 1}
    boosters = {d: xgboost.train(settings, xgboost.DMatrix(x, x.sum(axis=1) > 6), n) for d, n in (("d1", 3), ("d2", 9))}
    return {digest: bytes(booster.save_raw("ubj")) for digest, booster in boosters.items()}


@pytest.fixture
def home(tmp_path):
    found = Home(tmp_path / "home")
    Lake(found.lake).append("trips", events(), batch_id="b")
    return found


def taxi(**changes):
    fields = {
        "label": "long",
        "inputs": PLAN.names,
        "routes": (
            Route(version=1, digest="d1", role=Role.LIVE),
            Route(version=2, digest="d2", role=Role.CANARY, weight=0.5),
        ),
        "plan": PLAN.to_json(),
        "columns": {c: ColumnForm(f.dtype, f.nullable) for c, f in TRIPS.schema.items()},
        "required": PLAN.request_columns,
        "key": ("trip",),
        "max_batch_rows": 16,
    }
    return ModelSpec(name="taxi", **(fields | changes))


def vectors_only():
    return taxi(plan=None, columns={}, required=(), key=())


def vectors_only_of(inputs, **changes):
    routes = (Route(version=1, digest="d1", role=Role.LIVE),)
    return replace(vectors_only(), inputs=inputs, routes=routes, **changes)


def asked(count=100):
    rng = np.random.default_rng(3)
    return pa.table(
        {
            "id": [f"r{i}" for i in range(count)],
            "at": pa.array(AT + rng.integers(3_600_000_000, 7_200_000_000, count), UTC),
            "zone": [f"z{i}" for i in rng.integers(0, 7, count)],
            "miles": rng.normal(3, 1, count),
            "comment": ["what no model knows"] * count,
        }
    )


def request_of(tmp_path, table, **changes):
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    return BatchRequest(**({"table": str(path), "out": str(tmp_path / "out")} | changes))


def work(plan, home, programs, sink=None):
    note_duplicates(plan.pieces, Output(plan.request.out))
    worker = BatchWorker(home, plan, fetch=programs.__getitem__, load=surroundings.load_program, sink=sink)
    return [worker.answer(piece) for piece in plan.pieces]


def answers(request):
    return pads.dataset(request.out, format="parquet").to_table()


def rejects(request):
    return pads.dataset(f"{request.out}/_rejects", format="parquet").to_table().to_pylist()


def endpoint_answers(home, spec, path, body, programs, **headers):
    """What the endpoint's own application answers."""

    async def ask():
        records = type("Records", (), {"program": staticmethod(programs.__getitem__)})
        replica = ServingReplica(home.root, records=records, sink=ListSink())
        replica.start()
        await replica.reconfigure(to_user_config([spec]))
        async with http(replica) as client:
            answer = await client.post(path, content=body, headers=headers)
        replica.stop()
        assert answer.status_code == 200, answer.text
        return answer

    return asyncio.run(ask())


def test_a_batch_job_answers_as_the_endpoint_does_bit_for_bit(tmp_path, home, programs):
    OnlineStore(home.online, PLAN).ingest("trips", events())
    rows = asked()
    headers = {"content-type": ARROW_STREAM, "x-raymill-version": "1"}
    body = write_stream(rows.drop_columns(["comment"]))
    theirs = endpoint_answers(home, taxi(), "/predict/taxi", body, programs, **headers)
    theirs = pa.ipc.open_stream(theirs.content).read_all()
    request = request_of(tmp_path, rows, keep=("miles",))
    work(plan_job(taxi(), None, request, home), home, programs)
    mine = answers(request)
    assert mine.column_names == ["id", "version", "p", "miles"]
    assert mine.select(["id", "version", "p"]).equals(theirs.replace_schema_metadata(None))
    assert mine["miles"].equals(rows["miles"]) and len(set(mine["p"].to_pylist())) > 4


def test_ready_vectors_are_answered_as_by_the_open_inference_protocol(tmp_path, home, programs):
    x = np.random.default_rng(4).normal(3, 1, (50, 2))
    x[::9, 1] = np.nan
    table = pa.table({name: pa.array(x[:, j], from_pandas=True) for j, name in enumerate(PLAN.names)})
    tensor = {"name": "features", "shape": [50, 2], "datatype": "FP32", "parameters": {"binary_data_size": 400}}
    head = json.dumps({"inputs": [tensor]}).encode()
    body = head + x.astype("<f4").tobytes()
    headers = {"inference-header-content-length": str(len(head)), "x-raymill-version": "2"}
    theirs = endpoint_answers(home, vectors_only(), "/v2/models/taxi/infer", body, programs, **headers)
    request = request_of(tmp_path, table)
    route = next(r for r in vectors_only().routes if r.version == 2)
    work(plan_job(vectors_only(), route, request, home), home, programs)
    mine = answers(request)
    assert set(mine["version"].to_pylist()) == {2}
    assert mine["p"].to_pylist() == theirs.json()["outputs"][0]["data"]


def spoilt():
    """Rows, some of which the endpoint refuses, each for another reason."""
    rows = asked(40).to_pylist()
    rows[3]["miles"] = None
    rows[11]["zone"] = "nowhere"
    rows[17]["at"] = None  # no fault: it is answered as of the job's moment
    rows[20]["id"] = "r19"
    rows[25]["id"] = ""
    return pa.Table.from_pylist(rows, asked(1).schema)


def test_a_bad_row_is_rejected_with_the_endpoints_reason_and_harms_no_other(tmp_path, home, programs):
    request = request_of(tmp_path, spoilt())
    [done] = work(plan_job(taxi(), None, request, home), home, programs)
    bad = {r["row"]: (r["code"], r["reason"]) for r in rejects(request)}
    assert {row: code for row, (code, _) in bad.items()} == {
        3: "contract_error", 11: "unknown_entity", 20: "request_error", 25: "request_error"
    }  # fmt: skip
    assert "'miles' is null" in bad[3][1] and "zone='nowhere' was never seen" in bad[11][1]
    assert json.loads(rejects(request)[0]["data"])["zone"].startswith("z")
    kept = [i for i in range(40) if i not in bad]
    assert (done.rows, done.rejected) == (36, 4)
    assert answers(request)["id"].to_pylist() == [spoilt()["id"][i].as_py() for i in kept]
    whole = BatchRequest(table=request.table, out=str(tmp_path / "whole"))
    pq.write_table(asked(40).take([i for i in kept if i != 17]), tmp_path / "rows.parquet")
    work(plan_job(taxi(), None, whole, home), home, programs)
    theirs = dict(zip(*answers(whole).select(["id", "p"]).to_pydict().values(), strict=True))
    mine = dict(zip(*answers(request).select(["id", "p"]).to_pydict().values(), strict=True))
    assert theirs == {k: v for k, v in mine.items() if k != "r17"}


def test_the_first_row_of_an_id_is_answered_whoever_comes_first_and_the_others_are_told(
    tmp_path, home, programs, monkeypatch
):
    monkeypatch.setattr(batch_input, "PART_ROWS", 8)
    monkeypatch.setattr(batch_input, "PIECE_ROWS", 20)
    monkeypatch.setattr(batch_worker, "PART_ROWS", 8)
    rows = asked()
    ids = rows["id"].to_pylist()
    for row, other in ((3, 2), (9, 1), (41, 1), (99, 70)):  # of one part, of parts, of pieces
        ids[row] = ids[other]
    ids[50], ids[60] = None, None
    rows = rows.set_column(0, "id", pa.array(ids))
    told = {3: 2, 9: 1, 41: 1, 99: 70}
    found = []
    for order in (1, -1):
        request = request_of(tmp_path, rows, out=str(tmp_path / f"out{order}"))
        pq.write_table(rows, request.table, row_group_size=10)
        plan = plan_job(taxi(), None, request, home, job="j")
        note_duplicates(plan.pieces, Output(request.out))
        worker = BatchWorker(home, plan, fetch=programs.__getitem__, load=surroundings.load_program)
        done = [worker.answer(piece) for piece in plan.pieces[::order]]
        assert [sum(getattr(d, n) for d in done) for n in ("rows", "rejected", "duplicates")] == [96, 4, 4]
        why = {r["row"]: r["reason"] for r in rejects(request)}
        assert why == {
            row: f"row {first} of {request.table} has the same 'id': give each its own" for row, first in told.items()
        }
        found.append(answers(request))
    assert found[0]["id"].to_pylist() == [id_ or f"j/{i // 20}/{i}" for i, id_ in enumerate(ids) if i not in told]
    assert found[0].equals(found[1])


@pytest.mark.parametrize("bound", [batch_duplicates.IN_MEMORY, 50])
def test_of_ids_in_any_number_of_files_all_that_come_again_are_found_and_no_other(tmp_path, monkeypatch, bound):
    """Against a dictionary; with hashes so bad that most are the same, in memory and on disk."""
    monkeypatch.setattr(batch_duplicates, "IN_MEMORY", bound)
    monkeypatch.setattr(batch_duplicates, "key_hashes", lambda rows, *how: key_hashes(rows, *how) % 17)
    rng = np.random.default_rng(5)
    (tmp_path / "rows").mkdir()
    wanted, seen = [], {}
    for i in range(12):
        ids = [None if n % 7 == 0 else int(n) for n in rng.integers(0, 300, 40)]
        file = f"{tmp_path}/rows/{i:02d}.{'csv' if i % 3 else 'parquet'}"
        table = pa.table({"id": pa.array(ids), "other": range(40)})
        table = table.drop_columns(["id"]) if i == 5 else table
        (pacsv.write_csv if i % 3 else pq.write_table)(table, file)
        for row, one in enumerate([] if i == 5 else ids):
            if one is not None and seen.setdefault(one, (file, row)) != (file, row):
                wanted.append({"piece": i, "row": row, "first_file": seen[one][0], "first_row": seen[one][1]})
    pieces = batch_input.pieces_of(str(tmp_path / "rows"), None)
    assert len(wanted) > 50 and batch_duplicates.find_duplicates(pieces).to_pylist() == wanted


def test_a_row_whose_answer_is_not_finite_is_rejected_alone(tmp_path, home):
    def program(x):
        return np.where(x[:, 0] > 5, np.nan, np.nan_to_num(x[:, 0])).astype(np.float32)

    table = pa.table({name: np.arange(8.0) for name in PLAN.names})
    request = request_of(tmp_path, table)
    plan = plan_job(vectors_only(), None, request, home)
    note_duplicates(plan.pieces, Output(request.out))
    BatchWorker(home, plan, fetch=lambda digest: b"", load=lambda data: program).answer(plan.pieces[0])
    assert answers(request)["p"].to_pylist() == [0, 1, 2, 3, 4, 5]
    assert [(r["row"], r["code"]) for r in rejects(request)] == [(6, "contract_error"), (7, "contract_error")]


def test_a_table_that_is_not_the_models_is_refused_before_anything_is_computed(tmp_path, home):
    for table, why in (
        (asked().drop_columns(["zone"]), "'zone'"),
        (asked().set_column(3, "miles", pa.array(["far"] * 100)), "'miles' is string"),
        (asked().slice(0, 0), "no rows"),
    ):
        with pytest.raises(ContractError if len(table) else RequestError, match=why):
            plan_job(taxi(), None, request_of(tmp_path, table), home)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="no live version"):
        plan_job(taxi(routes=()), None, request_of(tmp_path, asked()), home)


def test_the_same_again_goes_on_where_it_was_and_gives_the_same(tmp_path, home, programs, monkeypatch):
    monkeypatch.setattr(batch_input, "PART_ROWS", 8)
    monkeypatch.setattr(batch_input, "PIECE_ROWS", 20)
    monkeypatch.setattr(batch_worker, "PART_ROWS", 8)
    request = request_of(tmp_path, asked().drop_columns(["id"]))
    pq.write_table(asked().drop_columns(["id"]), request.table, row_group_size=10)
    plan = plan_job(taxi(), None, request, home)
    assert [p.groups for p in plan.pieces] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    work(plan, home, programs)
    first = answers(request)
    assert first["id"].to_pylist() == [f"{plan.job}/{i // 20}/{i}" for i in range(100)]
    # Killed in the middle: of one piece nothing is left, of another a part and no word that it is done.
    for lost in ("part-000001-0000", "part-000001-0001", "part-000001-0002", "part-000003-0002"):
        (tmp_path / "out" / f"{lost}.parquet").unlink()
    for lost in (1, 3):
        (tmp_path / "out" / "_pieces" / f"{lost:06d}.json").unlink()
    Lake(home.lake).append("trips", events().slice(0, 5), batch_id="later")  # the lake goes on meanwhile
    promoted = taxi(routes=(Route(version=2, digest="d2", role=Role.LIVE),))
    again = plan_job(promoted, None, request, home)
    assert again == plan
    done = work(again, home, programs)
    assert [d.now for d in done] == [0, 20, 0, 4, 0] and [d.rows for d in done] == [20] * 5
    assert answers(request).equals(first)


def test_a_plan_that_was_being_written_is_no_job_and_of_two_that_begin_one_goes_by_the_others(tmp_path, home, programs):
    request = request_of(tmp_path, asked())
    (tmp_path / "out").mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "out" / f"._plan.json.{ended.pid}").write_text("{")
    plan = plan_job(taxi(), None, request, home)
    mine = replace(plan, job="another")
    assert (
        not Output(request.out).create("_plan.json", mine.to_json()) and plan_job(taxi(), None, request, home) == plan
    )
    work(plan, home, programs)
    (tmp_path / "out" / f".part-000000-0000.parquet.{os.getpid()}").write_text("of a process that lives")
    Output(request.out).sweep()
    assert [p.name for p in (tmp_path / "out").glob(".*")] == [f".part-000000-0000.parquet.{os.getpid()}"]


def test_a_folder_of_another_job_or_of_something_else_is_refused(tmp_path, home):
    request = request_of(tmp_path, asked())
    plan_job(taxi(), None, request, home)
    with pytest.raises(Conflict, match="at=None, not 'start'"):
        plan_job(taxi(), None, replace(request, at="start"), home)
    with pytest.raises(Conflict, match="version=1, not 2"):
        plan_job(taxi(), taxi().routes[1], request, home)
    with pytest.raises(Conflict, match="something else"):
        plan_job(taxi(), None, replace(request, out=str(tmp_path)), home)


def test_a_file_that_changed_meanwhile_is_told(tmp_path, home, programs):
    request = request_of(tmp_path, asked())
    plan = plan_job(taxi(), None, request, home)
    pq.write_table(asked(7), request.table)
    with pytest.raises(ContractError, match="not what it was"):
        work(plan, home, programs)


def test_a_version_that_does_not_load_ends_the_job_before_a_row(tmp_path, home):
    plan = plan_job(taxi(), None, request_of(tmp_path, asked()), home)
    with pytest.raises(ModelError, match="version 1 of model 'taxi' can not be loaded"):
        work(plan, home, {"d1": b"{damaged"})


def test_a_version_that_ends_its_worker_ends_no_second_one_but_the_job(tmp_path, home):
    plan = plan_job(taxi(), None, request_of(tmp_path, asked()), home)
    deadly = {"d1": envelope.pack(Envelope(form="code", target="code:ask", source="import os\nos.abort()"))}
    assert ended(started(lambda: work(plan, home, deadly))) == -signal.SIGABRT
    with pytest.raises(ModelError, match=r"can not be loaded: .*DeadlyModel: .*a worker of batch job .*alone: SIGABRT"):
        work(plan, home, deadly)


def test_csv_arrow_folders_and_delta_tables_say_the_same(tmp_path, home, programs):
    rows = asked(60)
    work(plan_job(taxi(), None, (parquet := request_of(tmp_path, rows)), home), home, programs)
    wanted = answers(parquet)
    pacsv.write_csv(rows, tmp_path / "rows.csv")
    (tmp_path / "folder").mkdir()
    for i in range(3):
        with pa.ipc.new_file(tmp_path / "folder" / f"{i}.arrow", rows.schema) as writer:
            writer.write_table(rows.slice(20 * i, 20))
    write_deltalake(tmp_path / "delta", rows)
    write_deltalake(tmp_path / "delta", rows, mode="append")
    for name, version in (("rows.csv", None), ("folder", None), ("delta", 0)):
        request = BatchRequest(table=str(tmp_path / name), out=str(tmp_path / f"out-{name}"), delta_version=version)
        plan = plan_job(taxi(), None, request, home)
        assert BatchPlan.from_json(plan.to_json(), "") == plan
        work(plan, home, programs)
        assert answers(request).equals(wanted), name


def test_one_bad_cell_of_csv_costs_its_row(tmp_path, home, programs):
    text = "zone,miles,at\nz1,1.5,2013-04-26T21:00:00Z\nz1,far,2013-04-26T21:00:00Z\nz2,2,2013-04-26\n"
    (tmp_path / "rows.csv").write_text(text)
    request = BatchRequest(table=str(tmp_path / "rows.csv"), out=str(tmp_path / "out"))
    [done] = work(plan_job(taxi(), None, request, home), home, programs)
    assert (done.rows, [r["row"] for r in rejects(request)]) == (1, [1, 2])


def test_answers_are_logged_once_if_that_was_asked_for(tmp_path, home, programs):
    sink = ListSink()
    request = request_of(tmp_path, asked(), log=True)
    plan = plan_job(taxi(), None, request, home, job="j")
    work(plan, home, programs, sink)
    (tmp_path / "out" / "part-000000-0000.parquet").unlink()
    (tmp_path / "out" / "_pieces" / "000000.json").unlink()
    work(plan, home, programs, sink)
    assert list(sink.segments) == ["batch-j-part-000000-0000.parquet"]  # which the lake takes once
    logged, answered = sink.rows(), answers(request).select(["id", "p"]).to_pydict()
    assert [(r["id"], r["p"]) for r in logged] == list(zip(*answered.values(), strict=True))
    assert logged[0]["replica"] == "batch/j" and len(logged[0]["x"]) == 2 and json.loads(logged[0]["row"])["zone"]
    quiet = ListSink()
    work(plan_job(taxi(), None, replace(request, log=False, out=str(tmp_path / "quiet")), home), home, programs, quiet)
    assert quiet.segments == {}


def fitted():
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression().fit(X, Y)


def scikit_model():
    import skops.io

    return skops.io.dumps(fitted())


def onnx_model():
    import skl2onnx

    return skl2onnx.to_onnx(fitted(), X[:1], options={"zipmap": False}).SerializeToString()


KINDS = {
    "xgboost": lambda: bytes(xgboost.train({"nthread": 1}, xgboost.DMatrix(X, X[:, 0]), 4).save_raw("ubj")),
    "lightgbm": lambda: lightgbm_model().model_to_string().encode(),
    "several classes": lambda: lightgbm_model(objective="multiclass", num_class=3).model_to_string().encode(),
    "scikit-learn": scikit_model,
    "onnx": onnx_model,
    "code": lambda: envelope.pack(Envelope(form="code", target="mine:ask", source=FUNCTION)),
}


def exported_net():
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1), torch.nn.Flatten(0))
    program = torch.export.export(net, (torch.zeros(4, 3),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    out = io.BytesIO()
    torch.export.save(program, out)
    return out.getvalue()


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("torch.export", marks=pytest.mark.soak)])
def test_every_kind_of_model_answers_as_at_the_endpoint(kind, tmp_path, home):
    x = X[:200]
    spec = vectors_only_of(("a", "b", "c"), max_batch_rows=256)
    programs = {"d1": KINDS.get(kind, exported_net)()}
    tensor = {"name": "features", "shape": [200, 3], "datatype": "FP32", "parameters": {"binary_data_size": 2400}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    theirs = endpoint_answers(home, spec, "/v2/models/taxi/infer", head + x.tobytes(), programs, **headers)
    request = request_of(tmp_path, pa.table({name: x[:, j] for j, name in enumerate("abc")}))
    work(plan_job(spec, None, request, home), home, programs)
    mine = np.array(answers(request)["p"].to_pylist(), np.float32)
    assert mine.shape == ((200, 3) if kind == "several classes" else (200,))
    assert mine.tobytes() == theirs.content[int(theirs.headers["inference-header-content-length"]) :]
    assert len(np.unique(mine)) > 2
