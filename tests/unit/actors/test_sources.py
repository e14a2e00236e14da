"""What a source gives comes in whole and once, and what can not be read is told."""

import json

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from raymill.actors import sources
from raymill.actors.contract import arrow_schema
from raymill.actors.data import DataActor
from raymill.actors.feed import take
from raymill.actors.incoming import Batch
from raymill.actors.lake import Lake
from raymill.actors.sources import between, file_batches, read_rows
from raymill.runtime.errors import ContractError
from raymill.runtime.spec import Col, Source

SECOND_US = 1_000_000


def source(**more) -> Source:
    schema = {"id": Col("int64"), "time": Col("timestamp"), "value": Col("int64", ge=0)}
    return Source("readings", key=["id"], time="time", schema=schema, **more)


def rows(*ids, value=1) -> pa.Table:
    columns = [ids, [i * SECOND_US for i in ids], [value] * len(ids)]
    return pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, arrow_schema(source()), strict=True)], ["id", "time", "value"]
    )


def started(home, *told) -> DataActor:
    actor = DataActor(str(home), list(told) or [source()], lambda events: None, "p")
    actor.start()
    return actor


@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow"])
def test_a_large_file_comes_in_by_batches_and_a_second_try_doubles_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "FILE_BATCH_ROWS", 4)
    path, sent = tmp_path / f"file.{kind}", pa.concat_tables([rows(*range(10)), rows(10, value=-1)])
    if kind == "parquet":
        pq.write_table(sent, path)
    elif kind == "csv":
        pacsv.write_csv(sent, path)
    else:
        with pa.ipc.new_file(path, sent.schema) as writer:
            writer.write_table(sent)
    actor = started(tmp_path)
    assert [(d.accepted, d.duplicate) for d in actor.ingest_path("readings", path)] == [
        (4, False),
        (4, False),
        (2, False),
    ]
    assert [(d.accepted, d.duplicate) for d in actor.ingest_path("readings", path)] == [(4, True), (4, True), (2, True)]
    assert sorted(Lake(tmp_path / "lake").read("readings")["id"].to_pylist()) == list(range(10))
    assert [q.reason for q in actor.quarantine()] == ["range:value"]


def test_a_file_that_can_not_be_read_is_told(tmp_path):
    actor = started(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"nonsense")
    (tmp_path / "notes.txt").write_text("x")
    for name in ("broken.parquet", "notes.txt", "absent.csv"):
        with pytest.raises(ContractError, match=name):
            actor.ingest_path("readings", tmp_path / name)
    assert Lake(tmp_path / "lake").tables() == []


def test_history_is_what_lies_before_a_moment_and_rows_without_a_time_go_with_it(tmp_path):
    texts = pa.table(
        {
            "id": ["1", "2", "3", "4"],
            "time": ["1970-01-01T00:00:01Z", "soon", None, "1970-01-01T00:00:04Z"],
            "value": ["1"] * 4,
        }
    )
    told = source(read=lambda: texts)
    actor = started(tmp_path, told)
    done = actor.load_history("readings", 4 * SECOND_US)
    assert (done.accepted, done.quarantined) == (1, {"null:time": 1, "type:time": 1})
    assert actor.load_history("readings", 4 * SECOND_US).duplicate
    assert between(texts, told, 4 * SECOND_US, None)["id"].to_pylist() == ["4"]
    with pytest.raises(ContractError, match="read"):
        read_rows(source())


def test_a_file_is_the_same_by_path_and_by_url_and_its_last_batch_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FILE_BATCH_ROWS", 4)
    path, none = tmp_path / "a.parquet", tmp_path / "none.parquet"
    pq.write_table(rows(*range(9)), path)
    pq.write_table(rows(), none)
    named = [(batch_id, part["id"].to_pylist()) for batch_id, part in file_batches(path, source())]
    assert [len(part) for _, part in named] == [4, 4, 1]
    assert [batch_id.endswith("-end") for batch_id, _ in named] == [False, False, True]
    assert [(b, t["id"].to_pylist()) for b, t in file_batches(path.as_uri(), source())] == named
    assert [(b[-4:], t.num_rows) for b, t in file_batches(none, source())] == [("-end", 0)]
    actor = started(tmp_path)
    assert not actor.has_batch("readings", named[-1][0])
    actor.ingest_path("readings", path.as_uri())
    assert actor.has_batch("readings", named[-1][0]) and read_rows(source(read=path.as_uri())).num_rows == 9


def test_a_batch_whose_id_stands_for_other_rows_is_quarantined_and_what_does_not_fit_as_well(tmp_path):
    actor = started(tmp_path)
    assert [d.accepted for d in take(actor, source(), Batch(batch_id="a", rows=rows(1, 2)))] == [2]
    assert take(actor, source(), Batch(batch_id="a", rows=rows(3))) == []
    for _ in range(2):
        strange = Batch(batch_id="b", rows=rows(4).rename_columns(["id", "time", "worth"]), origin='{"file": "f"}')
        assert [d.accepted for d in take(actor, source(), strange)] == [0]
    held = [(e.reason, json.loads(e.row).get("file")) for e in actor.quarantine()]
    assert held == [("batch:conflict", None), ("batch:contract_error", "f")] and actor.has_batch("readings", "b")
