"""The online store: the same vectors as the join, exactly once, in any order, with the ages of what it knows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.online import OnlineReader, OnlineStore, entity_key
from raymill.actors.point_in_time import join
from raymill.runtime.errors import ContractError, RequestError, Unavailable, UnknownEntity
from raymill.runtime.expressions import col
from raymill.runtime.spec import Col, FeatureView, OnDemand, Source

UTC = pa.timestamp("us", "UTC")
MINUTE = 60_000_000
RIDES = Source(
    "rides",
    key=["id"],
    time="left",
    known_at="arrived",
    schema={
        "id": Col("int64"),
        "left": Col("timestamp"),
        "arrived": Col("timestamp", nullable=True),
        "line": Col("string", nullable=True),
        "stop": Col("int64"),
        "delay": Col("float64", nullable=True),
    },
)
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("left", UTC),
        ("arrived", UTC),
        ("line", pa.string()),
        ("stop", pa.int64()),
        ("delay", pa.float64()),
    ]
)
DELAY = col("delay")
VIEWS = [
    FeatureView(
        "line",
        RIDES,
        entity="line",
        features={
            "mean": DELAY.mean("30m"),
            "late": (DELAY > 3).mean("2h"),
            "top": DELAY.max("1h"),
            "n": DELAY.count("1h"),
        },
    ),
    FeatureView(
        "place", RIDES, entity=["line", "stop"], max_age="20m", features={"delay": DELAY, "sum": DELAY.sum("2h")}
    ),
    FeatureView("newest", RIDES, entity="stop", features={"delay": DELAY, "gap": DELAY.min("1h") - DELAY.last("2h")}),
    OnDemand("clock", {"hour": col("left").hour(), "on_a": col("line").eq("a")}),
]
PLAN = FeaturePlan.of_views(VIEWS, RIDES)


def rides(dice: random.Random, n: int, apart: tuple[int, ...] = (0, 0, 1, 2, 5)) -> list[dict[str, Any]]:
    """Some minutes apart, some late, some lost, some at the same moment."""
    made, now = [], 0
    for i in range(n):
        now += dice.choice(apart) * MINUTE
        arrived = now + dice.choice([0, 3, 10, 45, 100]) * MINUTE
        made.append(
            {
                "id": i,
                "left": now,
                "arrived": None if dice.random() < 0.05 else arrived,
                "line": dice.choice(["a", "b", "c", None]),
                "stop": dice.randrange(3),
                "delay": dice.choice([None, -1.0, 0.1, 1 / 3, 4.0, 17.25]),
            }
        )
    return made


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def moments(rows: pa.Table) -> np.ndarray:
    return np.array(rows.column("left").cast(pa.int64()))


def small_store(path: Path, keep: str = "2h") -> OnlineStore:
    return OnlineStore(path, PLAN, keep=keep)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[OnlineStore]:
    opened = small_store(tmp_path / "online")
    yield opened
    opened.close()


def reader(store: OnlineStore) -> OnlineReader:
    return OnlineReader(store._path, PLAN)


def test_twelve_thousand_replayed_rows_have_the_offline_vectors_bit_for_bit(tmp_path: Path) -> None:
    store = small_store(tmp_path / "online", keep="12h")
    facts = table(rides(random.Random(1), 12_000))
    at = moments(facts)
    offline = join(facts, PLAN, {"rides": facts}, at="left")
    ask = reader(store)
    for first in range(0, len(facts), 400):
        batch = facts.slice(first, 400)
        store.ingest("rides", batch)
        online = ask.vectors(batch, at[first : first + 400])
        assert online.tobytes() == offline[first : first + 400].tobytes()
    alone = [ask.vectors(facts.slice(i, 1), at[i : i + 1]) for i in range(11_900, 12_000)]
    assert np.concatenate(alone).tobytes() == offline[11_900:].tobytes()
    assert np.isfinite(offline).mean() > 0.5
    ask.close()
    store.close()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_order_repetition_and_size_of_batches_do_not_matter(seed: int, tmp_path_factory: Any) -> None:
    dice = random.Random(seed)
    facts = rides(dice, 120)
    opened = small_store(tmp_path_factory.mktemp("online"))
    late, rest = facts[::7], list(facts)
    dice.shuffle(late)
    while rest:
        n = dice.randrange(1, 60)
        for _ in range(dice.choice([1, 1, 2])):
            opened.ingest("rides", table(rest[:n]))
        rest = rest[n:]
    opened.ingest("rides", table(late))
    end = facts[-1]["left"]
    asked = table(rides(dice, 40))
    at = np.array([end + dice.randrange(-120, 200) * MINUTE for _ in range(40)])
    ask = reader(opened)
    online = ask.vectors(asked, at)
    assert online.tobytes() == join(asked, PLAN, {"rides": table(facts)}, at=at).tobytes()
    ask.close()
    opened.close()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_nothing_that_the_earliest_moment_kept_needs_is_dropped(seed: int, tmp_path_factory: Any) -> None:
    dice = random.Random(seed)
    facts = rides(dice, 30, apart=(0, 10, 20, 30, 60, 120))
    opened = small_store(tmp_path_factory.mktemp("online"))
    for i in range(0, 30, 10):
        opened.ingest("rides", table(facts[i : i + 10]))
    floor = facts[-1]["left"] - 120 * MINUTE
    asked = table([{**facts[0], "line": line, "stop": stop} for line in "abc" for stop in range(3)] * 2)
    at = np.repeat(np.array([floor, floor + 10 * MINUTE]), 9)
    ask = reader(opened)
    assert ask.vectors(asked, at).tobytes() == join(asked, PLAN, {"rides": table(facts)}, at=at).tobytes()
    ask.close()
    opened.close()


def test_moment_before_what_is_kept_is_refused_not_answered_wrongly(store: OnlineStore) -> None:
    facts = table(rides(random.Random(2), 2000))
    store.ingest("rides", facts)
    newest = int(moments(facts).max())
    ask = reader(store)
    ask.vectors(facts.slice(0, 1), np.array([newest - 120 * MINUTE]))
    with pytest.raises(RequestError, match="before"):
        ask.vectors(facts.slice(0, 1), np.array([newest - 121 * MINUTE]))
    ask.close()


def test_unknown_and_null_entities_give_empty_values_unless_the_view_is_required(store: OnlineStore) -> None:
    store.ingest("rides", table(rides(random.Random(3), 50)))
    stranger = table([{"id": 1, "left": 0, "arrived": 0, "line": "zz", "stop": 9, "delay": None}])
    ask = reader(store)
    vector = dict(zip(PLAN.names, ask.vectors(stranger, np.array([10 * MINUTE]))[0].tolist(), strict=True))
    assert (vector["line.n"], vector["place.sum"], vector["clock.on_a"]) == (0.0, 0.0, 0.0)
    assert np.isnan([vector["line.mean"], vector["newest.delay"]]).all()
    assert ask.vectors(stranger.slice(0, 0), np.empty(0, dtype=np.int64)).shape == (0, len(PLAN.names))
    views = [FeatureView("line", RIDES, entity="line", features=VIEWS[0].features, required=True)]
    strict = FeaturePlan.of_views(views, RIDES)
    strictly = OnlineStore(store._path, strict)
    strictly.ingest("rides", table(rides(random.Random(3), 50)))
    with pytest.raises(UnknownEntity, match="row 0: line='zz' was never seen"):
        OnlineReader(store._path, strict).vectors(stranger, np.array([0]))


def test_store_or_view_that_was_not_filled_is_unavailable_and_a_missing_column_named(store: OnlineStore) -> None:
    row = table(rides(random.Random(4), 1))
    with pytest.raises(Unavailable, match="not filled"):
        reader(store).vectors(row, np.array([0]))
    store.ingest("rides", row)
    other = FeaturePlan.of_views([FeatureView("line", RIDES, entity="line", features={"n": DELAY.count("5m")})], RIDES)
    with pytest.raises(Unavailable, match="view 'line'"):
        OnlineReader(store._path, other).vectors(row, np.array([0]))
    with pytest.raises(ContractError, match="'stop'"):
        reader(store).vectors(row.drop(["stop"]), np.array([0]))


def test_backfill_changes_no_newer_value_and_completes_the_windows(store: OnlineStore) -> None:
    plan = FeaturePlan.of_views([*NEWEST_VIEWS, *VIEWS], RIDES)
    opened = OnlineStore(store._path, plan, keep="9d")
    facts = rides(random.Random(8), 400)
    ask, end = OnlineReader(store._path, plan), facts[-1]["left"] + 200 * MINUTE
    asked, at = table(facts[-40:]), moments(table(facts[-40:]))
    opened.ingest("rides", table(facts[360:]), lake_version=0)
    there = sorted({(f["line"], f["stop"]) for f in facts[360:] if f["arrived"] is not None and f["line"]})
    newest = ask.latest("both", there, end)
    lacking = ask.vectors(asked, at)
    for _ in range(2):
        opened.ingest("rides", table(facts[:360]))
        again = ask.latest("both", there, end)
        assert [a.tobytes() for a in again] == [b.tobytes() for b in newest]
    offline = join(asked, plan, {"rides": table(facts)}, at=at)
    assert ask.vectors(asked, at).tobytes() == offline.tobytes() != lacking.tobytes()
    ask.close()
    opened.close()


def test_lake_version_follows_only_when_no_version_was_missed(store: OnlineStore) -> None:
    batch = table(rides(random.Random(5), 10))
    assert store.lake_version("rides") == -1
    store.ingest("rides", batch, lake_version=0)
    store.ingest("rides", batch, lake_version=1)
    assert store.lake_version("rides") == 1
    store.ingest("rides", batch, lake_version=3)
    assert store.lake_version("rides") == 1
    store.ingest("rides", batch, lake_version=3, whole=True)
    assert store.lake_version("rides") == 3
    store.replace({"rides": lambda: [batch.slice(0, 3), batch.slice(3)]}, {"rides": 4})
    assert store.lake_version("rides") == 4


def test_entity_keys_are_unambiguous_and_short() -> None:
    values = [
        ("a", "bc"),
        ("ab", "c"),
        ("a", 1),
        ("a", "1"),
        (1, "a"),
        ("a1:",),
        ("x" * 900,),
        ("x" * 901,),
        (True, "a"),
    ]
    keys = [entity_key(v) for v in values[:-1]]
    assert len(set(keys)) == len(keys)
    assert max(map(len, keys)) <= 400
    assert entity_key((True, "a")) == entity_key((1, "a"))


def known_times(facts: list[dict[str, Any]], at: int) -> list[int]:
    """Event times of what was known at a moment."""
    return [f["left"] for f in facts if f["arrived"] is not None and max(f["arrived"], f["left"]) <= at]


NEWEST_VIEWS = [
    FeatureView("stop", RIDES, entity="stop", max_age="25m", features={"twice": DELAY * 2, "delay": DELAY}),
    FeatureView("both", RIDES, entity=["line", "stop"], features={"late": DELAY > 3, "delay": DELAY}),
]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_packed_newest_values_equal_the_join_at_every_moment(seed: int, tmp_path_factory: Any) -> None:
    dice = random.Random(seed)
    plan = FeaturePlan.of_views(NEWEST_VIEWS, RIDES)
    opened = OnlineStore(tmp_path_factory.mktemp("online"), plan, keep="2h")
    facts = rides(dice, 80)
    shuffled = list(facts)
    dice.shuffle(shuffled)
    for i in range(0, 80, 27):
        opened.ingest("rides", table(shuffled[i : i + 27]))
    ask = OnlineReader(opened._path, plan)
    end = facts[-1]["left"]
    for at in (end - 60 * MINUTE, end, end + 10 * MINUTE, end + 24 * 60 * MINUTE):
        asked = table(rides(dice, 25))
        moments_ = np.full(25, at)
        offline = join(asked, plan, {"rides": table(facts)}, at=moments_)
        assert ask.vectors(asked, moments_).tobytes() == offline.tobytes()
        stops = asked.column("stop").to_pylist()
        pairs = list(zip(asked.column("line").to_pylist(), stops, strict=True))
        values, ages = ask.latest("stop", stops, at)
        assert values.tobytes() == np.ascontiguousarray(offline[:, :2]).tobytes()
        both, _ = ask.latest("both", pairs, at)
        assert both.tobytes() == np.ascontiguousarray(offline[:, 2:]).tobytes()
        for stop, age in zip(stops, ages.tolist(), strict=True):
            known = known_times([f for f in facts if f["stop"] == stop], at)
            assert age == (at - max(known) if known else -1)
    ask.close()
    opened.close()


def test_latest_values_tell_what_they_do_not_know_and_refuse_what_they_can_not(store: OnlineStore) -> None:
    plan = FeaturePlan.of_views([*NEWEST_VIEWS, VIEWS[0]], RIDES)
    opened = OnlineStore(store._path, plan, keep="2h")
    opened.ingest("rides", table(rides(random.Random(2), 2000)))
    ask = OnlineReader(store._path, plan)
    values, ages = ask.latest("stop", [0, 99, None], 10**15)
    assert np.isnan(values).all()
    assert ages[0] > 0
    assert ages[1:].tolist() == [-1, -1]
    assert ask.latest("both", [], 10**15)[0].shape == (0, 2)
    with pytest.raises(RequestError, match="'line' is no view of newest values"):
        ask.latest("line", ["a"], 10**15)
    with pytest.raises(RequestError, match="before"):
        ask.latest("stop", [0], 0)
    ask.close()
    opened.close()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_ages_and_missing_values_come_back_with_the_vectors(seed: int, tmp_path_factory: Any) -> None:
    dice = random.Random(seed)
    plan = FeaturePlan.of_views([*VIEWS, *NEWEST_VIEWS], RIDES)
    opened = OnlineStore(tmp_path_factory.mktemp("online"), plan, keep="9d")
    facts = rides(dice, 60)
    opened.ingest("rides", table(facts))
    ask = OnlineReader(opened._path, plan)
    asked = rides(dice, 25)
    end = facts[-1]["left"]
    for at in (np.full(25, end + 60 * MINUTE), np.array([dice.randrange(end + 1) for _ in asked])):
        found = ask.look_up(table(asked), at)
        assert found.x.tobytes() == ask.vectors(table(asked), at).tobytes()
        assert found.missing.tolist() == np.isnan(found.x).tolist()
        entities = {v.name: v.entity for v in plan.event_views}
        assert found.views == ("line", "place", "newest", "stop", "both")
        for row, moment, ages in zip(asked, at.tolist(), found.ages.tolist(), strict=True):
            for view, age in zip(found.views, ages, strict=True):
                mine = [f for f in facts if all(f[c] == row[c] is not None for c in entities[view])]
                known = known_times(mine, moment)
                assert age == (moment - max(known) if known else -1)
    ask.close()
    opened.close()
