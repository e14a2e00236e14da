"""Codes kept beside stored parts: the same answer with and without, made anew when damaged, gone with their part."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors import entities
from raymill.actors.code_cache import cached
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.parts import Parts
from raymill.actors.point_in_time import join
from raymill.runtime.expressions import col
from raymill.runtime.spec import FeatureView
from tests.unit.actors.slow_join import EVENTS, random_events, random_rows, table

PLAN = FeaturePlan.of_views(
    [
        FeatureView("place", EVENTS, entity="place", features={"x": col("x"), "n": col("x").count("9s")}),
        FeatureView("both", EVENTS, entity=["place", "line"], features=["x", "y"]),
        FeatureView("line", EVENTS, entity="line", max_age="3s", features=["y"]),
    ],
    EVENTS,
)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entities, "FROM_ROWS", 1)


def stored(folder: Path, facts: pa.Table, cut: int) -> Parts:
    for name, part in (("a", facts.slice(0, cut)), ("b", facts.slice(cut))):
        pq.write_table(part, folder / name, row_group_size=7)
    return Parts([folder / "a", folder / "b"])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), events=st.integers(0, 40))
def test_join_is_the_same_without_codes_when_they_are_made_and_when_they_are_read(
    seed: int, events: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dice = random.Random(seed)
    facts, asked = table(random_events(dice, events)), table(random_rows(dice, 20))
    at = np.array([dice.randrange(50) * 1_000_000 for _ in range(20)])
    whole = join(asked, PLAN, {"events": facts}, at=at)
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entities, "FROM_ROWS", 1)
        parts = stored(folder, facts, dice.randrange(events + 1))
        for _ in range(2):
            assert join(asked, PLAN, {"events": parts}, at=at).tobytes() == whole.tobytes()


@pytest.mark.usefixtures("kept")
def test_damaged_codes_are_made_anew_and_those_of_a_part_that_is_gone_are_removed(tmp_path: Path) -> None:
    facts = table(random_events(random.Random(1), 30))
    parts, asked = stored(tmp_path, facts, 20), table(random_rows(random.Random(2), 9))
    at = np.arange(9) * 4_000_000
    whole = join(asked, PLAN, {"events": parts}, at=at)
    files = sorted(tmp_path.glob("_codes-*"))
    assert len(files) == 3 * 5  # three views; row groups of 7, 7, 6 and 7, 3 rows
    assert cached(parts, next(parts.blocks()), ("place", "line")) is not None
    for file in files:
        file.write_bytes(file.read_bytes()[:-30])
    assert cached(parts, next(parts.blocks()), ("place", "line")) is None
    assert join(asked, PLAN, {"events": parts}, at=at).tobytes() == whole.tobytes()
    (tmp_path / "a").unlink()
    pq.write_table(facts, tmp_path / "c", row_group_size=7)
    join(asked, PLAN, {"events": Parts([tmp_path / "c"])}, at=at)
    assert {f.name.split("-", 4)[-1] for f in tmp_path.glob("_codes-*")} == {"b", "c"}


@pytest.mark.usefixtures("kept")
def test_folder_that_can_not_be_written_is_told_and_the_join_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = stored(tmp_path, table(random_events(random.Random(1), 30)), 20)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pa, "OSFile", full)
    assert join(table(random_rows(random.Random(2), 9)), PLAN, {"events": parts}, at=np.arange(9)).shape == (9, 5)
    assert "no space left" in caplog.text


def test_entities_stored_as_numbers_but_declared_strings_are_strings(tmp_path: Path) -> None:
    facts = table(random_events(random.Random(3), 30))
    numbers = facts.set_column(facts.column_names.index("place"), "place", pa.array(np.arange(30) % 3))
    pq.write_table(numbers, tmp_path / "a", compression="none", use_dictionary=False)
    asked = table(random_rows(random.Random(2), 9)).set_column(3, "place", pa.array([str(i % 3) for i in range(9)]))
    at = np.full(9, 50_000_000)
    expected = join(asked, PLAN, {"events": numbers}, at=at)
    assert (expected[:, 1] > 0).any() or np.isfinite(expected[:, 0]).any()
    assert join(asked, PLAN, {"events": Parts([tmp_path / "a"])}, at=at).tobytes() == expected.tobytes()
