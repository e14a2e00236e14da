"""The join against the slow reference of `slow_join.py`, and its single answers."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.point_in_time import join
from raymill.runtime.errors import ContractError, SpecError
from raymill.runtime.expressions import col
from raymill.runtime.spec import FeatureView
from tests.unit.actors.slow_join import (
    EVENTS,
    PLAN,
    SECOND,
    VIEWS,
    corrected,
    random_events,
    random_rows,
    slow_join,
    table,
    with_hashes,
)


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 2**40), events=st.integers(0, 40), rows=st.integers(0, 25))
def test_join_equals_the_slow_reference_on_random_rows(seed: int, events: int, rows: int) -> None:
    dice = random.Random(seed)
    facts, asked = corrected(dice, random_events(dice, events)), random_rows(dice, rows)
    at = np.array([r["at"] for r in asked], dtype=np.int64)
    got = join(table(asked), PLAN, {"events": table(facts)}, at=at)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, slow_join(asked, with_hashes(facts), VIEWS))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_features_do_not_change_when_rows_become_known_later(seed: int) -> None:
    dice = random.Random(seed)
    facts, asked = corrected(dice, random_events(dice, 40)), random_rows(dice, 20)
    t = dice.randrange(5, 30) * SECOND
    at = np.full(len(asked), t, dtype=np.int64)
    known = [e for e in facts if e["known"] is not None and e["known"] <= t and e["happened"] <= t]
    now = join(table(asked), PLAN, {"events": table(known)}, at=at)
    later = join(table(asked), PLAN, {"events": table(facts)}, at=at)
    assert now.tobytes() == later.tobytes()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_order_of_rows_and_of_arrival_does_not_matter(seed: int) -> None:
    dice = random.Random(seed)
    facts, asked = corrected(dice, random_events(dice, 40)), random_rows(dice, 20)
    at = np.array([r["at"] for r in asked], dtype=np.int64)
    one = join(table(asked), PLAN, {"events": table(facts)}, at=at)
    dice.shuffle(facts)
    assert join(table(asked), PLAN, {"events": table(facts)}, at=at).tobytes() == one.tobytes()
    alone = [join(table([r]), PLAN, {"events": table(facts)}, at=np.array([r["at"]])) for r in asked[:5]]
    assert np.concatenate(alone).tobytes() == one[:5].tobytes()


# -- single answers ----------------------------------------------------------------------------------------------


def event(**values: Any) -> dict[str, Any]:
    base = {"id": "e", "happened": 0, "known": 0, "place": "a", "line": 1, "x": 1.0, "y": 1.0, "tag": "a"}
    return {**base, **values}


def ask(features: dict[str, Any], events: list[dict[str, Any]], at: int, **view: Any) -> list[float]:
    plan = FeaturePlan.of_views([FeatureView("v", EVENTS, entity="place", features=features, **view)], EVENTS)
    return join(table([event()]), plan, {"events": table(events)}, at=np.array([at]))[0].tolist()


def test_window_is_open_at_its_old_end_and_closed_at_the_new_one() -> None:
    counts = {"n": col("x").count("5s")}
    assert ask(counts, [event()], -1) == [0.0]
    assert ask(counts, [event()], 0) == [1.0]
    assert ask(counts, [event()], 5 * SECOND - 1) == [1.0]
    assert ask(counts, [event()], 5 * SECOND) == [0.0]


def test_max_age_is_inclusive_to_the_microsecond() -> None:
    assert ask({"x": col("x")}, [event()], 3 * SECOND, max_age="3s") == [1.0]
    assert math.isnan(ask({"x": col("x")}, [event()], 3 * SECOND + 1, max_age="3s")[0])


def test_newest_value_is_null_when_the_newest_row_has_none_but_last_skips_it() -> None:
    facts = [event(), event(id="f", happened=1, known=1, x=None)]
    newest, last = ask({"x": col("x"), "last": col("x").last("9s")}, facts, 2)
    assert math.isnan(newest)
    assert last == 1.0


def test_sum_is_null_while_a_value_too_large_to_be_exact_is_in_the_window() -> None:
    facts = [event(x=2.0**42), event(id="f", happened=SECOND, known=SECOND, x=0.5)]
    sums = {"s": col("x").sum("5s"), "max": col("x").max("5s")}
    assert math.isnan(ask(sums, facts, SECOND)[0])
    assert ask(sums, facts, SECOND)[1] == 2.0**42
    assert ask(sums, facts, 5 * SECOND)[0] == 0.5


def test_sums_of_large_values_of_both_signs_stay_exact() -> None:
    facts = [event(id=str(i), x=x) for i, x in enumerate([2.0**41, 2.0**41, 2.0**41, 0.25, *[-(2.0**41)] * 3])]
    assert ask({"s": col("x").sum("5s")}, facts, 0) == [0.25]


def test_string_timestamp_and_calendar_features_work_and_senseless_ones_are_refused() -> None:
    day = 86400 * SECOND
    features = {
        "weekday": col("happened").weekday(),
        "month": col("happened").last("9d").month(),
        "is_a": col("tag").eq("a"),
    }
    assert ask(features, [event(happened=day * 31, known=day * 31)], day * 32) == [6.0, 2.0, 1.0]
    for wrong in (col("tag"), col("tag") + 1, col("tag").mean("5s"), col("x").hour(), col("tag") > 3):
        with pytest.raises(SpecError, match=r"v\.f"):
            ask({"f": wrong}, [], 0)


def test_missing_table_or_column_is_named() -> None:
    with pytest.raises(ContractError, match="'events'"):
        join(table([]), PLAN, {}, at=np.array([], dtype=np.int64))
    with pytest.raises(ContractError, match="'tag'"):
        join(table([event()]), PLAN, {"events": table([]).drop(["tag"])}, at=np.array([0]))


def test_plan_survives_json() -> None:
    again = FeaturePlan.from_json(PLAN.to_json())
    assert again == PLAN
    assert [v.digest for v in again.event_views] == [v.digest for v in PLAN.event_views]
    assert again.request_columns == ("place", "line", "x", "y")
    assert again.names[0] == "place.count"
