"""Joins of views: an entity that the row lacks is looked up as of its moment, the same by the join and online."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.feature_statistics import unseen_shares
from raymill.actors.online import OnlineReader, OnlineStore
from raymill.actors.point_in_time import join
from raymill.runtime.errors import ContractError, SpecError
from raymill.runtime.expressions import col
from raymill.runtime.spec import Col, FeatureView, Lookup, Source
from tests.unit.actors.slow_join import SECOND, versions

UTC = pa.timestamp("us", "UTC")
TIMES = {"id": Col("string"), "happened": Col("timestamp"), "known": Col("timestamp", nullable=True)}


def source_of(name: str, **columns: Any) -> Source:
    return Source(name, key=["id"], time="happened", known_at="known", schema={**TIMES, **columns})


INT, TEXT = Col("int64", nullable=True), Col("string", nullable=True)
ASKS = Source("asks", key=["id"], time="at", schema={"id": Col("string"), "at": Col("timestamp"), "order": INT})
ORDERS = source_of("orders", order=INT, customer=TEXT)
CUSTOMERS = source_of("customers", customer=TEXT, region=INT)
SPENDING = source_of("spending", customer=TEXT, x=Col("float64", nullable=True))
WEATHER = source_of("weather", region=INT, x=Col("float64", nullable=True))
TO_CUSTOMER = Lookup(ORDERS, entity="order", column="customer", max_age="20s")
TO_REGION = Lookup(CUSTOMERS, entity="customer", column="region")
SPENT = {"sum": col("x").sum("9s"), "last": col("x"), "n": col("x").count("30s")}
VIEWS = [
    FeatureView("spent", SPENDING, entity="customer", features=SPENT, through=TO_CUSTOMER),
    FeatureView("weather", WEATHER, entity="region", features=["x"], max_age="9s", through=[TO_CUSTOMER, TO_REGION]),
]
PLAN = FeaturePlan.of_views(VIEWS, ASKS)
NAMES = ["ana", "bö", "c" * 300, None]
NUMBERS = [1, -(2**62), 2**62 + 1, 2**62, None]
COLUMNS: dict[str, list[Any]] = {
    "order": [1, 2, 2**60, None],
    "customer": NAMES,
    "region": NUMBERS,
    "x": [None, 1.0, 2.5, -3.0],
}


def table(source: Source, rows: list[dict[str, Any]]) -> pa.Table:
    kinds = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "timestamp": UTC}
    return pa.Table.from_pylist(rows, schema=pa.schema([(n, kinds[c.dtype]) for n, c in source.schema.items()]))


def some_facts(dice: random.Random, source: Source, n: int) -> list[dict[str, Any]]:
    """Late ones, lost ones, ties, corrected ones."""
    found: list[dict[str, Any]] = []
    for i in range(n):
        happened = dice.randrange(25) * SECOND
        known = None if dice.random() < 0.1 else happened + dice.choice([0, 0, 2, 7]) * SECOND
        values = {c: dice.choice(COLUMNS[c]) for c in source.schema if c in COLUMNS}
        found.append({"id": f"r{i}", "happened": happened, "known": known, "hash": 0, **values})
        if known is not None and dice.random() < 0.2:
            moved = {c: dice.choice(COLUMNS[c]) for c in list(values)[1:]}
            found.append({**found[-1], **moved, "known": known + 3 * SECOND + i})
    seen: dict[Any, dict[str, Any]] = {}
    for f in found:  # no two of the same event time and known-at: a hash that the reference does not know decides those
        seen.setdefault((f["happened"], f["known"]), f)
    return list(seen.values())


def newest(facts: list[dict[str, Any]], key: str, value: Any, t: int, age: int | None) -> dict[str, Any] | None:
    """The newest row of an entity known at t."""
    known = at(facts, key, value, t)
    return known[-1] if known and (age is None or t - known[-1]["happened"] <= age) else None


def at(facts: list[dict[str, Any]], key: str, value: Any, t: int) -> list[dict[str, Any]]:
    mine = [f for f in facts if value is not None and f[key] == value]
    return versions([f for f in mine if f["known"] is not None and f["known"] <= t and f["happened"] <= t])


def slow(facts: dict[str, list[dict[str, Any]]], order: Any, t: int) -> list[float]:
    """A row's features, hop by hop."""
    bought = newest(facts["orders"], "order", order, t, 20 * SECOND)
    customer = bought["customer"] if bought else None
    lives = newest(facts["customers"], "customer", customer, t, None)
    spent = at(facts["spending"], "customer", customer, t)
    inside = [[f["x"] for f in spent if f["happened"] > t - w * SECOND and f["x"] is not None] for w in (9, 30)]
    weather = newest(facts["weather"], "region", lives["region"] if lives else None, t, 9 * SECOND)
    last = [f["x"] if f else None for f in (spent[-1] if spent else None, weather)]
    found = [float(sum(inside[0])), last[0], float(len(inside[1])), last[1]]
    return [np.nan if v is None else v for v in found]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_entities_are_looked_up_hop_by_hop_as_of_each_rows_moment_on_both_sides(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert_both_sides(seed, tmp_path_factory.mktemp("online"))


def assert_both_sides(seed: int, folder: Path) -> None:
    """Random rows of every source: the join, the slow reference and the online store say the same."""
    dice = random.Random(seed)
    facts = {s.name: some_facts(dice, s, dice.randrange(30)) for s in (ORDERS, CUSTOMERS, SPENDING, WEATHER)}
    tables = {s.name: table(s, facts[s.name]) for s in (ORDERS, CUSTOMERS, SPENDING, WEATHER)}
    moments = [dice.randrange(-1, 45) * SECOND + dice.choice([0, 0, 1, -1]) for _ in range(20)]
    rows = [{"id": f"q{i}", "at": t, "order": dice.choice(COLUMNS["order"])} for i, t in enumerate(moments)]
    asked, when = table(ASKS, rows), np.array(moments, dtype=np.int64)
    offline = join(asked, PLAN, tables, at=when)
    np.testing.assert_array_equal(offline, np.array([slow(facts, r["order"], r["at"]) for r in rows], np.float32))
    store = OnlineStore(folder, PLAN, keep="1h")
    for name, whole in tables.items():
        half = len(whole) // 2
        for part in (whole.slice(half), whole.slice(0, half)):
            store.ingest(name, part)
    reader = OnlineReader(store._path, PLAN)
    assert reader.vectors(asked, when).tobytes() == offline.tobytes()
    assert reader.vectors(asked.slice(3, 1), when[3:4]).tobytes() == offline[3:4].tobytes()
    reader.close()
    store.close()


def test_what_a_request_must_carry_is_where_the_lookups_begin() -> None:
    assert PLAN.request_columns == ("order",)
    assert [v.name for v in PLAN.lookups] == ["customer", "region"]
    assert set(PLAN.sources) == {"orders", "customers", "spending", "weather"}
    assert set(PLAN.source_columns("orders")) == {"id", "happened", "known", "order", "customer"}
    again = FeaturePlan.from_json(PLAN.to_json())
    assert again == PLAN
    assert [v.digest for v in again.kept_views] == [v.digest for v in PLAN.kept_views]


def test_rebuilt_store_keeps_what_it_looks_up_and_a_row_without_the_column_is_named(tmp_path: Path) -> None:
    orders = [{"id": "o", "happened": 0, "known": 0, "order": 1, "customer": "ana"}]
    spent = [{"id": "s", "happened": 1, "known": 1, "customer": "ana", "x": 2.0}]
    tables = {"orders": table(ORDERS, orders), "spending": table(SPENDING, spent)}
    plan = FeaturePlan.of_views(VIEWS[:1], ASKS)
    store = OnlineStore(tmp_path, plan, keep="1h")
    store.ingest("orders", tables["orders"])
    store.replace({n: lambda t=t: [t] for n, t in tables.items()}, {"orders": 0, "spending": 0})
    reader = OnlineReader(tmp_path, plan)
    row = table(ASKS, [{"id": "q", "at": 2, "order": 1}])
    assert reader.vectors(row, np.array([2])).tolist() == [[2.0, 2.0, 1.0]]
    with pytest.raises(ContractError, match="'order'"):
        reader.vectors(row.drop(["order"]), np.array([2]))
    reader.close()
    store.close()


def test_share_of_rows_without_a_known_entity_counts_what_was_looked_up() -> None:
    orders = [{"id": "o", "happened": 0, "known": 0, "order": 1, "customer": "ana"}]
    spent = [{"id": "s", "happened": 1, "known": 1, "customer": "ana", "x": 2.0}]
    tables = {"orders": table(ORDERS, orders), "spending": table(SPENDING, spent)}
    rows = table(ASKS, [{"id": f"q{i}", "at": 2, "order": o} for i, o in enumerate((1, 1, 2, None))])
    plan = FeaturePlan.of_views(VIEWS[:1], ASKS)
    assert unseen_shares(plan, tables, rows, np.full(4, 2)) == {"spent": 0.5}
    assert unseen_shares(plan, tables, rows, np.zeros(4, dtype=np.int64)) == {"spent": 1.0}


def test_wrong_lookups_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="not in source 'orders'"):
        Lookup(ORDERS, entity="order", column="nobody")
    with pytest.raises(ValueError, match="a string or int64, not float64"):
        Lookup(SPENDING, entity="customer", column="x")
    with pytest.raises(ValueError, match="no column of an entity"):
        FeatureView("w", WEATHER, entity="region", features=["x"], through=TO_CUSTOMER)
    other = Lookup(ORDERS, entity="order", column="customer")
    views = [VIEWS[0], FeatureView("more", SPENDING, entity="customer", features=["x"], through=other)]
    with pytest.raises(SpecError, match="another way"):
        FeaturePlan.of_views(views, ASKS)
    wrong = source_of("wrong", customer=INT, x=Col("float64"))
    view = FeatureView("w", wrong, entity="customer", features=["x"], through=TO_CUSTOMER)
    with pytest.raises(SpecError, match="another type"):
        FeaturePlan.of_views([view], ASKS)
