"""The join against a slow, obviously right reference: loops over events, one row and one feature at a time."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.entities import key_hashes
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.point_in_time import join
from raymill.runtime.errors import ContractError, SpecError
from raymill.runtime.expressions import col, duration_us
from raymill.runtime.spec import Col, FeatureView, OnDemand, Source

UTC = pa.timestamp("us", "UTC")
SECOND = 1_000_000
EVENTS = Source(
    "events",
    key=["id"],
    time="happened",
    known_at="known",
    schema={
        "id": Col("string"),
        "happened": Col("timestamp"),
        "known": Col("timestamp", nullable=True),
        "place": Col("string", nullable=True),
        "line": Col("int64", nullable=True),
        "x": Col("float64", nullable=True),
        "y": Col("float64", nullable=True),
        "tag": Col("string", nullable=True),
    },
)
AGGREGATES = ("count", "sum", "mean", "min", "max", "last")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("happened", UTC),
        ("known", UTC),
        ("place", pa.string()),
        ("line", pa.int64()),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("tag", pa.string()),
    ]
)


def windows_of(operand: Any, width: str) -> dict[str, Any]:
    return {name: getattr(operand, name)(width) for name in AGGREGATES}


VIEWS = [
    FeatureView("place", EVENTS, entity="place", features=windows_of(col("x"), "5s")),
    FeatureView(
        "both",
        EVENTS,
        entity=["place", "line"],
        features={**windows_of(col("x") / col("y"), "20s"), "tagged": (col("tag").eq("a")).mean("20s")},
    ),
    FeatureView("aged", EVENTS, entity="place", max_age="3s", features={"x": col("x"), "twice": col("x") * 2}),
    FeatureView("newest", EVENTS, entity="line", features=["x", "y"]),
    FeatureView(
        "mixed", EVENTS, entity="line", features={"gap": col("x").mean("4s") - col("x"), "n": col("tag").count("9s")}
    ),
    OnDemand("now", {"above": col("x") > col("y"), "second": col("x") + 1}),
]
PLAN = FeaturePlan.of_views(VIEWS, EVENTS)


# -- the reference -----------------------------------------------------------------------------------------------


def slow_value(expr: list[Any], row: dict[str, Any]) -> Any:
    head, *rest = expr
    if head == "col":
        return row[rest[0]]
    if head == "const":
        return rest[0]
    left, right = (slow_value(e, row) for e in rest)
    if left is None or right is None:
        return None
    if head == "/":
        return None if right == 0 else left / right
    return {
        "+": lambda: left + right,
        "-": lambda: left - right,
        "*": lambda: left * right,
        ">": lambda: float(left > right),
        "==": lambda: float(left == right),
    }[head]()


def slow_aggregate(name: str, values: list[Any]) -> float | None:
    """`values` from the oldest to the newest."""
    if name == "count":
        return float(len(values))
    fixed = [Fraction(round(Fraction(v) * 2**20), 2**20) for v in values] if name in ("sum", "mean") else []
    if name == "sum":
        return float(sum(fixed))
    if not values:
        return None
    return {
        "mean": lambda: float(sum(fixed)) / len(fixed),
        "min": lambda: min(values),
        "max": lambda: max(values),
        "last": lambda: values[-1],
    }[name]()


def slow_feature(expr: list[Any], events: list[dict[str, Any]], t: int, max_age: int | None) -> float | None:
    """One feature of one row: `events` are those of its entity."""
    known = [e for e in events if e["known"] is not None and e["known"] <= t and e["happened"] <= t]
    known.sort(key=lambda e: (e["happened"], e["known"], e["hash"]))
    head, *rest = expr
    if head in AGGREGATES:
        inside = [slow_value(rest[0], e) for e in known if e["happened"] > t - rest[1]]
        return slow_aggregate(head, [v for v in inside if v is not None])
    if head == "-" and rest[0][0] in AGGREGATES:
        left, right = slow_feature(rest[0], events, t, max_age), slow_feature(rest[1], events, t, max_age)
        return None if left is None or right is None else left - right
    if not known or (max_age is not None and t - known[-1]["happened"] > max_age):
        return None
    return slow_value(expr, known[-1])


def slow_join(rows: list[dict[str, Any]], events: list[dict[str, Any]], views: list[Any]) -> np.ndarray:
    out = []
    for row in rows:
        vector: list[float | None] = []
        for view in views:
            if isinstance(view, OnDemand):
                vector += [slow_value(e.to_json(), row) for e in view.features.values()]
                continue
            key = [row[c] for c in view.entity_columns]
            mine = [e for e in events if None not in key and [e[c] for c in view.entity_columns] == key]
            age = duration_us(view.max_age) if view.max_age else None
            vector += [slow_feature(e.to_json(), mine, row["at"], age) for e in view.definitions.values()]
        out.append([math.nan if v is None else v for v in vector])
    return np.array(out, dtype=np.float64).reshape(len(rows), len(PLAN.names)).astype(np.float32)


# -- random cases ------------------------------------------------------------------------------------------------


def random_events(dice: random.Random, n: int, span: int = 30) -> list[dict[str, Any]]:
    events = []
    for i in range(n):
        happened = dice.randrange(span) * SECOND
        late = dice.choice([0, 0, 1, 5, 12, -3]) * SECOND
        events.append(
            {
                "id": f"r{i}",
                "happened": happened,
                "known": None if dice.random() < 0.1 else happened + late,
                "place": dice.choice(["a", "b", None]),
                "line": dice.choice([1, 2, None]),
                "x": dice.choice([None, 0.0, -0.0, 0.1, 1 / 3, -2.5, 1e6, 7.0, 2**-21]),
                "y": dice.choice([None, 0.0, 1.0, 3.0]),
                "tag": dice.choice([None, "a", "b"]),
            }
        )
    return events


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def with_hashes(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    hashes = key_hashes(table(events), PLAN.row.key, PLAN.row.dtypes).tolist()
    return [{**e, "hash": h} for e, h in zip(events, hashes, strict=True)]


def random_rows(dice: random.Random, n: int) -> list[dict[str, Any]]:
    rows = random_events(dice, n)
    for row in rows:
        row["at"] = dice.randrange(-2, 50) * SECOND + dice.choice([0, 0, 0, -1, 1])
    return rows


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 2**40), events=st.integers(0, 40), rows=st.integers(0, 25))
def test_join_equals_the_slow_reference_on_random_rows(seed: int, events: int, rows: int) -> None:
    dice = random.Random(seed)
    facts, asked = random_events(dice, events), random_rows(dice, rows)
    at = np.array([r["at"] for r in asked], dtype=np.int64)
    got = join(table(asked), PLAN, {"events": table(facts)}, at=at)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, slow_join(asked, with_hashes(facts), VIEWS))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_features_do_not_change_when_rows_become_known_later(seed: int) -> None:
    dice = random.Random(seed)
    facts, asked = random_events(dice, 40), random_rows(dice, 20)
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
    facts, asked = random_events(dice, 40), random_rows(dice, 20)
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
