"""What a feature means, one answer a test, each asked of the join and of the online store; docs/data.md names them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.online import OnlineReader, OnlineStore
from raymill.actors.point_in_time import join
from raymill.runtime.errors import SpecError
from raymill.runtime.expressions import AGGREGATES, col, when
from raymill.runtime.row_functions import python
from raymill.runtime.spec import FeatureView
from tests.unit.actors.slow_join import EVENTS, SECOND, event, gap, slow_aggregate, table, windows_of

NULL = None
X = col("x")


def on_both_sides(
    plan: FeaturePlan, rows: pa.Table, events: pa.Table, at: np.ndarray, batches: int = 2
) -> list[list[float | None]]:
    """Features of rows, None for null: from the join and, the same bit for bit, from a store fed backwards."""
    offline = join(rows, plan, {"events": events}, at=at)
    with tempfile.TemporaryDirectory() as folder:
        store = OnlineStore(Path(folder) / "online", plan, keep="400d")
        size = -(-max(len(events), 1) // batches)
        for first in reversed(range(0, max(len(events), 1), size)):
            store.ingest("events", events.slice(first, size))
        reader = OnlineReader(Path(folder) / "online", plan)
        online = reader.vectors(rows, at)
        reader.close()
        store.close()
    assert online.tobytes() == offline.tobytes()
    return [[None if math.isnan(v) else v for v in row] for row in offline.tolist()]


def ask(
    features: dict[str, Any], events: list[dict[str, Any]], *moments: int, **view: Any
) -> list[float | None] | list[list[float | None]]:
    """The features of entity `place = a` at one moment, or at several."""
    plan = FeaturePlan.of_views([FeatureView("v", EVENTS, entity="place", features=features, **view)], EVENTS)
    found = on_both_sides(plan, table([event()] * len(moments)), table(events), np.array(moments, dtype=np.int64))
    return found[0] if len(moments) == 1 else found


def one(feature: Any, events: list[dict[str, Any]], *moments: int, **view: Any) -> list[float | None]:
    """One feature at every moment."""
    found = ask({"f": feature}, events, *moments, 10**9 * SECOND, **view)
    return [row[0] for row in found[:-1]]  # type: ignore[index]


def test_window_is_open_at_its_old_end_and_closed_at_the_new_one() -> None:
    assert one(X.count("5s"), [event()], -1, 0, 5 * SECOND - 1, 5 * SECOND) == [0, 1, 1, 0]


def test_late_row_counts_from_the_moment_it_is_known_and_leaves_by_its_event_time() -> None:
    late = [event(known=3 * SECOND)]
    assert one(X.count("5s"), late, 0, 3 * SECOND - 1, 3 * SECOND, 5 * SECOND - 1, 5 * SECOND) == [0, 0, 1, 1, 0]
    assert one(X, late, 3 * SECOND - 1, 3 * SECOND, 99 * SECOND) == [NULL, 1, 1]
    assert one(X.count("5s"), [event(known=5 * SECOND)], 5 * SECOND) == [0]  # known when it has left already


def test_row_known_before_it_happens_counts_from_its_event_time() -> None:
    assert one(X, [event(happened=4 * SECOND, known=0)], 4 * SECOND - 1, 4 * SECOND) == [NULL, 1]


def test_row_without_known_at_is_never_known() -> None:
    assert one(X.count("5s"), [event(known=None)], 0, SECOND) == [0, 0]
    assert one(X, [event(known=None)], SECOND) == [NULL]


def test_max_age_is_inclusive_to_the_microsecond() -> None:
    assert one(X, [event()], 3 * SECOND, 3 * SECOND + 1, max_age="3s") == [1, NULL]


def test_max_age_is_of_the_event_time_whenever_the_row_became_known() -> None:
    assert one(X, [event(known=2 * SECOND)], 3 * SECOND, 3 * SECOND + 1, max_age="3s") == [1, NULL]


def test_newest_is_by_event_time_then_known_at_then_hash_of_the_key_whatever_the_order_of_arrival() -> None:
    by_time = [event(id="a", happened=2, known=9, x=2.0), event(id="b", happened=1, known=10, x=1.0)]
    by_known = [event(id="a", known=5, x=1.0), event(id="b", known=4, x=2.0)]
    same = [event(id=i, x=float(n)) for n, i in enumerate("abcdefg")]
    for feature in (X, X.last("9s")):
        assert one(feature, by_time, 20) == one(feature, by_time[::-1], 20) == [2]
        assert one(feature, by_known, 20) == one(feature, by_known[::-1], 20) == [1]
        assert one(feature, same, 20) == one(feature, same[::-1], 20)


def test_null_operands_are_in_no_window_and_a_null_newest_value_is_null_but_last_skips_it() -> None:
    facts = [event(), event(id="f", happened=1, known=1, x=None)]
    assert ask({"x": X, **windows_of(X, "9s")}, facts, 2) == [NULL, 1, 1, 1, NULL, 1, 1, 1]


def test_null_entity_matches_nothing_and_its_row_is_kept() -> None:
    plan = FeaturePlan.of_views(
        [FeatureView("v", EVENTS, entity=["place", "line"], features={"n": X.count("9s"), "x": X})], EVENTS
    )
    facts = table([event(), event(id="f", line=None), event(id="g", place=None)])
    rows = table([event(), event(line=None), event(place=None), event(place="z")])
    assert on_both_sides(plan, rows, facts, np.zeros(4, dtype=np.int64)) == [[1, 1], [0, NULL], [0, NULL], [0, NULL]]


def test_row_that_came_twice_counts_once() -> None:
    assert ask({"n": X.count("9s"), "s": X.sum("9s")}, [event(), event(), event(id="f")] * 3, 0) == [2, 2]


def test_corrected_row_stands_in_place_of_the_earlier_one_from_when_it_is_known() -> None:
    facts = [
        event(id="a", x=4.0),
        event(id="b", happened=1, known=1, x=1.0),
        event(id="b", happened=1, known=3, x=10.0),
        event(id="b", happened=1, known=6, x=2.0),
    ]
    features = {"x": X, **windows_of(X, "1s")}
    before, after, again = ask(features, facts, 2, 3, 6)  # type: ignore[misc]
    root = math.sqrt
    assert before == [1, *map(np.float32, (2, 5, 2.5, root(4.5), 1, 4, 1))]
    assert after == [10, *map(np.float32, (2, 14, 7, root(18), 4, 10, 10))]
    assert again == [2, *map(np.float32, (2, 6, 3, root(2), 2, 4, 2))]


def test_correction_to_null_takes_the_row_out_of_windows_and_last_is_what_was_before() -> None:
    facts = [event(id="a", x=4.0), event(id="b", happened=1, known=1, x=1.0)]
    facts += [event(id="b", happened=1, known=3, x=None)]
    assert ask({"x": X, **windows_of(X, "1s")}, facts, 3) == [NULL, 1, 4, 4, NULL, 4, 4, 4]


def test_correction_of_another_event_time_or_entity_is_another_event() -> None:
    facts = [event(), event(happened=1, known=5, x=2.0), event(known=5, place="b", x=3.0)]
    assert ask({"n": X.count("9s"), "s": X.sum("9s")}, facts, 6) == [2, 3]


def test_empty_window_is_0_for_count_and_sum_and_null_for_the_rest() -> None:
    empty = dict(zip(AGGREGATES, [0, 0, *[NULL] * 5], strict=True))
    for facts in ([], [event(x=None)], [event(place="b")]):
        assert dict(zip(AGGREGATES, ask(windows_of(X, "9s"), facts, 0), strict=True)) == empty


def test_std_is_of_a_sample_and_null_for_fewer_than_two_values() -> None:
    facts = [event(id=str(i), happened=i, known=i, x=float(x)) for i, x in enumerate((2, 4, 4, 4, 5, 5, 7, 9))]
    assert one(X.std("9s"), facts, 0, 1, 7) == [NULL, np.float32(math.sqrt(2)), np.float32(math.sqrt(32 / 7))]
    assert one(X.std("9s"), [event(id=str(i), x=0.1) for i in range(9)], 0) == [0]


def test_std_is_exact_where_the_mean_is_large_and_the_spread_small() -> None:
    facts = [event(id=str(i), x=2.0**41 + i) for i in range(3)]
    assert one(X.std("9s"), facts, 0) == [1]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**42), 2.0**42, exclude_min=True, exclude_max=True), max_size=12),
    shift=st.sampled_from([0.0, 1e-3, -1e6, 4e11]),
)
def test_sum_mean_and_std_of_any_values_are_those_of_exact_arithmetic(values: list[float], shift: float) -> None:
    values = [v + shift if abs(v + shift) < 2**42 else v for v in values]
    facts = table([event(id=str(i), x=v) for i, v in enumerate(values)])
    features = {name: getattr(X, name)("1s") for name in ("sum", "mean", "std")}
    plan = FeaturePlan.of_views([FeatureView("v", EVENTS, entity="place", features=features)], EVENTS)
    got = join(table([event()]), plan, {"events": facts}, at=np.zeros(1, dtype=np.int64))[0]
    expected = [slow_aggregate(name, values) for name in features]
    np.testing.assert_array_equal(got, np.array([math.nan if v is None else v for v in expected], np.float32))


def test_sum_mean_and_std_are_null_while_a_value_too_large_to_be_exact_is_in_the_window() -> None:
    facts = [event(x=2.0**42), event(id="f", happened=SECOND, known=SECOND, x=0.5)]
    sums = {"s": X.sum("5s"), "mean": X.mean("5s"), "std": X.std("5s"), "n": X.count("5s"), "max": X.max("5s")}
    assert ask(sums, facts, SECOND) == [NULL, NULL, NULL, 2, 2.0**42]
    assert ask(sums, facts, 5 * SECOND) == [0.5, 0.5, NULL, 1, 0.5]


def test_sums_of_large_values_of_both_signs_stay_exact() -> None:
    facts = [event(id=str(i), x=x) for i, x in enumerate([2.0**41, 2.0**41, 2.0**41, 0.25, *[-(2.0**41)] * 3])]
    assert one(X.sum("5s"), facts, 0) == [0.25]


def local(zone: str, *wall: int) -> datetime:
    return datetime(2013, *wall, tzinfo=ZoneInfo(zone))  # type: ignore[misc]


@pytest.mark.parametrize("zone", ["America/New_York", "UTC"])
def test_windows_are_of_elapsed_time_and_a_zone_is_only_a_way_to_write_a_moment(zone: str) -> None:
    """On 10 March 2013 New York had no 02:30; on 3 November it had two."""
    moments = [local("America/New_York", 3, 9, 12), local("America/New_York", 3, 10, 12)]
    autumn = [local("America/New_York", 11, 3, 1, 30), local("America/New_York", 11, 3, 1, 30).replace(fold=1)]
    stamps = pa.array([int(m.astimezone(UTC).timestamp()) * SECOND for m in moments + autumn])
    times = stamps.cast(pa.timestamp("us", "UTC")).cast(pa.timestamp("us", zone))
    facts = table([event(id=str(i)) for i in range(4)])
    for name in ("happened", "known"):
        facts = facts.set_column(facts.column_names.index(name), name, times)
    plan = FeaturePlan.of_views(
        [FeatureView("v", EVENTS, entity="place", features={"day": X.count("1d"), "hours": X.count("23h")})], EVENTS
    )
    at = np.array(stamps)
    # 23 hours passed between noon and noon in March; an hour between 01:30 and 01:30 in November.
    assert on_both_sides(plan, table([event()] * 4), facts, at) == [[1, 1], [2, 1], [1, 1], [2, 2]]


def test_calendar_parts_are_of_utc() -> None:
    day = 86400 * SECOND
    features = {
        "hour": col("happened").hour(),
        "weekday": col("happened").weekday(),
        "month": col("happened").last("9d").month(),
        "is_a": col("tag").eq("a"),
    }
    facts = [event(happened=day * 31 + 3600 * SECOND, known=day * 31 + 3600 * SECOND)]
    assert ask(features, facts, day * 32) == [1, 6, 2, 1]


def test_what_is_not_known_is_null_for_whatever_reason_and_fill_null_and_is_null_see_it() -> None:
    features = {"filled": X.fill_null(-1), "unknown": X.is_null(), "mean": X.mean("2s").fill_null(-2)}
    assert ask(features, [], 0) == [-1, 1, -2]
    assert ask(features, [event(x=None)], 0) == [-1, 1, -2]
    assert ask(features, [event()], 9 * SECOND, max_age="3s") == [-1, 1, -2]
    assert ask(features, [event()], 0) == [1, 0, 1]
    choice = when(X > 0, X, col("y"))
    assert ask({"f": choice, "n": X.fill_null(0).count("9s")}, [event(x=None), event(id="f", known=None)], 0) == [
        NULL,
        1,
    ]


def test_python_function_gets_the_values_of_a_row_or_is_not_called_where_no_row_is_known() -> None:
    function = python(gap, X.fill_null(4), col("tag"), 0.5)
    assert one(function, [event(x=None)], -1, 0, 9 * SECOND, max_age="3s") == [NULL, 1.5, NULL]
    assert one(function.fill_null(-1), [event(x=None)], -1, 0, 9 * SECOND, max_age="3s") == [-1, 1.5, -1]
    assert one(python(gap, X.mean("5s"), "b", 2), [event(), event(id="f", x=2.0)], 0, 5 * SECOND) == [1, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: col("tag"),
        lambda: col("tag") + 1,
        lambda: col("tag").mean("5s"),
        lambda: col("x").hour(),
        lambda: col("tag") > 3,
        lambda: col("tag").abs(),
        lambda: col("tag").fill_null("b").eq("b"),
        lambda: col("happened").log1p(),
        lambda: when(X > 0, col("happened"), X),
        lambda: python(gap, X.mean("5s"), col("tag"), 2),
    ],
)
def test_expressions_without_meaning_are_refused_by_the_features_name(wrong: Callable[[], Any]) -> None:
    with pytest.raises(SpecError, match=r"v\.f"):
        ask({"f": wrong()}, [], 0)
