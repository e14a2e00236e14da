"""Rows of numbers as text: what is read is what the JSON reader reads, to the last bit; what is odd is left to it."""

import json
import struct

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.number_text import read_rows


def read(texts, width):
    """Rows and whether each was certain."""
    whole = b"".join(texts)
    ends = np.cumsum([len(t) for t in texts])
    out, certain = np.zeros((len(texts), width), np.float32), np.zeros(len(texts), bool)
    read_rows(np.frombuffer(whole, np.uint8), ends - [len(t) for t in texts], ends, out, certain)
    return out, certain


def json_row(text):
    """The same by the JSON reader, through a double; None: it is no list of numbers that are finite as float32."""
    try:
        values = orjson.loads(b"[" + text + b"]")
        if not set(map(type, values)) <= {int, float}:
            return None
        return np.array([struct.unpack("<f", struct.pack("<f", v))[0] for v in values], np.float32)
    except (orjson.JSONDecodeError, OverflowError):
        return None


NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.integers(-(10**20), 10**20),
    st.floats(-1e4, 1e4).map(lambda v: round(v, 4)),
)
SPELT = st.one_of(NUMBERS.map(lambda v: json.dumps(v)), NUMBERS.map(lambda v: f"{v:.9e}"))
SPACE = st.sampled_from(["", " ", "\n\t "])


@given(st.lists(st.tuples(SPACE, SPELT, SPACE).map("".join), min_size=1, max_size=6))
@settings(max_examples=300)
def test_what_is_read_is_what_json_reads(numbers):
    text = ",".join(numbers).encode()
    out, certain = read([text], len(numbers))
    if certain[0]:
        assert out[0].tobytes() == json_row(text).tobytes()


@given(st.text(alphabet='0123456789+-.eE, \n"[]nax', max_size=24), st.integers(1, 4))
@settings(max_examples=500)
def test_what_json_refuses_is_never_read(text, width):
    out, certain = read([text.encode()], width)
    if certain[0]:
        expected = json_row(text.encode())
        assert expected is not None and len(expected) == width
        assert out[0].tobytes() == expected.tobytes()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=50, max_size=50))
@settings(max_examples=30)
def test_float32_written_as_doubles_is_nearly_always_read(values):
    ordinary = [v if 1e-20 < abs(v) < 1e20 else 0.5 for v in values]
    texts = [repr(v).encode() for v in ordinary]
    out, certain = read(texts, 1)
    assert certain.all()
    assert out[:, 0].tobytes() == np.array(ordinary, np.float32).tobytes()


@pytest.mark.parametrize(
    "text",
    [
        b"", b" ", b"1,", b",1", b"01", b"-", b"+1", b"1.", b".5", b"1e", b"1e+", b"1 2", b"1,,2", b"NaN", b"1e400",
        b"1e39", b"12345678901234567890", b"0x1", b"1e00001", b"--1", b"1]",
    ],
)  # fmt: skip
def test_odd_texts_are_left_to_the_json_reader(text):
    assert not read([text], 1)[1][0]


def test_signs_of_zero():
    out, certain = read([b"-0", b"-0.0", b"0", b"0e5", b"-0e-3"], 1)
    assert certain.all()
    assert np.signbit(out[:, 0]).tolist() == [False, True, False, False, True]


def test_rows_beside_an_odd_one_are_read():
    out, certain = read([b"1,2", b"1", b"3, 4"], 2)
    assert certain.tolist() == [True, False, True]
    assert out[[0, 2]].tolist() == [[1, 2], [3, 4]]


def test_halfway_between_two_float32_is_left():
    # 1 + 2**-24 lies just between two float32: whichever way the double errs decides.
    assert not read([b"1.000000059604644775"], 1)[1][0]
