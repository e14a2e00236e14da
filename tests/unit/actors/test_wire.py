"""Rows on the wire: what is read, what is refused, and that both forms say the same."""

import io
import json
from datetime import UTC, datetime, timedelta, timezone

import orjson
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymill.actors import wire
from raymill.runtime.errors import ContractError, RaymillError, RequestError, TooLarge
from tests.unit.actors.serving_parts import COLUMNS, model

SPEC = model((1, "live", 1.0))
NOW = 1_700_000_000_000_000
ROW = {"trip": 7, "zone": "a", "miles": 1.5}


def read(document, now=NOW):
    return wire.read_json(orjson.dumps(document), SPEC, now)


def test_a_row_without_id_and_moment_gets_both():
    rows = read({"rows": [ROW, ROW]})
    assert len(set(rows.ids)) == 2
    assert rows.at.tolist() == [NOW, NOW]
    assert rows.keys == ["[7]", "[7]"]
    assert rows.columns.schema == pa.schema([("zone", pa.string()), ("miles", pa.float64())])


def test_moments_are_iso_with_a_zone_or_microseconds():
    us = 1_367_399_700_000_000
    texts = ["2013-05-01T09:15:00Z", "2013-05-01T11:15:00+02:00", "2013-05-01 09:15:00.000000Z", us]
    assert read({"rows": [{**ROW, "at": t} for t in texts]}).at.tolist() == [us] * 4
    assert read({"rows": [ROW], "at": texts[1]}).at.tolist() == [us]
    assert read({"rows": [{**ROW, "at": us}, {**ROW, "at": None}]}).at.tolist() == [us, NOW]


REFUSED = {
    "no JSON": (b"{", RequestError),
    "no rows": ({"rows": []}, RequestError),
    "rows that are no list": ({"rows": {"a": 1}}, RequestError),
    "a row that is no object": ({"rows": [1]}, RequestError),
    "a strange field": ({"rows": [ROW], "model": "x"}, RequestError),
    "a strange column": ({"rows": [{**ROW, "color": 1}]}, ContractError),
    "a missing column": ({"rows": [{"zone": "a"}]}, ContractError),
    "a null that is not allowed": ({"rows": [{**ROW, "zone": None}]}, ContractError),
    "a fraction for an int64": ({"rows": [{**ROW, "trip": 1.5}]}, ContractError),
    "a truth value for an int64": ({"rows": [{**ROW, "trip": True}]}, ContractError),
    "an integer too large": ({"rows": [{**ROW, "trip": 2**63}]}, ContractError),
    "a number for a string": ({"rows": [{**ROW, "zone": 1}]}, ContractError),
    "a string for a number": ({"rows": [{**ROW, "miles": "1"}]}, ContractError),
    "a moment without zone": ({"rows": [ROW], "at": "2013-05-01T09:15:00"}, ContractError),
    "seconds for microseconds": ({"rows": [{**ROW, "at": 10**18}]}, ContractError),
    "a moment that is a list": ({"rows": [ROW], "at": []}, ContractError),
    "two rows of one id": ({"rows": [{**ROW, "id": "a"}, {**ROW, "id": "a"}]}, RequestError),
    "an id that is a number": ({"rows": [{**ROW, "id": 1}]}, RequestError),
    "an empty id": ({"rows": [{**ROW, "id": ""}]}, RequestError),
    "a nested value": ({"rows": [{**ROW, "zone": ["a"]}]}, ContractError),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_reason(what):
    document, error = REFUSED[what]
    with pytest.raises(error):
        wire.read_json(document if isinstance(document, bytes) else orjson.dumps(document), SPEC, NOW)


def test_too_many_rows_are_told_as_such():
    with pytest.raises(TooLarge, match="split"):
        read({"rows": [ROW] * (wire.MAX_REQUEST_ROWS + 1)})


def arrow(columns):
    return wire.write_stream(pa.table(columns))


def test_arrow_takes_the_kin_of_each_type():
    zone = pa.array(["a", "b"]).dictionary_encode()
    start = pa.array([1_367_399_700_000_000_000] * 2, pa.timestamp("ns", "America/New_York"))
    body = arrow(
        {"trip": pa.array([1, 2], pa.int32()), "zone": zone, "miles": pa.array([1, 2], pa.int16()), "at": start}
    )
    rows = wire.read_arrow(body, SPEC, NOW)
    assert rows.at.tolist() == [1_367_399_700_000_000] * 2
    assert rows.columns.to_pydict() == {"zone": ["a", "b"], "miles": [1.0, 2.0]}
    assert orjson.loads(rows.texts[1]) == {"trip": 2, "zone": "b", "miles": 2.0}


@pytest.mark.parametrize(
    "columns",
    [
        {"zone": ["a"]},
        {"zone": [1], "miles": [1.0]},
        {"zone": ["a"], "miles": ["1"]},
        {"zone": pa.array([None], pa.string()), "miles": [1.0]},
        {"zone": ["a"], "miles": [1.0], "at": [datetime(2013, 5, 1)]},
        {"zone": ["a"], "miles": [1.0], "color": ["red"]},
    ],
)
def test_arrow_that_does_not_fit_is_refused(columns):
    with pytest.raises(ContractError):
        wire.read_arrow(arrow(columns), SPEC, NOW)


def test_a_moment_without_a_zone_is_told_without_advice_for_who_calls_arrow():
    body = b'{"rows": [{"zone": "a", "miles": 1.0, "at": "2013-05-01T00:00:00"}]}'
    with pytest.raises(ContractError, match=r"expected a zone offset$"):
        wire.read_json(body, SPEC, NOW)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.none()))


def test_a_column_whose_name_is_no_text_is_refused():
    stream = wire.write_stream(pa.table({"zone": ["a"], "miles": [1.0]}))
    with pytest.raises(RequestError, match="name is no UTF-8"):
        wire.read_arrow(stream.replace(b"miles", b"m\xe8les"), SPEC, NOW)


@settings(max_examples=150)
@given(st.lists(st.dictionaries(st.sampled_from([*COLUMNS, "id", "at", "x"]), VALUES), max_size=4), VALUES)
def test_whatever_json_comes_the_error_is_ours(rows, at):
    try:
        wire.read_json(json.dumps({"rows": rows, "at": at}).encode(), SPEC, NOW)
    except RaymillError as err:
        assert 400 <= err.http_status < 500


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2000), st.binary(max_size=8), st.integers(0, 2000))
def test_whatever_is_done_to_an_arrow_stream_the_error_is_ours(place, junk, cut):
    good = arrow({"zone": ["a", "b"], "miles": [1.0, 2.0], "trip": [1, 2]})
    bad = bytearray(good)
    bad[place : place + len(junk)] = junk
    try:
        wire.read_arrow(bytes(bad[: len(bad) - cut]), SPEC, NOW)
    except RaymillError as err:
        assert 400 <= err.http_status < 500


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(-(2**63), 2**63 - 1), st.text(max_size=6), st.one_of(st.none(), st.floats(-1e9, 1e9))),
        min_size=1,
        max_size=5,
    ),
    st.datetimes(datetime(1950, 1, 1), datetime(2100, 1, 1), timezones=st.just(timezone(timedelta(hours=-5)))),
)
def test_json_and_arrow_say_the_same(values, at):
    rows = [{"trip": t, "zone": z, "miles": m} for t, z, m in values]
    moment = round((at - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))
    one = wire.read_json(orjson.dumps({"rows": rows, "at": at.isoformat()}), SPEC, NOW)
    schema = pa.schema([("trip", pa.int64()), ("zone", pa.string()), ("miles", pa.float64())])
    other = wire.read_arrow(wire.write_stream(pa.Table.from_pylist(rows, schema)), SPEC, NOW, at.isoformat())
    assert one.columns.equals(other.columns)
    assert one.at.tolist() == other.at.tolist() == [moment] * len(rows)
    assert one.keys == other.keys
    assert [orjson.loads(t) for t in one.texts] == [orjson.loads(t) for t in other.texts]


def test_an_answer_in_arrow_carries_the_label():
    import numpy as np

    body = wire.write_arrow(SPEC, ["a"], np.array([3]), np.array([0.25], np.float32))
    table = pa.ipc.open_stream(io.BytesIO(body)).read_all()
    assert table.to_pylist() == [{"id": "a", "version": 3, "p": 0.25}]
    assert table.schema.metadata == {b"model": b"taxi", b"label": b"long"}
