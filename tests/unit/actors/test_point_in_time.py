"""The join against the slow reference of `slow_join.py`."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.point_in_time import join
from raymill.runtime.errors import ContractError
from tests.unit.actors.slow_join import (
    PLAN,
    SECOND,
    VIEWS,
    corrected,
    event,
    random_events,
    random_rows,
    slow_join,
    table,
    with_hashes,
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**40), events=st.integers(0, 40), rows=st.integers(0, 25))
def test_join_equals_the_slow_reference_on_random_rows(seed: int, events: int, rows: int) -> None:
    dice = random.Random(seed)
    facts, asked = corrected(dice, random_events(dice, events)), random_rows(dice, rows)
    at = np.array([r["at"] for r in asked], dtype=np.int64)
    got = join(table(asked), PLAN, {"events": table(facts)}, at=at)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, slow_join(asked, with_hashes(facts), VIEWS))


@settings(max_examples=12, deadline=None)
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


@settings(max_examples=12, deadline=None)
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


def test_missing_table_or_column_is_named() -> None:
    with pytest.raises(ContractError, match="'events'"):
        join(table([]), PLAN, {}, at=np.array([], dtype=np.int64))
    with pytest.raises(ContractError, match="'tag'"):
        join(table([event()]), PLAN, {"events": table([]).drop(["tag"])}, at=np.array([0]))


def test_plan_survives_json() -> None:
    again = FeaturePlan.from_json(PLAN.to_json())
    assert again == PLAN
    assert [v.digest for v in again.event_views] == [v.digest for v in PLAN.event_views]
    assert again.request_columns == ("place", "line", "x", "y", "tag")
    assert again.names[0] == "place.count"
