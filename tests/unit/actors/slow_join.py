"""The slow, obviously right join: loops over events, one row and one feature at a time; and random cases for it."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa

from raymill.actors.entities import key_hashes
from raymill.actors.feature_plan import FeaturePlan
from raymill.runtime.expression_json import from_json
from raymill.runtime.expressions import AGGREGATES, col, duration_us, greatest, least, when
from raymill.runtime.row_functions import python
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


def gap(x: float | None, tag: str | None, scale: float) -> float | bool | None:
    """A Python function as a user writes one."""
    if x is None:
        return tag == "a"
    return None if tag is None else (x - len(tag)) * scale


FUNCTIONS = {"gap": gap}
GAP = python(gap, col("x"), col("tag"), 0.5)


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
        "functions",
        EVENTS,
        entity="place",
        max_age="9s",
        features={
            "soft": col("x").abs().log1p().std("9s"),
            "filled": col("x").fill_null(col("y")).sum("9s"),
            "known": col("x").fill_null(-1) + col("tag").is_null(),
            "choice": when(col("x").mean("4s").is_null(), col("y"), col("x").clip(-1, 3)),
            "bounds": greatest(least(col("x"), col("y")).max("9s"), (~(col("x") > 1)).mean("20s")),
            "root": (-col("x")).sqrt() + col("y").floor(),
            "python": GAP,
            "python_mean": GAP.mean("20s"),
            "one": col("tag").one_of("b", "c").sum("9s") - col("y").one_of(1, 3).count("9s"),
        },
    ),
    FeatureView(
        "mixed", EVENTS, entity="line", features={"gap": col("x").mean("4s") - col("x"), "n": col("tag").count("9s")}
    ),
    OnDemand(
        "now",
        {"above": col("x") > col("y"), "second": col("x") + 1, "function": GAP, "root": col("x").fill_null(2).sqrt()},
    ),
]
PLAN = FeaturePlan.of_views(VIEWS, EVENTS)


# -- the reference -----------------------------------------------------------------------------------------------


def slow_value(expr: list[Any], row: dict[str, Any]) -> Any:
    """A row expression, given as JSON, of one row; None for null."""
    head, *rest = expr
    if head == "col":
        return row[rest[0]]
    if head == "const":
        return rest[0]
    if head == "python":
        return FUNCTIONS[rest[0].partition(":")[2]](*(slow_value(e, row) for e in rest[2:]))
    return slow_call(head, [slow_value(e, row) for e in rest])


def slow_call(head: str, values: list[Any]) -> Any:
    """A function of values, None for null."""
    if head == "is_null":
        return float(values[0] is None)
    if head == "fill_null":
        return values[1] if values[0] is None else values[0]
    if head == "when":
        return None if values[0] is None else values[1 if values[0] else 2]
    if None in values:
        return None
    x, y = values[0], values[-1]
    found = {
        "+": lambda: x + y,
        "-": lambda: x - y,
        "*": lambda: x * y,
        "/": lambda: x / y if y else None,
        ">": lambda: x > y,
        ">=": lambda: x >= y,
        "<": lambda: x < y,
        "<=": lambda: x <= y,
        "==": lambda: x == y,
        "!=": lambda: x != y,
        "and": lambda: x != 0 and y != 0,
        "or": lambda: x != 0 or y != 0,
        "not": lambda: x == 0,
        "abs": lambda: abs(x),
        "log1p": lambda: math.log1p(x) if x > -1 else None,
        "sqrt": lambda: math.sqrt(x) if x >= 0 else None,
        "floor": lambda: math.floor(x),
        "least": lambda: min(x, y),
        "greatest": lambda: max(x, y),
    }[head]()
    return None if found is None or not math.isfinite(found) else float(found)


def slow_aggregate(name: str, values: list[Any]) -> float | None:
    """`values` from the oldest to the newest."""
    if name == "count":
        return float(len(values))
    fixed = [round(Fraction(v) * 2**20) for v in values] if name in ("sum", "mean", "std") else []
    n = len(values)
    if name == "sum":
        return float(Fraction(sum(fixed), 2**20))
    if n < (2 if name == "std" else 1):
        return None
    return {
        "mean": lambda: float(Fraction(sum(fixed), 2**20)) / n,
        "std": lambda: math.sqrt((n * sum(f * f for f in fixed) - sum(fixed) ** 2) / (n * (n - 1))) / 2**20,
        "min": lambda: min(values),
        "max": lambda: max(values),
        "last": lambda: values[-1],
    }[name]()


def versions(known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows with one key and event time the one that became known last; rows that came twice once."""
    latest: dict[tuple[Any, Any], dict[str, Any]] = {}
    for e in known:
        key = (e["id"], e["happened"])
        if key not in latest or e["known"] > latest[key]["known"]:
            latest[key] = e
    return sorted(latest.values(), key=lambda e: (e["happened"], e["known"], e["hash"]))


def slow_feature(expr: list[Any], events: list[dict[str, Any]], t: int, max_age: int | None) -> float | None:
    """One feature of one row: `events` are those of its entity."""
    known = versions([e for e in events if e["known"] is not None and e["known"] <= t and e["happened"] <= t])
    head, *rest = expr
    if head in AGGREGATES:
        inside = [slow_value(rest[0], e) for e in known if e["happened"] > t - rest[1]]
        return slow_aggregate(head, [v for v in inside if v is not None])
    tree = from_json(expr)
    if tree.windows() or any(n.to_json()[0] in ("is_null", "fill_null") for n in tree.walk()):  # worked out last
        return slow_call(head, [slow_feature(e, events, t, max_age) for e in rest])
    if head == "const":
        return rest[0]
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


def corrected(dice: random.Random, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events, some of which come again: the same row, or the row with other values, known at another time."""
    again = dice.sample(events, dice.randrange(len(events) // 2 + 1))
    found = events + again[::3]
    for e in again[1::3] + again[2::3]:
        if e["known"] is not None:
            moved = {"place": dice.choice("ab")} if dice.random() < 0.1 else {}
            values = {"x": dice.choice([None, 0.25, 7.0]), "y": 1.0, "tag": "a"} | moved
            known = e["known"] + dice.choice([-7, -1, 1, 2, 5, 11]) * SECOND
            found += [{**e, **values, "known": known}]
            if dice.random() < 0.3:  # and once more
                found += [{**e, "known": known + 3 * SECOND + 1}]
    dice.shuffle(found)
    return found


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


def event(**values: Any) -> dict[str, Any]:
    base = {"id": "e", "happened": 0, "known": 0, "place": "a", "line": 1, "x": 1.0, "y": 1.0, "tag": "a"}
    return {**base, **values}
