"""Newest values the short way, one pass over events in order, against the slow reference; however they are stored."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors import offline_events, point_in_time
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.parts import Parts
from raymill.actors.point_in_time import join
from raymill.runtime.expressions import col
from raymill.runtime.spec import FeatureView, Source
from tests.unit.actors.slow_join import EVENTS, SECOND, random_events, random_rows, slow_feature, table, with_hashes

AT_ONCE = Source("events", key=EVENTS.key, time=EVENTS.time, schema=EVENTS.schema)
FEATURES = {"x": col("x"), "y": col("y"), "both": col("x") * 2 + col("y")}


def views(source: Source) -> list[FeatureView]:
    return [
        FeatureView("line", source, entity="line", features=FEATURES),
        FeatureView("place", source, entity="place", max_age="3s", features=FEATURES),
    ]


def facts_in_order(dice: random.Random, n: int, *, ahead: bool) -> list[dict[str, Any]]:
    """Known at their time, or, announced, before it; some twice."""
    facts = random_events(dice, n)
    whole = dice.random() < 0.5
    for e in facts:
        e["known"] = e["happened"] - dice.choice([0, 0, 1, 3]) * SECOND if ahead else e["happened"]
        if ahead and dice.random() < 0.1:
            e["known"] = None
        if whole:  # columns without nulls lie plain in a file
            e["x"], e["y"] = e["x"] or 0.5, e["y"] or -0.0
            e["line"] = e["line"] or 3
    facts += dice.sample(facts, n // 5)
    return sorted(facts, key=lambda e: e["happened"])


def stored(dice: random.Random, facts: pa.Table, folder: Path) -> pa.Table | Parts:
    way = dice.randrange(3)
    if way == 0:
        return facts
    cut, options = dice.randrange(len(facts) + 1), {"compression": "none", "use_dictionary": False} if way == 1 else {}
    for name, part in (("a", facts.slice(0, cut)), ("b", facts.slice(cut))):
        pq.write_table(part, folder / name, row_group_size=dice.choice([3, 11, 1000]), **options)
    return Parts([folder / "a", folder / "b"], by="happened")


def slow(rows: list[dict[str, Any]], events: list[dict[str, Any]], source: Source) -> np.ndarray:
    out = []
    for row in rows:
        for view in views(source):
            (name,) = view.entity_columns
            mine = [e for e in events if row[name] is not None and e[name] == row[name]]
            age = 3 * SECOND if view.max_age else None
            out += [slow_feature(e.to_json(), mine, row["at"], age) for e in view.definitions.values()]
    values = [math.nan if v is None else v for v in out]
    return np.array(values, dtype=np.float64).reshape(len(rows), 6).astype(np.float32)


def differences(seed: int, folder: Path) -> int:
    """Of one random case."""
    dice = random.Random(seed)
    source = dice.choice([EVENTS, AT_ONCE])
    facts = facts_in_order(dice, dice.randrange(1, 40), ahead=source is EVENTS)
    asked = random_rows(dice, dice.randrange(25))
    at = np.array([r["at"] for r in asked], dtype=np.int64)
    plan = FeaturePlan.of_views(views(source), source)
    sources = {"events": stored(dice, table(facts), folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline_events, "LARGE", 1)
        got = join(table(asked), plan, sources, at=at, workers=dice.choice([1, 2, 3]))
    expected = slow(asked, with_hashes(facts), source)
    return int(((got != expected) & ~(np.isnan(got) & np.isnan(expected))).sum())


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_newest_values_of_events_in_order_equal_the_slow_reference(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert differences(seed, tmp_path_factory.mktemp("parts")) == 0


def test_events_in_order_go_the_short_way_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = random_rows(random.Random(0), 9)
    at = np.array([r["at"] for r in asked], dtype=np.int64)
    plan = FeaturePlan.of_views(views(AT_ONCE), AT_ONCE)
    facts = facts_in_order(random.Random(1), 30, ahead=False)
    whole = join(table(asked), plan, {"events": table(facts)}, at=at)
    turned = {"events": table(facts[::-1])}
    assert join(table(asked), plan, turned, at=at).tobytes() == whole.tobytes()

    def swept(*_: object) -> None:
        raise AssertionError("the long way")

    monkeypatch.setattr(point_in_time, "sweep_newest", swept)
    join(table(asked), plan, {"events": table(facts)}, at=at)
    with pytest.raises(AssertionError, match="long way"):
        join(table(asked), plan, turned, at=at)
