"""Another team's Delta table: a snapshot, then every append, each row once; what rewrites rows is set aside."""

import json

import pyarrow as pa
import pytest
from deltalake import DeltaTable as Table
from deltalake import write_deltalake

from raymill.actors import delta_follow, sources
from raymill.actors.data import DataActor
from raymill.actors.feed import open_stream, take
from raymill.actors.lake import Lake
from raymill.actors.sources import read_rows
from raymill.runtime.errors import StoreError
from raymill.runtime.spec import DeltaTable
from tests.unit.actors.test_sources import rows, source


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(delta_follow, "POLL_S", 0.01)
    monkeypatch.setattr(sources, "FILE_BATCH_ROWS", 2)


def theirs(*ids) -> pa.Table:
    """Their rows, with a column that is not ours, and parted by another one."""
    return (
        rows(*ids)
        .append_column("note", pa.array(["x"] * len(ids)))
        .append_column("day", pa.array([i % 2 for i in ids]))
    )


def append(table, *ids):
    write_deltalake(str(table), theirs(*ids), mode="append", partition_by=["day"])


def following(table, home, version=None):
    declared = source(read=DeltaTable(str(table), version))
    data = DataActor(str(home), [declared], lambda events: None, "p")
    data.start()
    return declared, data, open_stream(declared, lambda batch_id: data.has_batch("readings", batch_id), "d")


def taken(declared, data, stream, most=99):
    found = []
    while len(found) < most and (batch := stream.next(0)) is not None:
        take(data, declared, batch)
        stream.acknowledge(batch)
        found.append(batch.batch_id)
    stream.close()
    return found


def ids(home):
    return sorted(Lake(home / "lake").read("readings")["id"].to_pylist())


@pytest.mark.parametrize("killed_after", [1, 2, 3, 99])
def test_a_snapshot_that_was_killed_goes_on_with_its_version_and_appends_follow(tmp_path, killed_after):
    table, home = tmp_path / "table", tmp_path / "home"
    append(table, 0)
    append(table, 1, 2, 3, 4)
    first = following(table, home)
    first[2].open()
    taken(*first, most=killed_after)
    append(table, 5, 6)
    again = following(table, home)
    again[2].open()
    taken(*again)
    assert ids(home) == [*range(7)] and again[1].quarantine() == []
    append(table, 7)
    again[2].open()
    assert len(taken(*again)) == 1 and ids(home) == [*range(8)]


def test_what_moves_rows_is_passed_over_and_what_rewrites_them_is_set_aside(tmp_path):
    table, home = tmp_path / "table", tmp_path / "home"
    append(table, 0, 1)
    declared, data, stream = following(table, home)
    stream.open()
    taken(declared, data, stream)
    append(table, 2, 4)
    Table(str(table)).optimize.compact()
    Table(str(table)).delete("id = 0")
    append(table, 6)
    stream.open()
    taken(declared, data, stream)
    assert ids(home) == [0, 1, 2, 4, 6]
    [aside] = data.quarantine()
    told = json.loads(aside.row)
    assert (aside.reason, told["version"], told["operation"]) == ("version:rewrites_rows", 3, "DELETE")


def test_a_declared_version_is_taken_alone(tmp_path):
    table, home = tmp_path / "table", tmp_path / "home"
    append(table, 0, 1, 2)
    append(table, 3)
    for _ in range(2):
        declared, data, stream = following(table, home, version=0)
        stream.open()
        taken(declared, data, stream)
    assert ids(home) == [0, 1, 2] and data.quarantine() == []
    assert sorted(read_rows(declared)["id"].to_pylist()) == [0, 1, 2]
    assert sorted(read_rows(source(read=DeltaTable(str(table))))["id"].to_pylist()) == [0, 1, 2, 3]


def test_a_table_that_is_not_there_is_told(tmp_path):
    declared, _, stream = following(tmp_path / "nowhere", tmp_path / "home")
    with pytest.raises(StoreError, match="nowhere"):
        stream.open()
    with pytest.raises(StoreError, match="nowhere"):
        read_rows(declared)
