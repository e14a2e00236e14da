"""Each row is accepted or refused for the reason an obvious row-by-row reading gives."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raymill.actors.contract import InLake, arrow_schema, check, event_times
from raymill.actors.keys import key_tuples
from raymill.runtime.errors import ContractError
from raymill.runtime.spec import Col, Source

EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
HOUR_US = 3_600_000_000
SOURCE = Source(
    "readings",
    key=["place", "time"],
    time="time",
    freshness="3h",
    schema={
        "place": Col("string", one_of=("north", "south")),
        "time": Col("timestamp"),
        "heat": Col("float64", nullable=True, ge=-50, le=60),
        "count": Col("int64", ge=0),
        "note": Col("string", nullable=True),
        "open": Col("bool", nullable=True),
    },
)


def row(**changed):
    return {"place": "north", "time": EPOCH, "heat": 1.5, "count": 2, "note": "n", "open": True} | changed


def table(*rows):
    return pa.Table.from_pylist(list(rows), schema=arrow_schema(SOURCE))


def text_table(*rows):
    names = list(SOURCE.schema)
    return pa.Table.from_pylist(list(rows), schema=pa.schema([(n, pa.string()) for n in names]))


def reasons(checked):
    return checked.rejected["reason"].to_pylist()


def fault(r):
    """The contract of one row, read in plain Python, column by column as declared."""
    if r["place"] is None:
        return "null:place"
    if r["place"] == "east":
        return "one_of:place"
    if r["time"] is None:
        return "null:time"
    if r["heat"] is not None and not math.isnan(r["heat"]) and not -50 <= r["heat"] <= 60:
        return "range:heat"
    if r["count"] is None:
        return "null:count"
    return "range:count" if r["count"] < 0 else None


def expected_reasons(rows):
    found, seen = [], set()
    for r in rows:
        key = (r["place"], r["time"])
        found.append(fault(r) or ("duplicate_key" if key in seen else None))
        if found[-1] is None:
            seen.add(key)
    return found


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "place": st.sampled_from(["north", "south", "east", None]),
            "time": st.sampled_from([EPOCH, EPOCH + timedelta(microseconds=1), None]),
            "heat": st.sampled_from([None, 0.0, -50.0, 60.0, 60.5, math.nan, math.inf, -math.inf]),
            "count": st.sampled_from([0, 5, -1, None]),
            "note": st.sampled_from([None, "", "é"]),
            "open": st.sampled_from([None, True, False]),
        }
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_verdicts_are_those_of_an_obvious_row_by_row_reading(rows):
    checked = check(table(*rows), SOURCE)
    wanted = expected_reasons(rows)
    assert reasons(checked) == [w for w in wanted if w]
    given_notes = [r["note"] for r, w in zip(rows, wanted, strict=True) if w is None]
    assert checked.accepted["note"].to_pylist() == given_notes
    assert checked.accepted.schema.equals(arrow_schema(SOURCE))
    assert checked.accepted.num_rows + checked.rejected.num_rows == len(rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["1", "22", "-3", "4.5", "x", "", None]), max_size=30))
def test_unreadable_values_cost_their_row_and_no_other(counts):
    rows = [row(count=c, heat="1", open="true", time=f"2020-01-01T00:00:{i:02}Z") for i, c in enumerate(counts)]
    checked = check(text_table(*rows), SOURCE)
    wanted = {"1": None, "22": None, "-3": "range:count", None: "null:count"}
    assert reasons(checked) == [w for c in counts if (w := wanted.get(c, "type:count"))]
    assert checked.accepted["count"].to_pylist() == [int(c) for c in counts if c in ("1", "22")]


def test_a_rejected_row_is_kept_as_it_came():
    bad = row(count="many", heat="1", open="no idea", time="2020-01-01T00:00:00Z")
    checked = check(text_table(bad), SOURCE)
    assert reasons(checked) == ["type:count"]
    assert json.loads(checked.rejected["row"][0].as_py()) == bad


def test_text_without_a_time_zone_is_no_moment():
    assert reasons(check(text_table(row(count="1", heat="1", open="1", time="2020-01-01 00:00:00")), SOURCE)) == [
        "type:time"
    ]


def test_other_widths_units_zones_and_encodings_are_taken():
    plain = table(row())
    other = pa.table(
        {
            "open": plain["open"],
            "note": plain["note"].cast(pa.large_string()),
            "count": plain["count"].cast(pa.float64()),
            "heat": plain["heat"].cast(pa.float32()),
            "time": plain["time"].cast(pa.timestamp("ns", "America/New_York")),
            "place": plain["place"].dictionary_encode(),
        }
    )
    assert check(other, SOURCE).accepted.to_pylist() == [row()]


def test_nan_is_null_for_whole_numbers_too():
    source = replace(SOURCE, schema=SOURCE.schema | {"count": Col("int64", nullable=True)})
    rows = table(row(), row(time=EPOCH + timedelta(hours=1)))
    rows = rows.set_column(3, "count", pa.array([2.0, math.nan]))
    assert check(rows, source).accepted["count"].to_pylist() == [2, None]
    assert reasons(check(rows, SOURCE)) == ["null:count"]


def test_a_number_that_would_lose_digits_is_no_whole_number():
    rows = table(row(), row(time=EPOCH + timedelta(hours=1)))
    rows = rows.set_column(3, "count", pa.array([2.0, 2.5]))
    assert reasons(check(rows, SOURCE)) == ["type:count"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.drop_columns(["heat"]), "lacks .*heat"),
        (lambda t: t.append_column("extra", t["note"]), "strange .*extra"),
        (lambda t: t.append_column("note", t["note"]), "repeats .*note"),
        (lambda t: t.set_column(1, "time", t["time"].cast(pa.timestamp("us"))), "time zone"),
        (lambda t: t.set_column(1, "time", t["count"]), "'time' .*int64"),
        (lambda t: t.set_column(3, "count", t["open"]), "'count' .*bool"),
        (lambda t: t.set_column(4, "note", pa.array([["a"]])), "'note' .*list"),
    ],
)
def test_a_batch_of_another_shape_is_refused_as_a_whole(change, told):
    with pytest.raises(ContractError, match=told):
        check(change(table(row())), SOURCE)


def test_a_known_key_makes_a_duplicate_and_is_asked_for_sound_rows_only():
    asked = []

    def known(keys):
        asked.extend(key_tuples(keys))
        return np.ones(keys.num_rows, np.bool_)

    checked = check(table(row(), row(place=None)), SOURCE, InLake(keys=known))
    assert reasons(checked) == ["duplicate_key", "null:place"]
    assert asked == [("north", EPOCH)]


def test_a_batch_older_than_its_freshness_is_refused_and_history_is_not():
    at = int(EPOCH.timestamp() * 1e6)
    assert check(table(row()), SOURCE, at=at + 3 * HOUR_US).accepted.num_rows == 1
    assert check(table(row()), SOURCE).accepted.num_rows == 1
    with pytest.raises(ContractError, match="freshness"):
        check(table(row()), SOURCE, at=at + 3 * HOUR_US + 1)


def test_no_rows_are_a_sound_batch():
    checked = check(table(), SOURCE, at=0)
    assert (checked.accepted.num_rows, checked.rejected.num_rows) == (0, 0)


def test_event_times_of_unreadable_text_are_null():
    times = event_times(pa.table({"time": ["2020-01-01T00:00:00Z", "soon"]}), SOURCE)
    assert times.to_pylist() == [EPOCH, None]


def shared_nulls(nulls, rows, most=0.1):
    """A batch of n rows of which some have no heat, and its source."""
    schema = SOURCE.schema | {"heat": Col("float64", nullable=True, max_null_share=most)}
    batch = [row(time=EPOCH + timedelta(seconds=i), heat=None if i < nulls else 1.0) for i in range(rows)]
    return table(*batch), replace(SOURCE, schema=schema)


def test_a_batch_with_too_many_nulls_is_refused_as_a_whole_with_the_figures():
    batch, source = shared_nulls(nulls=21, rows=200)
    with pytest.raises(ContractError, match=r"'heat'.*21 of 200 rows \(10\.5%\).*10\.0%"):
        check(batch, source)
    assert check(batch, source, whole=False).accepted.num_rows == 200


@pytest.mark.parametrize(("nulls", "rows"), [(20, 200), (99, 99), (0, 100)])
def test_a_share_of_nulls_at_its_edge_or_in_a_small_batch_is_taken(nulls, rows):
    assert check(*shared_nulls(nulls, rows)).accepted.num_rows == rows


def test_nan_counts_as_null_and_an_unreadable_value_does_not():
    batch, source = shared_nulls(nulls=0, rows=100)
    nan = batch.set_column(2, "heat", pa.array([math.nan] * 11 + [1.0] * 89))
    with pytest.raises(ContractError, match="11 of 100"):
        check(nan, source)
    text = batch.set_column(2, "heat", pa.array(["hot"] * 11 + ["1"] * 89))
    assert reasons(check(text, source)) == ["type:heat"] * 11


def test_a_reference_is_held_against_the_lake_for_sound_rows_that_have_a_value():
    asked = []

    def values(place, column):
        asked.append((place, column.to_pylist()))
        return np.array([v == "a" for v in column.to_pylist()], np.bool_)

    source = replace(SOURCE, schema=SOURCE.schema | {"note": Col("string", nullable=True, references="notes.name")})
    notes = ["a", "b", None, "b"]
    batch = table(*(row(note=n, count=-1 if i == 3 else 1, time=EPOCH + timedelta(i)) for i, n in enumerate(notes)))
    assert reasons(check(batch, source, InLake(values=values))) == ["reference:note", "range:count"]
    assert asked == [("notes.name", ["a", "b"])]
    assert reasons(check(batch, source)) == ["range:count"]


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"dtype": "string", "ge": 0}, "numbers"),
        ({"dtype": "timestamp", "le": 0}, "numbers"),
        ({"dtype": "int64", "one_of": ("a",)}, "strings"),
        ({"dtype": "int64", "max_null_share": 1.5}, "max_null_share"),
        ({"dtype": "string", "references": "planes"}, "planes.tailnum"),
    ],
)
def test_a_rule_that_does_not_fit_its_column_is_refused_where_it_is_written(declared, told):
    with pytest.raises(ValidationError, match=told):
        Col(**declared)
