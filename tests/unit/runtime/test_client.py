"""The notebook's client: ids, retries, errors; against a stand-in for the endpoint."""

import json
import subprocess
import sys
from datetime import UTC, datetime

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from raymill.runtime import client as client_module
from raymill.runtime.client import ARROW_STREAM, Client
from raymill.runtime.errors import (
    ContractError,
    Forbidden,
    ModelError,
    NoSuchPath,
    Overloaded,
    RequestError,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from raymill.runtime.ids import new_ids


class Server:
    """Answers 0.5 to every row after `before` (statuses, or exceptions) has been used up; keeps what it was sent."""

    def __init__(self, *before):
        self.before, self.sent = list(before), []

    def __call__(self, request):
        table = self.rows(request)
        self.sent.append(table)
        if self.before:
            first = self.before.pop(0)
            if isinstance(first, Exception):
                raise first
            return first
        ids = table.column("id")
        answer = pa.table(
            {"id": ids, "version": pa.array([1] * len(ids)), "p": pa.array([0.5] * len(ids), pa.float32())}
        )
        return httpx.Response(200, content=write(answer))

    @staticmethod
    def rows(request):
        if request.headers["content-type"] == ARROW_STREAM:
            return pa.ipc.open_stream(request.content).read_all()
        document = json.loads(request.content)
        return pa.Table.from_pylist([{"at": document["at"], **row} for row in document["rows"]])


def write(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def told(status, code, **headers):
    return httpx.Response(status, json={"error": "why", "code": code, "remedy": "what"}, headers=headers)


def make(server, deadline_s=5.0):
    return Client("http://endpoint", deadline_s=deadline_s, transport=httpx.MockTransport(server))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_S", 0.001)


def test_what_is_sent_again_has_the_same_ids_and_the_same_moment():
    undeployed = httpx.Response(404, text="Path '/predict/m' not found. Ping http://.../-/routes")
    proxy = httpx.Response(500, text="proxy")
    server = Server(httpx.ConnectError("refused"), proxy, told(429, "overloaded"), undeployed)
    client = make(server)
    answer = client.predict("m", [{"a": 1}, {"a": 2}])
    assert client.retried == 4
    assert all(t.equals(server.sent[0]) for t in server.sent)
    assert answer.column("id").to_pylist() == server.sent[0].column("id").to_pylist()


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (told(422, "contract_error"), ContractError),
        (told(404, "unknown_model"), UnknownModel),
        (told(404, "no_such_path"), NoSuchPath),
        (told(500, "model_error"), ModelError),
        (httpx.Response(400, text="<html>"), RequestError),
    ],
)
def test_an_error_that_would_come_again_is_raised_as_our_own_at_once(reply, error):
    server = Server(reply)
    with pytest.raises(error) as caught:
        make(server).predict("m", [{"a": 1}])
    assert type(caught.value) is error
    assert len(server.sent) == 1


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (httpx.ConnectError("refused"), Unavailable),
        (told(429, "overloaded"), Overloaded),
        (told(503, "x"), Unavailable),
    ],
)
def test_after_the_deadline_the_last_error_is_raised(reply, error):
    with pytest.raises(error):
        make(Server(*[reply] * 1000), deadline_s=0.05).predict("m", [{"a": 1}])


def test_tables_frames_and_dicts_are_sent_alike():
    moment = datetime(2013, 5, 1, tzinfo=UTC)
    for rows in ([{"a": 1}], pa.table({"a": [1]}), pd.DataFrame({"a": [1]}), pa.record_batch({"a": [1]})):
        for at in (moment, "2013-05-01T00:00:00Z", round(moment.timestamp() * 1e6)):
            server = Server()
            make(server).predict("m", rows, at=at, ids=["x"])
            row = server.sent[0].to_pylist()[0]
            assert (row["id"], row["a"]) == ("x", 1)
            assert row["at"] in (moment, round(moment.timestamp() * 1e6), "2013-05-01T00:00:00Z")


def test_a_row_keeps_its_own_id_and_moment():
    server = Server()
    make(server).predict("m", [{"a": 1, "id": "mine", "at": 5}, {"a": 2}], at=7)
    first, second = server.sent[0].to_pylist()
    assert (first["id"], first["at"]) == ("mine", 5)
    assert second["id"] != "mine"


def test_what_is_unknown_goes_as_null_and_infinity_is_told():
    server = Server()
    rows = [{"a": float("nan"), "b": 1.0}, {"a": 2.0, "b": np.float32("nan")}]
    make(server).predict("m", rows)  # JSON has no NaN: the endpoint would refuse the body
    assert [(r["a"], r["b"]) for r in server.sent[0].to_pylist()] == [(None, 1.0), (2.0, None)]
    with pytest.raises(RequestError, match="infinity"):
        make(server).predict("m", [{"a": float("inf")}])


def test_many_rows_go_in_several_requests_and_come_back_in_order(monkeypatch):
    monkeypatch.setattr(client_module, "CHUNK_ROWS", 10)
    ids = new_ids(25)
    for rows in (pa.table({"a": range(25)}), [{"a": n} for n in range(25)]):
        server = Server()
        assert make(server).predict("m", rows, ids=ids).column("id").to_pylist() == ids
        assert [t.num_rows for t in server.sent] == [10, 10, 5]


def test_no_rows_are_no_request():
    assert make(Server()).predict("m", []).num_rows == 0


def test_wrong_arguments_are_told_before_anything_is_sent():
    server = Server()
    for rows, at, ids in (
        ([{"a": 1}], None, ["x", "y"]),
        ([{"a": 1}], datetime(2013, 5, 1), None),
        (pa.table({"a": [1]}), "yesterday", None),
        ([{"a": object()}], None, None),
    ):
        with pytest.raises(RequestError):
            make(server).predict("m", rows, at=at, ids=ids)
    assert server.sent == []


def test_ids_are_unique_sorted_by_time_and_26_letters():
    ids = new_ids(10_000)
    assert len(set(ids)) == 10_000
    assert {len(i) for i in ids} == {26}
    assert new_ids(1)[0][:10] >= ids[0][:10]


def test_the_client_imports_neither_ray_nor_torch():
    script = "import sys, raymill.runtime.client; print([m for m in ('ray', 'torch', 'numba') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def refusing(status, code):
    def answer(request):
        answer.seen.append(request.headers.get("authorization"))
        return httpx.Response(status, json={"error": "what it says", "code": code, "remedy": "do"})

    answer.seen = []
    return answer


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(401, "unauthenticated", Unauthenticated), (403, "forbidden", Forbidden), (403, "", Forbidden)],
)
def test_a_key_is_sent_and_its_refusal_is_told_and_not_tried_again(status, code, kind):
    server = refusing(status, code)
    with (
        Client("https://mill", key="rm_mine", transport=httpx.MockTransport(server)) as client,
        pytest.raises(kind, match="what it says"),
    ):
        client.predict("m", [{"x": 1}])
    assert server.seen == ["Bearer rm_mine"]


def test_a_key_never_goes_to_another_host_in_the_clear(monkeypatch):
    with pytest.raises(RequestError, match="in the clear: use https"):
        Client("http://mill:8000", key="rm_mine")
    for url in ("https://mill", "http://localhost:8000", "http://127.0.0.1:1", "http://[::1]:8000"):
        Client(url, key="rm_mine").close()
    monkeypatch.setenv("RAYMILL_API_KEY", "rm_from_outside")
    with pytest.raises(RequestError, match="in the clear"):
        client_module.connect("http://mill")
    monkeypatch.setenv("RAYMILL_API_KEY", "Bearer rm_x")
    with pytest.raises(RequestError, match="RAYMILL_API_KEY holds no API key"):
        client_module.connect()


def test_certificates_that_can_not_be_read_are_told(tmp_path):
    (tmp_path / "ca.pem").write_text("no PEM")
    for file in ("ca.pem", "none.pem"):
        with pytest.raises(RequestError, match="can not be read"):
            Client("https://mill", ca=str(tmp_path / file))
