"""Features at length: ten thousand random joins against the slow reference, a hundred thousand replayed requests."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.online import OnlineReader, OnlineStore
from raymill.actors.point_in_time import join
from raymill.runtime.expressions import col, greatest, when
from raymill.runtime.row_functions import python
from raymill.runtime.spec import FeatureView, OnDemand
from tests.unit.actors import slow_join as offline
from tests.unit.actors import test_lookups as lookups
from tests.unit.actors import test_online as online

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


DELAY, LINE = col("delay"), col("line")
FUNCTION = python(offline.gap, DELAY, LINE, 0.5)
MORE_VIEWS = [
    FeatureView(
        "functions",
        online.RIDES,
        entity="stop",
        max_age="40m",
        features={
            "std": DELAY.std("1h"),
            "soft": DELAY.abs().log1p().std("2h"),
            "filled": DELAY.fill_null(-1) - LINE.is_null(),
            "choice": when(DELAY.std("30m") > 2, DELAY.clip(0, 5), greatest(DELAY.min("1h"), -0.5)),
            "python": FUNCTION,
            "python_mean": FUNCTION.mean("1h"),
            "some": LINE.one_of("a", "c").sum("1h"),
        },
    ),
    OnDemand("request", {"function": FUNCTION, "root": (~(DELAY > 1)).fill_null(2).sqrt()}),
]


def test_ten_thousand_random_joins_equal_the_slow_reference() -> None:
    for case in range(10_000):
        dice = random.Random(case)
        facts = offline.corrected(dice, offline.random_events(dice, dice.randrange(41)))
        if dice.random() < 0.3:  # events in the order of their time take another way
            facts.sort(key=lambda e: e["happened"])
        asked = offline.random_rows(dice, dice.randrange(26))
        at = np.array([r["at"] for r in asked], dtype=np.int64)
        got = join(offline.table(asked), offline.PLAN, {"events": offline.table(facts)}, at=at)
        expected = offline.slow_join(asked, offline.with_hashes(facts), offline.VIEWS)
        np.testing.assert_array_equal(got, expected, err_msg=f"case {case}")


def test_hundred_thousand_replayed_requests_have_the_offline_vectors_bit_for_bit(tmp_path: Path) -> None:
    plan = FeaturePlan.of_views([*online.VIEWS, *online.NEWEST_VIEWS, *MORE_VIEWS], online.RIDES)
    store = OnlineStore(tmp_path / "online", plan, keep="12h")
    facts = online.table(online.rides(random.Random(1), 100_000))
    at = online.moments(facts)
    expected = join(facts, plan, {"rides": facts}, at="left")
    ask = OnlineReader(tmp_path / "online", plan)
    first = 0
    while first < len(facts):
        last = min(first + 300, len(facts) - 1)
        end = int(np.searchsorted(at, at[last], side="right"))  # whatever happened at the same moment is in already
        batch = facts.slice(first, end - first)
        store.ingest("rides", batch)
        got = ask.vectors(batch, at[first:end])
        assert got.tobytes() == expected[first:end].tobytes(), f"rows from {first}"
        first = end
    ask.close()
    store.close()


def test_two_thousand_random_chains_of_lookups_are_the_same_on_both_sides(tmp_path: Path) -> None:
    for seed in range(2000):
        lookups.assert_both_sides(seed, tmp_path / str(seed))
        shutil.rmtree(tmp_path / str(seed))
