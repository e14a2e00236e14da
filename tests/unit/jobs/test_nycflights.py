"""The demo's data says what design.md measured, and its contracts refuse just what they must."""

from collections import Counter

import numpy as np
import pyarrow.compute as pc
import pytest

from raymill.actors.contract import InLake, arrow_schema, check
from raymill.jobs.nycflights import (
    FAULTS,
    FLIGHTS,
    PLANES,
    SEEDED_DAYS,
    WEATHER,
    flights,
    planes,
    seeded_bad_rows,
    weather,
)
from raymill.runtime.errors import StoreError

SOURCES = {s.name: s for s in (FLIGHTS, WEATHER, PLANES)}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_read_gives_the_declared_columns_and_types_in_event_time_order(source):
    rows = source.read()
    assert rows.schema.equals(arrow_schema(source))
    assert (np.diff(rows[source.time].to_numpy().astype(np.int64)) >= 0).all()


def test_only_the_storm_of_1048_mph_is_refused_and_nothing_else_of_the_year():
    checked = {name: check(source.read(), source) for name, source in SOURCES.items()}
    accepted = {n: c.accepted.num_rows for n, c in checked.items()}
    assert accepted == {"flights": 336_776, "weather": 26_114, "planes": 3_322}
    assert checked["weather"].rejected["reason"].to_pylist() == ["range:wind_speed"]
    assert '"time_hour":"2013-02-12T08:00:00Z"' in checked["weather"].rejected["row"][0].as_py()


def test_cancelled_and_diverted_flights_are_kept_and_their_label_is_never_known():
    rows = flights()
    cancelled = pc.is_null(rows["dep_delay"]).to_numpy()
    never = pc.is_null(rows["landed_at"]).to_numpy()
    assert (cancelled.sum(), (never & ~cancelled).sum()) == (8_255, 1_175)
    assert (pc.is_null(rows["arr_delay"]).to_numpy() == never).all()
    assert rows["arr_delay"].null_count == rows["landed_at"].null_count == 9_430


def test_every_landing_is_after_departure_and_flight_by_a_plausible_taxiing():
    landed = flights().filter(flights()["landed_at"].is_valid())
    minutes = {
        c: landed[c].to_numpy().astype("datetime64[m]").astype(np.int64) for c in ("landed_at", "scheduled_departure")
    }
    left = minutes["scheduled_departure"] + landed["dep_delay"].to_numpy()
    taxiing = minutes["landed_at"] - left - landed["air_time"].to_numpy()
    assert taxiing.min() > 0 and taxiing.max() < 240  # a wrong time zone would shift it by an hour or more
    assert np.median(minutes["landed_at"] - minutes["scheduled_departure"]) == 170


def test_puerto_rico_which_airports_csv_lacks_has_its_own_zone():
    there = flights().filter(pc.equal(flights()["dest"], "SJU"))
    winter = there.filter(pc.equal(there["date"], "2013-01-15"))
    summer = there.filter(pc.equal(there["date"], "2013-07-15"))
    assert all(190 < m < 280 for t in (winter, summer) for m in t["scheduled_minutes"].to_pylist())


def test_the_first_flight_is_told_in_utc():
    first = flights().slice(0, 1).to_pylist()[0]
    assert (first["date"], first["carrier"], first["flight"], first["origin"]) == ("2013-01-01", "UA", 1545, "EWR")
    assert first["scheduled_departure"].isoformat() == "2013-01-01T10:15:00+00:00"
    assert first["landed_at"].isoformat() == "2013-01-01T14:30:00+00:00"


def test_a_repeated_local_hour_at_the_end_of_summer_time_is_two_hours_of_weather():
    hours = [h.isoformat() for h in weather()["time_hour"].to_pylist()]
    assert hours.count("2013-11-03T05:00:00+00:00") == hours.count("2013-11-03T06:00:00+00:00") == 3


def test_planes_are_known_before_the_first_departure_and_miss_some_flights():
    assert pc.max(planes()["known"]).as_py() < pc.min(flights()["scheduled_departure"]).as_py()
    known = pc.is_in(flights()["tailnum"], value_set=planes()["tailnum"].combine_chunks())
    assert round(1 - pc.mean(known).as_py(), 3) == 0.156


@pytest.mark.parametrize("days", [SEEDED_DAYS, ("2013-09-01",)], ids=["default", "one day"])
def test_every_seeded_row_is_refused_each_for_its_own_fault(days):
    reasons = []
    for name, day, rows in seeded_bad_rows(days):
        source = SOURCES[name]
        before = source.read().slice(0, np.searchsorted(source.read()[source.time].to_numpy(), np.datetime64(day)))
        keys = set(zip(*(before[c].to_pylist() for c in source.key), strict=True))

        def known(asked, keys=keys):
            return np.array([k in keys for k in zip(*(c.to_pylist() for c in asked.columns), strict=True)], np.bool_)

        checked = check(rows, source, InLake(keys=known))
        assert checked.accepted.num_rows == 0
        reasons += checked.rejected["reason"].to_pylist()
    assert Counter(reasons) == Counter(reason for _, _, reason in FAULTS)


def test_the_same_days_give_the_same_seeded_rows_and_a_day_without_data_is_named():
    assert all(a[2].equals(b[2]) for a, b in zip(seeded_bad_rows(), seeded_bad_rows(), strict=True))
    with pytest.raises(StoreError, match="2014-03-01"):
        seeded_bad_rows(["2014-03-01"])
