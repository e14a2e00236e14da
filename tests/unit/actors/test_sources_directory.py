"""A watched folder: complete files come in once, unfinished ones wait, bad ones are set aside."""

import json
import os

import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymill.actors import directory, sources
from raymill.actors.data import DataActor
from raymill.actors.directory import STALLED_S, Sighting, is_ready, sighted
from raymill.actors.feed import open_stream, take
from raymill.actors.files import File
from raymill.actors.lake import Lake
from raymill.actors.sources import read_rows
from raymill.runtime.errors import ContractError, StoreError
from raymill.runtime.spec import Directory
from tests.unit.actors.test_sources import rows, source


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(directory, "POLL_S", 0.01)


def watching(folder, home, **more):
    """The source, a data actor anew, and a watcher anew, as after a restart."""
    declared = source(read=Directory(str(folder), settle="30ms", **more))
    data = DataActor(str(home), [declared], lambda events: None, "p")
    data.start()
    return declared, data, open_stream(declared, lambda batch_id: data.has_batch("readings", batch_id), "w")


def taken(declared, data, stream, wait_s=0.3):
    """Ids of the batches that come until nothing does."""
    found = []
    while (batch := stream.next(wait_s)) is not None:
        take(data, declared, batch)
        stream.acknowledge(batch)
        found.append(batch.batch_id)
    return found


def ids(home):
    return sorted(Lake(home / "lake").read("readings")["id"].to_pylist())


def test_new_files_come_in_once_in_the_order_of_their_times_also_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FILE_BATCH_ROWS", 2)
    folder, home = tmp_path / "in", tmp_path / "home"
    folder.mkdir()
    for i, name in enumerate(["b.parquet", "a.parquet"]):
        pq.write_table(rows(3 * i, 3 * i + 1, 3 * i + 2), folder / name)
        os.utime(folder / name, (1000 + i, 1000 + i))
    declared, data, stream = watching(folder, home)
    assert stream.next(1) is not None and stream.waiting() == 2
    first = taken(declared, data, stream)
    assert stream.waiting() == 0
    assert [b.split("-")[0] for b in first] == ["b.parquet"] * 2 + ["a.parquet"] * 2
    pacsv.write_csv(rows(6), folder / "c.csv")
    for hidden in (".c.csv", "_c.csv", "c.csv.tmp"):
        pacsv.write_csv(rows(99), folder / hidden)
    declared, data, stream = watching(folder, home, pattern="*[tv]")
    assert [b.split("-")[0] for b in taken(declared, data, stream)] == ["c.csv"]
    assert ids(home) == [*range(7)] and data.quarantine() == []
    pacsv.write_csv(rows(6, 7), folder / "c.csv")  # written anew: another file, of which one row is known
    assert len(taken(declared, data, stream)) == 1 and ids(home) == [*range(8)]
    assert [e.reason for e in data.quarantine()] == ["duplicate_key"]
    with pytest.raises(ContractError, match="raymill ingest"):  # text beside numbers
        read_rows(declared)
    assert sorted(read_rows(source(read=Directory(str(folder), "*.parquet")))["id"].to_pylist()) == [*range(6)]


def test_a_batch_that_was_not_acknowledged_comes_again_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FILE_BATCH_ROWS", 2)
    folder, home = tmp_path / "in", tmp_path / "home"
    folder.mkdir()
    pq.write_table(rows(*range(5)), folder / "a.parquet")
    declared, data, stream = watching(folder, home)
    first = stream.next(1)
    assert stream.next(0) is first
    take(data, declared, first)  # and death before the acknowledgement
    declared, data, stream = watching(folder, home)
    again = stream.next(1)
    assert (again.batch_id, again.rows) == (first.batch_id, first.rows)
    assert len(taken(declared, data, stream)) == 3 and ids(home) == [*range(5)]


def test_a_half_written_file_waits_for_its_end_and_a_bad_one_is_set_aside_once(tmp_path):
    folder, home = tmp_path / "in", tmp_path / "home"
    folder.mkdir()
    pq.write_table(rows(1, 2), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    (folder / "half.parquet").write_bytes(whole[:-4])
    (folder / "bad.csv").write_text("id,time,value\n1,2\n")
    (folder / "notes.txt").write_text("not rows")
    (folder / "strange.csv").write_text("a,b\n1,2\n")
    declared, data, stream = watching(folder, home)
    assert len(taken(declared, data, stream)) == 3  # all but the half one
    (folder / "half.parquet").write_bytes(whole)
    assert len(taken(declared, data, stream)) == 1 and ids(home) == [1, 2]
    assert taken(*watching(folder, home)) == []  # set aside for good, not tried again
    told = {json.loads(e.row)["file"].rsplit("/", 1)[1]: e.reason for e in data.quarantine()}
    assert told == {
        "bad.csv": "file:unreadable",
        "notes.txt": "file:unreadable",
        "strange.csv": "batch:contract_error",
    }


def test_a_folder_that_is_not_there_is_told(tmp_path):
    declared, _, stream = watching(tmp_path / "nowhere", tmp_path / "home")
    with pytest.raises(StoreError, match="nowhere"):
        stream.open()
    with pytest.raises(StoreError, match="nowhere"):
        read_rows(declared)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 30)), min_size=1, max_size=20), st.floats(0, 20))
def test_a_file_that_shows_no_end_is_ready_when_it_has_not_changed_for_long_enough(looks, settle_s):
    seen, now_s, changed_s, size = {}, 0.0, 0.0, None
    for new_size, later_s in looks:
        now_s += later_s
        changed_s = now_s if new_size != size else changed_s
        size = new_size
        seen = sighted([File("/a.csv", size, 1)], seen, now_s)
        assert is_ready(seen["/a.csv"], None, settle_s, now_s) == (now_s - changed_s >= settle_s)
    assert sighted([], seen, now_s) == {}


def test_a_file_without_its_end_is_read_when_it_is_given_up():
    seen = Sighting(File("/a.parquet", 1, 1), 0.0)
    assert is_ready(seen, True, 9, 0.0)
    assert not is_ready(seen, False, 0, STALLED_S - 1) and is_ready(seen, False, 0, STALLED_S)
