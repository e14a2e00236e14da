"""A table follows its source's declared columns, once and at once; what was pinned before stays as it was."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from raymill.actors import lake_migrations
from raymill.actors.lake import Lake
from raymill.runtime.errors import ContractError
from raymill.runtime.migrations import AddColumn, DropColumn, RenameColumn, Widen
from raymill.runtime.spec import Col, Source

UTC = pa.timestamp("us", "UTC")
FIRST = {"n": Col("int64"), "t": Col("timestamp"), "x": Col("int64", nullable=True), "s": Col("string")}


def source(schema: dict[str, Col], *migrations) -> Source:
    return Source("facts", schema=schema, key=[next(iter(schema))], time="t", migrations=migrations)


def rows(first: int, n: int = 3) -> pa.Table:
    i = list(range(first, first + n))
    return pa.table(
        {
            "n": i,
            "t": pa.array(i, UTC),
            "x": pa.array([v if v % 2 else None for v in i], pa.int64()),
            "s": [f"v{v}" for v in i],
        }
    )


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    lake = Lake(tmp_path)
    for first in (0, 3, 6):
        lake.append("facts", rows(first), batch_id=str(first), by="t")
    return lake


def whole(lake: Lake, version: int | None = None) -> pa.Table:
    return lake.read("facts", version=version).sort_by("t")


ADDED = {**FIRST, "y": Col("float64", nullable=True)}
MOVED = {"id": Col("int64"), "t": Col("timestamp"), "x": Col("float64", nullable=True), "y": Col("bool", nullable=True)}
STEPS = (RenameColumn("n", "id"), Widen("x", "int64"), DropColumn("s", "string"), AddColumn("y"))


def test_an_added_column_is_null_in_old_rows_and_no_part_is_written_anew(lake: Lake) -> None:
    pinned = lake.version("facts")
    now = source(ADDED, AddColumn("y"))
    assert lake.migrate(now) == pinned + 1
    assert lake.migrate(now) is None
    assert whole(lake)["y"].null_count == 9
    assert lake.parts("facts").table(["n", "y"])["y"].null_count == 9
    more = rows(9).append_column("y", pa.array([1.5, 2.5, None]))
    lake.append("facts", more, batch_id="9")
    assert whole(lake).slice(9)["y"].to_pylist() == [1.5, 2.5, None]
    lake.compact("facts", fewest=2)
    assert whole(lake)["y"].to_pylist() == [None] * 9 + [1.5, 2.5, None]
    assert whole(lake, pinned).column_names == list(FIRST)


def test_renamed_widened_and_dropped_columns_change_in_one_commit(lake: Lake) -> None:
    pinned, before = lake.version("facts"), whole(lake)
    assert lake.migrate(source(MOVED, *STEPS)) == pinned + 1
    now = whole(lake)
    assert now.schema.types == [pa.int64(), UTC, pa.float64(), pa.bool_()]
    assert now["id"].to_pylist() == list(range(9)) and now["x"].to_pylist() == before["x"].to_pylist()
    assert whole(lake, pinned).equals(before)
    assert Lake(lake._place.root).batch_rows("facts", "3") == 3  # what was appended is still known
    told = lake._place.open("facts").history(1)[0]
    assert told["raymill"] == "migrate" and "RenameColumn(old='n', new='id')" in told["raymill.steps"]


def test_a_table_that_has_taken_some_steps_takes_the_others(lake: Lake) -> None:
    lake.migrate(source(ADDED, AddColumn("y")))
    later = {"n": Col("int64"), "t": Col("timestamp"), "z": Col("int64", nullable=True), "s": Col("string")}
    steps = (AddColumn("y"), DropColumn("y", "float64"), RenameColumn("x", "z"))
    with pytest.raises(ValueError, match="migrations 1 to 2 lead back"):
        source(later, *steps)
    kept = {**later, "y": Col("float64", nullable=True)}
    lake.migrate(source(kept, AddColumn("y"), RenameColumn("x", "z")))
    assert set(whole(lake).column_names) == set(kept)


def test_a_table_made_after_a_step_does_not_take_it_again(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    now = source(ADDED, AddColumn("y"))
    assert lake.migrate(now) is None
    lake.append("facts", rows(0).append_column("y", pa.array([1.0, 2.0, 3.0])), batch_id="0")
    assert lake.migrate(now) is None


@pytest.mark.parametrize(
    ("schema", "advice"),
    [
        (ADDED, r"AddColumn\('y'\)"),
        ({n: c for n, c in FIRST.items() if n != "s"}, r"DropColumn\('s', was='string'\)"),
        ({**{n: c for n, c in FIRST.items() if n != "x"}, "z": Col("int64")}, r"RenameColumn\('x', 'z'\)"),
        ({**FIRST, "x": Col("float64")}, r"Widen\('x', was='int64'\)"),
        ({**FIRST, "s": Col("int64")}, "'s' is string in the lake and can not become int64: name a new one"),
    ],
)
def test_what_is_not_declared_is_refused_with_what_to_declare(lake: Lake, schema: dict[str, Col], advice: str) -> None:
    before = lake.version("facts")
    with pytest.raises(ContractError, match=advice):
        lake.migrate(source(schema))
    assert lake.version("facts") == before


def test_a_value_that_its_new_type_can_not_hold_stops_the_migration(lake: Lake) -> None:
    wide = rows(9).set_column(2, "x", pa.array([2**53 + 1, 1, 2]))
    before = lake.append("facts", wide, batch_id="wide")
    with pytest.raises(ContractError, match="does not fit"):
        lake.migrate(source({**FIRST, "x": Col("float64", nullable=True)}, Widen("x", "int64")))
    assert lake.version("facts") == before


def test_rows_that_come_during_a_migration_are_in_it(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    write, late = lake_migrations.write_part, [rows(9)]

    def slow(files, part):
        if late:
            Lake(lake._place.root).append("facts", late.pop(), batch_id="late")
        return write(files, part)

    monkeypatch.setattr(lake_migrations, "write_part", slow)
    lake.migrate(source(MOVED, *STEPS))
    assert whole(lake)["id"].to_pylist() == list(range(12))
