"""Merging changes no row and no version that is pinned, and appends stay as fast as the first."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st

from raymill.actors import lake as lake_module
from raymill.actors import lake_upkeep
from raymill.actors.lake import Lake
from raymill.actors.media import MEDIA
from raymill.runtime.errors import StoreError

HOURS_S = 3600.0


def rows(first: int, n: int = 10) -> pa.Table:
    i = np.arange(first, first + n)
    picture = {"bytes": b"\x89", "url": None, "media_type": "image/png", "sha256": "ab"}
    return pa.table(
        {
            "n": i,
            "t": pa.array(1_000_000_000_123_456 + i, pa.timestamp("us", "UTC")),
            "x": pa.array([None if v % 3 == 0 else float("nan") if v % 3 == 1 else v / 7 for v in i], pa.float64()),
            "s": [f"s{v % 4}" if v % 5 else None for v in i],
            "b": [bool(v % 2) for v in i],
            "v": pa.array([[v, None] for v in i], pa.list_(pa.float32())),
            "m": pa.array([picture if v % 2 else None for v in i], MEDIA),
        }
    )


def bits(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def sorted_rows(lake: Lake, version: int | None = None) -> pa.Table:
    return lake.read("facts", version=version).sort_by("n").combine_chunks()


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    lake = Lake(tmp_path)
    for first in (40, 0, 20, 10, 30):  # late batches too
        lake.append("facts", rows(first), batch_id=str(first), by="t")
    return lake


def test_a_merge_leaves_every_value_as_it_was_and_numbers_in_place_in_the_order_of_time(lake: Lake) -> None:
    before, version = bits(sorted_rows(lake)), lake.version("facts")
    merged = lake.compact("facts", fewest=2)
    assert merged is not None and (merged.before, merged.after, merged.version) == (5, 1, version + 1)
    assert bits(sorted_rows(lake)) == before == bits(sorted_rows(lake, version))
    stored = lake.parts("facts", by="t")
    (block,) = stored.blocks()
    assert [stored.place(block, c) is not None for c in ("n", "t")] == [True, True]
    assert stored.table(["n"])["n"].to_pylist() == list(range(50))
    assert stored.table(["v", "m"]).to_pylist() == sorted_rows(lake).select(["v", "m"]).to_pylist()
    assert lake.compact("facts", fewest=2) is None
    assert (lake.count("facts"), lake.batch_rows("facts", "20")) == (50, 10)


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=6), st.integers(1, 3))
def test_what_is_in_order_is_told_from_what_is_not(values: list[int | None], size: int) -> None:
    pieces = [values[i : i + size] for i in range(0, len(values), size)]
    column = pa.chunked_array(pieces, pa.int64())
    known = [v for v in values if v is not None]
    assert lake_upkeep._is_ascending(column) == (values == sorted(known))


def test_rows_are_found_in_merged_parts_by_moment_number_and_text(lake: Lake) -> None:
    lake.compact("facts", fewest=2)
    lake.append("facts", rows(50), batch_id="50")
    moment = datetime.fromtimestamp(1_000_000_000, UTC).replace(microsecond=123_456 + 49)
    assert lake.read("facts", where=[("t", "=", moment)])["n"].to_pylist() == [49]
    assert sorted(lake.read("facts", where=[("t", ">=", moment)])["n"].to_pylist()) == list(range(49, 60))
    assert lake.read("facts", where=[("n", "in", [0, 49])]).num_rows == 2
    assert lake.read("facts", where=[("s", "=", "s0"), ("n", "<", 50)])["n"].to_pylist() == [
        4,
        8,
        12,
        16,
        24,
        28,
        32,
        36,
        44,
        48,
    ]
    assert lake.describe("facts").sorted_by == "t"


def test_appends_merge_and_checkpoint_on_the_way_and_forget_no_batch(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lake_module, "UPKEEP_EVERY", 8)
    lake, versions = Lake(tmp_path), []
    for number in range(40):
        versions.append(lake.append("facts", rows(10 * number), batch_id=str(number), by="t"))
        assert lake.version("facts") == versions[-1]  # a merge on the way is in the version told
    told = lake.describe("facts")
    assert told.parts < 20 and told.rows == 400
    assert sorted_rows(lake)["n"].to_pylist() == list(range(400))
    log = tmp_path / "facts" / "_delta_log"
    assert (log / "_last_checkpoint").exists()
    assert len(list(log.glob("*.json"))) == versions[-1] + 1
    assert all(Lake(tmp_path).has_batch("facts", str(number)) for number in range(40))
    assert [lake.count("facts", version=v) for v in versions] == list(range(10, 410, 10))


def test_the_log_of_old_versions_is_never_cleaned_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lake_module, "UPKEEP_EVERY", 4)
    lake = Lake(tmp_path)
    lake.append("facts", rows(0), batch_id="0")
    table = DeltaTable(str(tmp_path / "facts"))
    assert table.metadata().configuration["delta.enableExpiredLogCleanup"] == "false"
    table.alter.set_table_properties({"delta.logRetentionDuration": "interval 0 days"})
    for number in range(1, 13):
        lake.append("facts", rows(10 * number), batch_id=str(number))
    assert lake.read("facts", version=1).num_rows == 10


def test_a_batch_that_comes_while_parts_are_merged_stays(lake: Lake, tmp_path: Path, monkeypatch) -> None:
    write, late = lake_upkeep.write_part, [rows(50)]

    def slow(files, part):
        Lake(tmp_path).append("facts", late.pop(), batch_id="50")
        return write(files, part)

    monkeypatch.setattr(lake_upkeep, "write_part", slow)
    merged = lake.compact("facts", fewest=2)
    assert merged is not None and merged.version == lake.version("facts")
    assert sorted_rows(lake)["n"].to_pylist() == list(range(60))


def test_of_two_that_merge_the_same_parts_one_does(lake: Lake, tmp_path: Path, monkeypatch) -> None:
    write, other = lake_upkeep.write_part, []

    def slow(files, part):
        if not other:
            other.append(None)
            other[0] = Lake(tmp_path).compact("facts", fewest=2)
        return write(files, part)

    monkeypatch.setattr(lake_upkeep, "write_part", slow)
    assert lake.compact("facts", fewest=2) is None
    assert other[0].version == lake.version("facts")
    assert sorted_rows(lake)["n"].to_pylist() == list(range(50))


def test_vacuum_keeps_what_is_pinned_young_or_newest_and_tells_first(lake: Lake) -> None:
    pinned = lake.version("facts")
    before = bits(sorted_rows(lake, pinned))
    lake.compact("facts", fewest=2)
    lake.append("facts", rows(50), batch_id="50")
    lake.compact("facts", fewest=2)
    now, later = time.time(), time.time() + 24 * HOURS_S
    assert lake.vacuum("facts", pins=(), older_than_s=0, now_s=now).files == []  # younger than any vacuum dares
    assert lake.vacuum("facts", pins=(), older_than_s=48 * HOURS_S, now_s=later).files == []
    told = lake.vacuum("facts", pins={pinned}, older_than_s=HOURS_S, now_s=later, dry_run=True)
    assert len(told.files) == 2 and bits(sorted_rows(lake, pinned + 1)) == before  # the merged part, and the late batch
    assert lake.vacuum("facts", pins={pinned}, older_than_s=HOURS_S, now_s=later) == told
    assert bits(sorted_rows(lake, pinned)) == before
    assert sorted_rows(lake)["n"].to_pylist() == list(range(60))
    with pytest.raises(StoreError, match="vacuumed away"):
        lake.parts("facts", version=pinned + 1).table(["n"])
    with pytest.raises(StoreError):
        lake.read("facts", version=pinned + 2)
    assert lake.read("facts", version=pinned + 2, or_later=True).num_rows == 60
    assert lake.read("facts", version=pinned, or_later=True).num_rows == 50


def test_vacuum_takes_what_a_killed_merge_left(lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "facts" / "part-left.parquet").write_bytes(b"half")
    gone = lake.vacuum("facts", pins=(), older_than_s=0, now_s=time.time() + 2 * HOURS_S)
    assert gone.files == ["part-left.parquet"] and gone.size == 4
    assert sorted_rows(lake)["n"].to_pylist() == list(range(50))


def test_filters_find_the_same_rows_after_a_merge_as_before_whatever_the_column(tmp_path: Path) -> None:
    lake, n = Lake(tmp_path), 20
    at = pa.array(np.arange(n) * 1_000_000, pa.timestamp("us", "UTC"))
    batch = {
        "id": [f"{i}" for i in range(n)],
        "number": np.arange(n) * 1.5,
        "small": pa.array(np.arange(n), pa.float32()),
        "some": pa.array([None, float("nan"), *[7.0] * (n - 2)]),
        "none": pa.nulls(n, pa.float64()),
        "yes": [True] * n,
        "text": ["x" * 300] * n,
        "word": [None, "a"] * (n // 2),
        "at": at,
        "x": [[1.0]] * n,
    }
    for b in range(10):
        lake.append("t", pa.table({**batch, "count": [b] * n}), batch_id=str(b), by="at")
    filters = [
        [("number", ">=", 0.0)], [("number", "=", 3.0)], [("number", "<", 1.0)], [("small", "in", [3.0])],
        [("some", "=", 7.0)], [("some", ">", 8.0)], [("some", "<", 7.5)], [("none", "=", 7.0)], [("yes", "=", True)],
        [("yes", "=", False)], [("text", "=", "x" * 300)], [("text", ">", "x" * 299)], [("text", "=", "x" * 64)],
        [("word", "=", "a")], [("word", "!=", "a")], [("at", ">=", at[3].as_py())], [("at", "<", at[3].as_py())],
        [("count", "=", 3)], [("number", ">=", 3.0), ("word", "=", "a"), ("count", "<", 5)],
    ]  # fmt: skip

    def found() -> list[list[str]]:
        return [sorted(map(str, lake.read("t", columns=["id", "count"], where=w).to_pylist())) for w in filters]

    before = found()
    assert len(before[0]) == 10 * n and len(before[10]) == 10 * n and before[12] == []
    merged = lake.compact("t", fewest=2)
    assert merged is not None and merged.before == 10
    assert found() == before
