"""The Open Inference Protocol's documents and tensors."""

import json

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors import oip
from raymill.runtime.errors import RaymillError, RequestError
from tests.unit.actors.serving_parts import model

SPEC = model((1, "live", 1.0))
X = np.array([[1.0, 2.0], [3.0, float("nan")]], dtype=np.float32)


def request(**changes):
    tensor = {"name": "features", "shape": [2, 2], "datatype": "FP32", "data": [1.0, 2.0, 3.0, 4.0]} | changes
    return {"inputs": [{k: v for k, v in tensor.items() if v is not None}]}


def binary(x):
    raw = x.astype("<f4").tobytes()
    head = orjson.dumps(request(data=None, parameters={"binary_data_size": len(raw)}))
    return head + raw, str(len(head))


def test_flat_and_nested_and_binary_data_say_the_same():
    flat = oip.read_infer(orjson.dumps(request()), None, SPEC)
    nested = oip.read_infer(orjson.dumps(request(data=[[1, 2], [3, 4]])), None, SPEC)
    raw = oip.read_infer(*binary(np.array([[1, 2], [3, 4]])), SPEC)
    assert flat.x.tolist() == nested.x.tolist() == raw.x.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_unknown_is_nan_in_binary():
    np.testing.assert_array_equal(oip.read_infer(*binary(X), SPEC).x, X)


def test_numbers_whose_squares_are_too_large_are_no_infinite_ones():
    x = np.array([[1e30, -1e30], [3e38, float("nan")]], np.float32)
    np.testing.assert_array_equal(oip.read_infer(*binary(x), SPEC).x, x)


@pytest.mark.parametrize("rows", [2, 1024, 1025])
def test_each_row_has_a_prediction_id_of_its_own(rows):
    infer = oip.infer_of(np.zeros((rows, 2), np.float32), None, binary=True)
    assert infer.ids == [f"{infer.prediction_id}/{i}" for i in range(rows)]


def test_the_callers_id_comes_back_and_names_no_prediction():
    body = orjson.dumps(request() | {"id": "1"})
    one, other = oip.read_infer(body, None, SPEC), oip.read_infer(body, None, SPEC)
    assert one.request_id == other.request_id == "1"
    assert set(one.ids).isdisjoint(other.ids)


def test_the_answer_has_no_nulls_and_says_what_it_is():
    infer = oip.read_infer(orjson.dumps(request()), None, SPEC)
    body, length = oip.write_infer(SPEC, infer, 3, np.array([0.25, 0.5], np.float32))
    assert length is None
    assert orjson.loads(body) == {
        "model_name": "taxi",
        "model_version": "3",
        "parameters": {"prediction_id": infer.prediction_id},
        "outputs": [{"name": "long", "datatype": "FP32", "shape": [2], "data": [0.25, 0.5]}],
    }


@pytest.mark.parametrize(
    "wish",
    [
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "long", "parameters": {"binary_data": True}}]},
    ],
)
def test_the_answer_comes_as_raw_data_if_wished(wish):
    infer = oip.read_infer(orjson.dumps(request() | wish), None, SPEC)
    body, length = oip.write_infer(SPEC, infer, 3, np.array([0.25, 0.5], np.float32))
    output = orjson.loads(body[:length])["outputs"][0]
    assert output == {"name": "long", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
    assert np.frombuffer(body[length:], "<f4").tolist() == [0.25, 0.5]


REFUSED = {
    "another name": request(name="x"),
    "another type": request(datatype="FP64"),
    "another width": request(shape=[1, 4]),
    "a lying shape": request(shape=[3, 2]),
    "a negative shape": request(shape=[-2, -2]),
    "a shape of truth values": request(shape=[True, 2]),
    "no rows": request(shape=[0, 2], data=[]),
    "a null": request(data=[1, 2, 3, None]),
    "text": request(data=[1, 2, 3, "4"]),
    "ragged rows": request(data=[[1, 2], [3]]),
    "too large for FP32": request(data=[1, 2, 3, 1e39]),
    "no data": request(data=None),
    "two inputs": {"inputs": request()["inputs"] * 2},
    "another output": request() | {"outputs": [{"name": "x"}]},
    "an id that is a number": request() | {"id": 1},
    "parameters that are a list": request() | {"parameters": []},
    "a list": [],
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_reason(what):
    with pytest.raises(RequestError):
        oip.read_infer(orjson.dumps(REFUSED[what]), None, SPEC)


@pytest.mark.parametrize("length", ["-1", "x", "99999", "", "1e2", "²"])
def test_a_lying_length_of_the_json_is_refused(length):
    with pytest.raises(RequestError):
        oip.read_infer(binary(X)[0], length, SPEC)


def test_infinite_and_truncated_raw_data_are_refused():
    with pytest.raises(RequestError, match="infinite"):
        oip.read_infer(*binary(np.array([[1, np.inf], [0, 0]])), SPEC)
    body, length = binary(X)
    with pytest.raises(RequestError, match="binary_data_size"):
        oip.read_infer(body[:-1], length, SPEC)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.sampled_from(["features", "FP32", "long"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["name", "data"]), inner)),
    max_leaves=6,
)
FIELDS = ("name", "shape", "datatype", "data", "parameters")


@settings(max_examples=200)
@given(st.sampled_from(FIELDS), JSON, st.sampled_from(["outputs", "parameters", "id", "inputs"]), JSON)
def test_whatever_comes_the_error_is_ours(field, value, outer, other):
    document = request(**{field: value})
    document = document if value is None else document | {outer: other}
    try:
        oip.read_infer(json.dumps(document).encode(), None, SPEC)
    except RaymillError as err:
        assert 400 <= err.http_status < 500
