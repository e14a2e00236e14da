"""Stored parts, several threads, any order: the same vectors as from one small table in memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors import offline_events
from raymill.actors.entities import entity_codes
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.merge import densify
from raymill.actors.parts import Parts
from raymill.actors.point_in_time import join
from raymill.runtime.errors import ContractError, StoreError
from raymill.runtime.expressions import col
from raymill.runtime.spec import Col, FeatureView, Source

UTC = pa.timestamp("us", "UTC")
SCHEMA = {"id": Col("int64"), "t": Col("timestamp"), "k": Col("timestamp"), "who": Col("int64"), "x": Col("float64")}
AT_ONCE = Source("facts", key=["id"], time="t", schema=SCHEMA)
LATER = Source("facts", key=["id"], time="t", known_at="k", schema=SCHEMA)
NEWEST = FeaturePlan.of_views([FeatureView("v", AT_ONCE, entity="who", max_age="1m", features=["x"])], AT_ONCE)
WINDOWS = FeaturePlan.of_views(
    [FeatureView("v", LATER, entity="who", features={"x": col("x"), "sum": col("x").sum("40s")})], LATER
)


def facts(dice: random.Random, n: int, *, in_order: bool) -> pa.Table:
    t = [dice.randrange(n // 2 + 1) * 1_000_000 for _ in range(n)]
    t = sorted(t) if in_order else t
    columns: dict[str, Any] = {
        "id": pa.array([dice.randrange(n) for _ in range(n)], pa.int64()),
        "t": pa.array(t, UTC),
        "k": pa.array([v + dice.choice([0, 0, 3, 20]) * 1_000_000 for v in t], UTC),
        "who": pa.array([dice.choice([0, 1, 7, 10**12, None]) for _ in range(n)], pa.int64()),
    }
    columns["x"] = pa.array([i / 7 if i % 5 else None for i in columns["id"].to_pylist()], pa.float64())
    return pa.table(columns)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**40), n=st.integers(0, 120), in_order=st.booleans())
def test_parts_and_stretches_do_not_change_a_bit(seed: int, n: int, in_order: bool, tmp_path_factory: Any) -> None:
    dice = random.Random(seed)
    rows, asked = facts(dice, n, in_order=in_order), facts(dice, 40, in_order=dice.random() < 0.5)
    folder = tmp_path_factory.mktemp("parts")
    cut = dice.randrange(n + 1)
    for name, part in (("a", rows.slice(0, cut)), ("b", rows.slice(cut))):
        pq.write_table(part, folder / name, row_group_size=17)
    stored = Parts([folder / "a", folder / "b"])
    for plan in (NEWEST, WINDOWS):
        whole = join(asked, plan, {"facts": rows}, at="t")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offline_events, "LARGE", 1)
            assert join(asked, plan, {"facts": stored}, at="t", workers=3).tobytes() == whole.tobytes()


def test_events_in_order_and_shuffled_ones_give_the_same_newest_values() -> None:
    dice = random.Random(1)
    rows = facts(dice, 3000, in_order=True)
    asked = facts(dice, 500, in_order=False)
    shuffled = rows.take(pa.array(dice.sample(range(3000), 3000)))
    one = join(asked, NEWEST, {"facts": rows}, at="t")
    # Rows of the same key, time and known-at count as one, whichever comes first: their values are equal here.
    assert join(asked, NEWEST, {"facts": shuffled}, at="t").tobytes() == one.tobytes()
    assert np.isfinite(one).any()


def test_one_entity_with_many_events_far_out_of_order_is_put_in_order() -> None:
    n = 20_000
    dice = np.random.default_rng(2)
    t = dice.permutation(n // 4).repeat(4)
    rows = pa.table(
        {
            "id": np.arange(n),
            "t": pa.array(t * 1_000_000, UTC),
            "k": pa.array((t + dice.integers(0, n, n)) * 1_000_000, UTC),
            "who": np.zeros(n, dtype=np.int64),
            "x": np.ones(n),
        }
    )
    asked = rows.slice(0, 50)
    at = np.linspace(0, n, 50).astype(np.int64) * 1_000_000
    t_us, k_us = (np.array(rows.column(c).cast(pa.int64())) for c in ("t", "k"))
    expected = [((t_us <= m) & (k_us <= m) & (t_us > m - 40_000_000)).sum() for m in at]
    assert join(asked, WINDOWS, {"facts": rows}, at=at)[:, 1].tolist() == expected


def test_entities_of_wide_numbers_strings_and_several_columns_are_numbered_alike() -> None:
    schema = {**SCHEMA, "name": Col("string", nullable=True), "big": Col("int64", nullable=True)}
    source = Source("facts", key=["id"], time="t", schema=schema)
    view = FeaturePlan.of_views([FeatureView("v", source, entity=["name", "big"], features=["x"])], source)
    table = {"name": ["a", "b", None, "a", "a"], "big": [-(2**62), 2**61, 5, None, 2**61]}
    events = pa.table({k: pa.array(v) for k, v in table.items()})
    asked = pa.table({"name": ["a", "c", "b", "a"], "big": pa.array([2**61, 5, 2**61, 77])})
    codes, wanted, n = entity_codes(view.event_views[0], events, asked)
    assert (codes[2], codes[3], wanted[1], wanted[3]) == (-1, -1, -1, -1)
    assert wanted[0] == codes[4]
    assert wanted[2] == codes[1]
    assert len({codes[0], codes[1], codes[4]}) == 3
    assert n > codes.max()


def test_numbering_grows_with_what_it_finds() -> None:
    first = np.random.default_rng(0).integers(-(2**62), 2**62, 5000).repeat(2)
    second = np.concatenate([first[:10], np.array([3, -1])])
    values = first.copy()
    n = densify(first, second, -1)
    assert n == len(np.unique(values)) == first.max() + 1
    assert len(np.unique(np.stack([values, first]), axis=1)[0]) == n
    assert second.tolist() == [*first[:10].tolist(), -1, -1]


def test_column_that_older_parts_lack_is_null_and_missing_files_are_named(tmp_path: Path) -> None:
    rows = facts(random.Random(3), 20, in_order=True)
    pq.write_table(rows.drop(["x"]), tmp_path / "old")
    pq.write_table(rows, tmp_path / "new")
    both = Parts([tmp_path / "old", tmp_path / "new"])
    assert both.table(["id", "x"]).column("x").null_count >= 20
    with pytest.raises(ContractError, match="'y'"):
        both.table(["y"])
    with pytest.raises(StoreError, match="gone"):
        len(Parts([tmp_path / "gone"]))


def test_what_the_lake_stores_is_read_in_place_in_the_order_of_time_and_nulls_are_decoded(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    rows = facts(random.Random(4), 3000, in_order=True)
    for first in (2000, 0, 1000):  # batches that came out of order
        lake.append("facts", rows.slice(first, 1000), batch_id=str(first))
    stored = lake.parts("facts", by="t")
    places = {n: [stored.place(b, n) is not None for b in stored.blocks()] for n in rows.column_names}
    assert places == {"id": [True] * 3, "t": [True] * 3, "k": [True] * 3, "who": [False] * 3, "x": [False] * 3}
    assert stored.table(rows.column_names).equals(rows)
    block = list(stored.blocks())[1]
    chosen = np.array([1999, 1000, 1500, 1500])
    assert stored.take(block, rows.column_names, chosen).equals(rows.take(pa.array(chosen)))
    assert stored.read(block, ["x", "id"]).equals(rows.slice(1000, 1000).select(["x", "id"]))
    asked = facts(random.Random(5), 300, in_order=False)
    for plan in (NEWEST, WINDOWS):
        online = join(asked, plan, {"facts": rows}, at="t")
        assert join(asked, plan, {"facts": stored}, at="t").tobytes() == online.tobytes()


def test_files_of_other_writers_are_never_taken_for_plain_ones(tmp_path: Path) -> None:
    rows = pa.table({"a": np.arange(5000), "b": np.arange(5000) / 3})
    ways: list[dict[str, Any]] = [
        {},
        {"compression": "none"},
        {"compression": "zstd", "use_dictionary": False},
        {"compression": "none", "use_dictionary": False, "data_page_size": 1024},
        {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
        {"compression": "none", "use_dictionary": False, "column_encoding": "BYTE_STREAM_SPLIT"},
        {"compression": "none", "use_dictionary": False, "write_statistics": False},
    ]
    for i, options in enumerate(ways):
        pq.write_table(rows, tmp_path / str(i), **options)
        stored = Parts([tmp_path / str(i)])
        assert stored.place(next(stored.blocks()), "a") is None, options
        assert stored.table(["a", "b"]).equals(rows)
    pq.write_table(rows, tmp_path / "plain", compression="none", use_dictionary=False)
    stored = Parts([tmp_path / "plain"])
    assert stored.place(next(stored.blocks()), "b") is not None
    assert stored.table(["a", "b"]).equals(rows)
