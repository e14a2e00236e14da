"""FeatureActor on a real lake: training sets, restarts, missed batches; and the demo's own rows, offline and online."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pytest

from raymill.actors.features import FeatureActor
from raymill.actors.lake import Lake
from raymill.actors.point_in_time import join
from raymill.jobs import nycflights
from raymill.runtime.errors import Conflict, ContractError, RequestError, StoreError
from raymill.runtime.expressions import col
from raymill.runtime.home import Home
from raymill.runtime.messages import Event, Ingested
from raymill.runtime.spec import (
    AddColumn,
    Col,
    Cost,
    FeatureView,
    Label,
    Monitor,
    OnDemand,
    Pipeline,
    RenameColumn,
    Source,
    Train,
)

HOUR = 3_600_000_000
UTC_US = pa.timestamp("us", "UTC")
TRIPS = Source(
    "trips",
    key=["day", "trip"],
    time="left",
    known_at="arrived",
    schema={
        "day": Col("timestamp"),
        "trip": Col("int64"),
        "left": Col("timestamp"),
        "arrived": Col("timestamp", nullable=True),
        "line": Col("string"),
        "delay": Col("float64", nullable=True),
    },
)
STOPS = Source(
    "stops", key=["line"], time="since", schema={"line": Col("string"), "since": Col("timestamp"), "n": Col("int64")}
)


def model(inputs: int) -> Any:
    raise AssertionError("no model is built here")


def pipeline_of(views: list[Any], source: Source, label: Any) -> Pipeline:
    monitor = Monitor(cost=Cost(missed=2, false_alarm=1))
    return Pipeline("demo", views=views, label=Label("late", source, label), train=Train(model), monitor=monitor)


VIEWS = [
    FeatureView(
        "line", TRIPS, entity="line", features={"mean": col("delay").mean("6h"), "n": col("delay").count("2d")}
    ),
    FeatureView("stops", STOPS, entity="line", features=["n"]),
    OnDemand("clock", {"hour": col("left").hour()}),
]
PIPELINE = pipeline_of(VIEWS, TRIPS, col("delay") > 5)


def trips(first: int, n: int) -> pa.Table:
    """One an hour; every fifth never arrives, the others are known two hours later."""
    i = np.arange(first, first + n)
    lost = i % 5 == 4
    return pa.table(
        {
            "day": pa.array(i // 24 * 24 * HOUR).cast(UTC_US),
            "trip": pa.array(i),
            "left": pa.array(i * HOUR).cast(UTC_US),
            "arrived": pa.array((i + 2) * HOUR, mask=lost).cast(UTC_US),
            "line": pa.array(np.array(["a", "b"])[i % 2]),
            "delay": pa.array((i % 7).astype(np.float64) * 2, mask=lost),
        }
    )


def stops() -> pa.Table:
    return pa.table({"line": ["a", "b"], "since": pa.array([0, 0]).cast(UTC_US), "n": [3, 8]})


class Bench:
    """A lake and the actor on it."""

    def __init__(self, home: Path, pipeline: Pipeline = PIPELINE) -> None:
        self.home = home
        self.pipeline = pipeline
        self.lake = Lake(Home(home).lake)
        self.told: list[Event] = []
        self.actor = self.begin()

    def begin(self) -> FeatureActor:
        actor = FeatureActor(self.home, self.pipeline, self.told.extend)
        actor.start()
        return actor

    def restart(self) -> None:
        self.actor.stop()
        self.actor = self.begin()

    def arrive(self, source: str, rows: pa.Table, batch_id: str, *, seen: bool = True) -> Ingested:
        """What the DataActor does with sound rows, and (if `seen`) hands on."""
        before = self.lake.has_batch(source, batch_id)
        version = self.lake.append(source, rows, batch_id=batch_id)
        done = Ingested(
            source=source,
            batch_id=batch_id,
            lake_version=version,
            accepted=len(rows),
            quarantined={},
            duplicate=before,
            rows_ref=rows,
        )
        if seen:
            self.actor.take(done)
        return done


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.arrive("stops", stops(), "stops")
    yield made
    made.actor.stop()


def assert_online_is_offline(bench: Bench, hour: int) -> None:
    asked = trips(hour, 6)
    at = np.arange(hour, hour + 6) * HOUR
    sources = {s: bench.lake.read(s) for s in ("trips", "stops")}
    offline = join(asked, bench.actor.plan(), sources, at=at)
    assert bench.actor.vectors(asked, at).tobytes() == offline.tobytes()


def test_training_set_holds_the_labels_known_in_time_with_features_of_their_moment(bench: Bench) -> None:
    bench.arrive("trips", trips(0, 60), "one")
    bench.arrive("trips", trips(60, 40), "two")
    made = bench.actor.training_set(10 * HOUR, 90 * HOUR, 80 * HOUR, 50 * HOUR)
    train, later = made.train_ref, made.evaluate_ref
    hours = [h for h in range(10, 90) if h % 5 != 4 and h + 2 <= 80]
    at = np.concatenate([np.array(t["at"].cast(pa.int64())) for t in (train, later)])
    assert (at // HOUR).tolist() == hours
    assert len(train) == sum(h < 50 for h in hours)
    assert train["key"][0].as_py() == "[0,10]"
    assert [t["y"].to_pylist() for t in (train, later)] == [
        [float(h % 7 * 2 > 5) for h in part] for part in (hours[: len(train)], hours[len(train) :])
    ]
    assert train["x"].type == pa.list_(pa.float32(), 4)
    row = dict(zip(made.manifest.features, train["x"][0].as_py(), strict=True))
    known = [h for h in range(0, 9) if h % 2 == 0 and h % 5 != 4]  # line a, arrived by hour 10, when trip 10 leaves
    assert row["line.n"] == len(known)
    assert row["line.mean"] == np.float32(np.mean([h % 7 * 2 for h in known if h > 4]))
    assert (row["stops.n"], row["clock.hour"]) == (3.0, 10.0)
    assert (made.manifest.rows, made.manifest.without_label) == (len(hours), 80 - len(hours))
    assert made.manifest.lake_versions == {s: bench.lake.version(s) for s in ("trips", "stops")}


def test_training_set_is_the_same_again_when_newer_rows_are_in_the_lake(bench: Bench) -> None:
    bench.arrive("trips", trips(0, 80), "one")
    one = bench.actor.training_set(10 * HOUR, 60 * HOUR, 70 * HOUR, 50 * HOUR)
    bench.arrive("trips", trips(80, 80), "two")
    two = bench.actor.training_set(10 * HOUR, 60 * HOUR, 70 * HOUR, 50 * HOUR)
    assert one.train_ref.equals(two.train_ref)
    assert one.evaluate_ref.equals(two.evaluate_ref)
    assert replace(two.manifest, lake_versions=one.manifest.lake_versions) == one.manifest
    assert [e.kind for e in bench.told] == ["training_set.made", "features.described"] * 2
    assert len({e.key for e in bench.told}) == 4
    described = [e.data for e in bench.told if e.kind == "features.described"]
    assert described[0] == described[1] and described[0]["rows"] == len(one.train_ref)
    assert described[0]["features"]["line.n"]["null_share"] == 0


def test_range_without_labels_or_rows_is_refused_in_words(bench: Bench) -> None:
    with pytest.raises(Conflict, match="'trips'"):
        bench.actor.training_set(0, HOUR, HOUR, HOUR)
    bench.arrive("trips", trips(0, 20), "one")
    with pytest.raises(Conflict, match="no row of 1970-01-01"):
        bench.actor.training_set(10 * HOUR, 20 * HOUR, 5 * HOUR, 15 * HOUR)


def test_restarted_actor_reads_again_what_it_missed(bench: Bench) -> None:
    bench.arrive("trips", trips(0, 30), "one")
    bench.arrive("trips", trips(30, 10), "two", seen=False)
    bench.restart()
    assert bench.actor.health()["lake_versions"]["trips"] == bench.lake.version("trips")
    assert_online_is_offline(bench, 38)


def test_what_was_missed_is_read_and_not_all_that_is_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read, rows = Lake.read, list[int]()

    def counted(lake: Lake, table: str, **more: Any) -> pa.Table:
        found = read(lake, table, **more)
        rows.append(len(found))
        return found

    bench.arrive("trips", trips(0, 30), "one")
    monkeypatch.setattr(Lake, "read", counted)
    bench.arrive("trips", trips(30, 10), "two", seen=False)
    bench.restart()
    bench.restart()
    assert rows == [10]
    assert_online_is_offline(bench, 38)


def test_killed_while_it_catches_up_it_does_so_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.arrive("trips", trips(0, 30), "one", seen=False)

    def killed(*told: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("raymill.actors.online.OnlineStore._merge", killed)
        bench.restart()
    bench.restart()
    assert bench.actor.health()["lake_versions"]["trips"] == bench.lake.version("trips")
    assert_online_is_offline(bench, 28)


def test_repeated_and_missed_batches_end_in_the_same_vectors(bench: Bench) -> None:
    bench.arrive("trips", trips(0, 30), "one")
    bench.arrive("trips", trips(30, 10), "two", seen=False)
    bench.arrive("trips", trips(0, 30), "one")  # sent again while the second was lost: must not pass for it
    assert bench.actor.health()["lake_versions"]["trips"] < (bench.lake.version("trips") or 0)
    bench.arrive("trips", trips(40, 10), "three")
    assert bench.actor.health()["lake_versions"]["trips"] == bench.lake.version("trips")
    assert_online_is_offline(bench, 46)


def test_a_version_that_only_merges_parts_is_no_missed_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.arrive("trips", trips(0, 30), "one")
    monkeypatch.setattr(bench.actor._online, "_catch_up", lambda *_: pytest.fail("read the whole table again"))
    for i in range(9):
        bench.arrive("trips", trips(30 + 2 * i, 2), f"more-{i}")
    assert bench.lake.compact("trips", fewest=2) is not None
    bench.arrive("trips", trips(48, 2), "last")
    assert bench.actor.health()["lake_versions"]["trips"] == bench.lake.version("trips")
    assert_online_is_offline(bench, 44)


def bits(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def test_a_training_set_is_made_again_bit_for_bit_after_more_rows_merging_and_vacuum(bench: Bench) -> None:
    for i in range(10):
        bench.arrive("trips", trips(6 * i, 6), f"part-{i}")
    span = (0, 50 * HOUR, 60 * HOUR, 40 * HOUR)
    first = bench.actor.training_set(*span)
    pins = {e.data["manifest"]["lake_versions"]["trips"] for e in bench.told if e.kind == "training_set.made"}
    for i in range(10, 20):
        bench.arrive("trips", trips(6 * i, 6), f"part-{i}")
        bench.lake.compact("trips", fewest=2)
    in_a_day = time.time() + 86_400
    gone = bench.lake.vacuum("trips", pins=pins, older_than_s=3600, now_s=in_a_day)
    assert gone.files
    again = bench.actor.training_set(*span, first.manifest.lake_versions)
    assert again.manifest == first.manifest
    assert (bits(again.train_ref), bits(again.evaluate_ref)) == (bits(first.train_ref), bits(first.evaluate_ref))
    assert not bench.lake.vacuum("trips", pins=pins, older_than_s=3600, now_s=in_a_day).files
    assert bench.lake.vacuum("trips", pins=(), older_than_s=3600, now_s=in_a_day).files
    with pytest.raises(StoreError):
        bench.actor.training_set(*span, first.manifest.lake_versions)


def test_a_column_that_came_by_a_migration_is_a_feature_and_the_old_set_stays_what_it_was(bench: Bench) -> None:
    bench.arrive("trips", trips(0, 40), "one")
    pinned = bench.lake.version("trips")
    before = bench.lake.read("trips", version=pinned).sort_by("trip")
    bench.actor.stop()
    steps = [AddColumn("gate"), RenameColumn("delay", "minutes")]
    schema = {n: c for n, c in TRIPS.schema.items() if n != "delay"} | {
        "minutes": Col("float64", nullable=True),
        "gate": Col("int64", nullable=True),
    }
    wider = replace(TRIPS, schema=schema, migrations=steps)
    views = [FeatureView("line", wider, entity="line", features={"m": col("minutes").mean("6h"), "g": col("gate")})]
    bench.pipeline = pipeline_of([*views, *VIEWS[1:]], wider, col("minutes") > 5)
    bench.actor = bench.begin()  # before any data actor
    more = trips(40, 10).rename_columns([*trips(0, 1).column_names[:-1], "minutes"])
    bench.arrive("trips", more.append_column("gate", pa.array(range(10), pa.int64())), "two")
    assert_online_is_offline(bench, 46)
    assert bench.lake.read("trips", version=pinned).sort_by("trip").equals(before)
    with pytest.raises(ContractError, match="its migrations do not lead there"):
        FeatureActor(bench.home, PIPELINE, bench.told.extend).start()


def test_rebuilt_store_gives_the_same_vectors(bench: Bench) -> None:
    for i in range(8):
        bench.arrive("trips", trips(i * 24, 24), f"day-{i}")
    before = bench.actor.vectors(trips(180, 8), np.arange(180, 188) * HOUR)
    bench.actor.rebuild()
    assert bench.actor.vectors(trips(180, 8), np.arange(180, 188) * HOUR).tobytes() == before.tobytes()
    assert_online_is_offline(bench, 184)
    with pytest.raises(RequestError, match="before"):
        bench.actor.vectors(trips(3, 1), np.array([3 * HOUR]))


def test_replay_begins_where_it_is_told_though_the_lake_holds_more_and_restarts_where_it_was(bench: Bench) -> None:
    for i in range(12):
        bench.arrive("trips", trips(i * 24, 24), f"day-{i}")
    bench.actor.rebuild(until=48 * HOUR)
    assert_online_is_offline(bench, 42)
    bench.actor.replay_to(72 * HOUR)
    bench.actor.ingest("trips", trips(48, 24), "day-2")
    assert_online_is_offline(bench, 66)
    bench.restart()
    assert_online_is_offline(bench, 30)  # what is days ahead in the lake did not push this out
    bench.actor.replay_to(240 * HOUR)
    bench.restart()
    assert_online_is_offline(bench, 234)
    bench.actor.replay_to(96 * HOUR)  # another run, taken up again far behind
    assert_online_is_offline(bench, 90)
    bench.actor.rebuild()
    assert bench.actor.health()["lake_versions"]["trips"] == bench.lake.version("trips")
    assert_online_is_offline(bench, 280)


# -- the demo's rows ---------------------------------------------------------------------------------------------

DELAY = col("arr_delay")
FLIGHT_VIEWS = [
    FeatureView("weather", nycflights.WEATHER, entity="origin", max_age="3h", features=["temp", "wind_speed", "visib"]),
    FeatureView("plane", nycflights.PLANES, entity="tailnum", features=["year", "seats"]),
    FeatureView(
        "origin", nycflights.FLIGHTS, entity="origin", features={"delay_6h": DELAY.mean("6h"), "n": DELAY.count("1d")}
    ),
    FeatureView("carrier", nycflights.FLIGHTS, entity="carrier", features={"late_7d": (DELAY > 15).mean("7d")}),
    FeatureView(
        "route",
        nycflights.FLIGHTS,
        entity=["carrier", "origin", "dest"],
        features={"last": DELAY.last("7d"), "worst": DELAY.max("2d"), "distance": col("distance")},
    ),
    OnDemand("calendar", {"hour": col("scheduled_departure").hour(), "weekday": col("scheduled_departure").weekday()}),
]


def between(rows: pa.Table, time: str, start: datetime, end: datetime) -> pa.Table:
    moment = rows[time]
    return rows.filter(
        pc.and_(pc.greater_equal(moment, pa.scalar(start, UTC_US)), pc.less(moment, pa.scalar(end, UTC_US)))
    )


@pytest.mark.long
def test_real_flights_have_the_same_vectors_online_as_offline(tmp_path: Path) -> None:
    flights, weather, planes = nycflights.flights(), nycflights.weather(), nycflights.planes()
    tables = {"flights": flights, "weather": weather, "planes": planes}
    bench = Bench(tmp_path, pipeline_of(FLIGHT_VIEWS, nycflights.FLIGHTS, DELAY > 15))
    year, first = datetime(2012, 12, 31, tzinfo=UTC), datetime(2013, 3, 1, tzinfo=UTC)
    bench.arrive("planes", planes, "all")
    bench.arrive("flights", between(flights, "scheduled_departure", year, first), "history")
    bench.arrive("weather", between(weather, "time_hour", year, first), "history")
    asked = between(flights, "scheduled_departure", first, first + timedelta(days=12))
    offline = join(asked, bench.actor.plan(), tables, at="scheduled_departure")
    at = np.array(asked["scheduled_departure"].cast(pa.int64()))
    done = 0
    for day in range(12):
        start, end = first + timedelta(days=day), first + timedelta(days=day + 1)
        today = between(flights, "scheduled_departure", start, end)
        bench.arrive("flights", today, f"day-{day}")
        bench.arrive("weather", between(weather, "time_hour", start, end), f"day-{day}")
        for i in range(0, len(today), 256):
            rows = today.slice(i, 256)
            online = bench.actor.vectors(rows, at[done : done + len(rows)])
            assert online.tobytes() == offline[done : done + len(rows)].tobytes()
            done += len(rows)
    assert done == len(asked) >= 10_000
    assert np.isfinite(offline).mean(axis=0).min() > 0.7
    bench.actor.stop()
