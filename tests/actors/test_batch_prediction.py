"""A batch job on Ray Data's actors, one of which is killed in the middle of it."""

import os
import signal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import ray
from deltalake import write_deltalake

from raymill.actors.batch_duplicates import note_duplicates
from raymill.actors.batch_job import plan_job, run_job
from raymill.actors.batch_output import Output
from raymill.actors.batch_plan import BatchRequest
from raymill.actors.batch_worker import BatchWorker
from raymill.actors.rollout import ModelSpec, Role, Route
from raymill.runtime.errors import Conflict, ContractError, ModelError
from raymill.runtime.home import Home
from raymill.runtime.records import NAME, RecordsActor
from raymill.runtime.spawn import ask, find, spawn
from tests.actors import s3_server

xgboost = pytest.importorskip("xgboost")
FILES, ROWS = 24, 500
INPUTS = ("a", "b", "c")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A home with a model of two versions, the second damaged; and what its first one answers."""
    home = tmp_path_factory.mktemp("home") / "raymill"
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
    spawn(RecordsActor, str(home), name=NAME)
    x = np.random.default_rng(0).normal(size=(FILES * ROWS, 3)).astype(np.float32)
    booster = xgboost.train({"objective": "binary:logistic", "nthread": 1}, xgboost.DMatrix(x, x[:, 0] > x[:, 1]), 20)
    routes = []
    for i, program in enumerate((bytes(booster.save_raw("ubj")), b"{damaged")):
        call = find(NAME).register.remote("trees", "model", program, None, f"t{i}", {}, 0.5)
        version = ask(call)
        routes.append(Route(version=version.version, digest=version.digest, role=Role.LIVE, weight=1.0 - i))
    yield Home(home), ModelSpec(name="trees", label="p", inputs=INPUTS, routes=tuple(routes)), x, booster
    ray.shutdown()


def write_table(folder, x):
    folder.mkdir()
    for i in range(FILES):
        part = x[i * ROWS : (i + 1) * ROWS]
        pq.write_table(pa.table({name: part[:, j] for j, name in enumerate(INPUTS)}), folder / f"{i:03d}.parquet")
    return str(folder)


def workers():
    """Processes of the workers, of this test's cluster alone."""
    mine = {p.pid for p in psutil.Process().children(recursive=True)}
    titles = ((p.pid, " ".join(p.cmdline())) for p in psutil.process_iter() if p.pid in mine)
    return [pid for pid, title in titles if "_Answering" in title]


def test_a_killed_worker_costs_no_row_and_doubles_none_and_the_job_is_done_once(served, tmp_path):
    home, model, x, booster = served
    request = BatchRequest(table=write_table(tmp_path / "rows", x), out=str(tmp_path / "out"))
    plan = plan_job(model, model.routes[0], request, home)
    killed = []

    def kill_one(done, of):
        if not killed and (pids := workers()):
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    summary = run_job(plan, home, workers=2, on_piece=kill_one)
    assert killed and (summary.rows, summary.rejected, summary.parts) == (FILES * ROWS, 0, FILES)
    answers = pads.dataset(request.out, format="parquet").to_table()
    wanted = booster.inplace_predict(x)
    assert answers["p"].to_numpy().tobytes() == wanted.tobytes()
    assert len(set(answers["id"].to_pylist())) == FILES * ROWS
    again = run_job(plan_job(model, None, request, home), home)
    assert (again.rows, again.answered_now, again.job) == (FILES * ROWS, 0, summary.job)


@pytest.mark.soak  # as many workers are started again; what they raise is in the unit tests
def test_what_goes_wrong_in_a_worker_is_told_as_it_is(served, tmp_path):
    home, model, x, _ = served
    table = write_table(tmp_path / "rows", x)
    broken = plan_job(model, model.routes[1], BatchRequest(table=table, out=str(tmp_path / "broken")), home)
    with pytest.raises(ModelError, match="version 2 of model 'trees' can not be loaded"):
        run_job(broken, home, workers=1)
    plan = plan_job(model, None, BatchRequest(table=table, out=str(tmp_path / "out")), home)
    (tmp_path / "rows" / "005.parquet").write_bytes(b"no longer a table")
    with pytest.raises(ContractError, match=r"005.parquet is not what it was"):
        run_job(plan, home, workers=1)
    assert not (tmp_path / "out" / "_manifest.json").exists()


def test_a_table_in_a_bucket_is_answered_into_a_bucket(served, tmp_path, monkeypatch):
    home, model, x, booster = served
    program = bytes(booster.save_raw("ubj"))
    table = pa.table({name: x[:2000, j] for j, name in enumerate(INPUTS)})
    with s3_server.running() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        options = {**server.environment, "aws_allow_http": "true"}
        write_deltalake(server.url("rows"), table, storage_options=options)
        request = BatchRequest(table=server.url("rows"), out=server.url("out"))
        for left in (2000, 0):  # the second time all of it is there
            plan = plan_job(model, model.routes[0], request, home)
            assert note_duplicates(plan.pieces, Output(request.out)) == 0
            done = [BatchWorker(home, plan, fetch=lambda digest: program).answer(piece) for piece in plan.pieces]
            assert (sum(d.rows for d in done), sum(d.now for d in done)) == (2000, left)
        filesystem, root = pafs.FileSystem.from_uri(request.out)
        answers = pads.dataset(root, filesystem=filesystem, format="parquet").to_table()
        assert answers["p"].to_numpy().tobytes() == booster.inplace_predict(x[:2000]).tobytes()
        with pytest.raises(Conflict, match="something else"):
            plan_job(model, model.routes[0], BatchRequest(table=request.table, out=server.url("rows")), home)
