"""The Open Inference Protocol, version 2, over HTTP: its documents and tensors, pure.

A model takes one FP32 tensor `[-1, n]`, the ready feature vector, and gives one FP32 tensor, named after the label:
`[-1]`, or `[-1, k]` where it has k > 1 numbers a row. Tensors travel as JSON or by the binary extension: JSON first,
its length in `Inference-Header-Content-Length`, raw little-endian data after it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from raymill.actors.rollout import ModelSpec, answer_shape
from raymill.actors.wire import check_count
from raymill.runtime.errors import RequestError
from raymill.runtime.ids import MAX_ID_LENGTH, new_ids

VERSION = "0.1.0"
PLATFORM = "raymill"
INPUT = "features"
EXTENSIONS = ("binary_tensor_data",)
_FEW = 512  # numbers that are turned into floats faster without numpy
_PLACES = tuple(f"/{i}" for i in range(1024))  # of rows within a request


@dataclass(frozen=True, slots=True)
class Infer:
    """A request to infer, read."""

    x: npt.NDArray[np.float32]
    """[rows, n]."""
    ids: list[str]
    """Fresh prediction ids: a ULID for one row, `<ULID>/<row>` for several. The request's own id is no name of a
    prediction: clients of this protocol use one id again and again."""
    prediction_id: str
    """That ULID, told in the answer's parameters."""
    request_id: str | None
    """Given back in the answer."""
    binary: bool
    """Whether the output is to come as raw data."""


def server_metadata() -> dict[str, Any]:
    """The document of `GET /v2`."""
    return {"name": "raymill", "version": VERSION, "extensions": list(EXTENSIONS)}


def model_metadata(spec: ModelSpec, versions: Sequence[int]) -> dict[str, Any]:
    """The document of `GET /v2/models/{model}`."""
    return {
        "name": spec.name,
        "versions": [str(v) for v in versions],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, len(spec.inputs)]}],
        "outputs": [{"name": spec.label, "datatype": "FP32", "shape": output_shape(-1, spec)}],
    }


def output_shape(rows: int, spec: ModelSpec) -> list[int]:
    """Shape of the output tensor."""
    return list(answer_shape(rows, spec.outputs))


def read_infer(body: bytes, json_length: str | None, spec: ModelSpec) -> Infer:
    """A request to infer.

    Args:
        body: JSON, with raw tensor data after it if `json_length` is given.
        json_length: header `Inference-Header-Content-Length`.
        spec: the model asked.

    Raises:
        RequestError: the body is not such a request for this model.
        TooLarge: more than `MAX_REQUEST_ROWS` rows.
    """
    head, raw = _split(body, json_length)
    try:
        document = orjson.loads(head)
    except orjson.JSONDecodeError as err:
        raise RequestError(f"the body is not JSON ({err}): see the Open Inference Protocol, inference request") from err
    if not isinstance(document, dict):
        raise RequestError("the body must be an object with 'inputs'")
    request_id = document.get("id")
    if request_id is not None and not (isinstance(request_id, str) and len(request_id) <= MAX_ID_LENGTH):
        raise RequestError(f"'id' must be a string of at most {MAX_ID_LENGTH} characters")
    tensor = _only_input(document, spec)
    x = _values(tensor, check_shape(tensor.get("shape"), spec), raw)
    return infer_of(x, request_id, _wants_binary(document, spec))


def infer_of(x: npt.NDArray[np.float32], request_id: str | None, binary: bool) -> Infer:
    """A request to infer, with prediction ids of its own."""
    prediction_id = new_ids(1)[0]
    rows = len(x)
    places = _PLACES[:rows] if rows <= len(_PLACES) else [f"/{i}" for i in range(rows)]
    ids = [prediction_id] if rows == 1 else [prediction_id + place for place in places]
    return Infer(x, ids, prediction_id, request_id, binary)


def write_infer(spec: ModelSpec, infer: Infer, version: int, p: npt.NDArray[np.float32]) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON if raw data follows it."""
    shape, p = ([len(p)], p) if p.ndim == 1 else (list(p.shape), p.ravel())
    output: dict[str, Any] = {"name": spec.label, "datatype": "FP32", "shape": shape}
    document: dict[str, Any] = {"model_name": spec.name, "model_version": str(version)}
    if infer.request_id is not None:
        document["id"] = infer.request_id
    document["parameters"] = {"prediction_id": infer.prediction_id}
    document["outputs"] = [output]
    if not infer.binary:
        output["data"] = p.astype(np.float64).tolist()
        return orjson.dumps(document), None
    raw = p.astype("<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(raw)}
    head = orjson.dumps(document)
    return head + raw, len(head)


def _split(body: bytes, json_length: str | None) -> tuple[bytes, bytes]:
    if json_length is None:
        return body, b""
    if not (
        json_length.isascii() and json_length.isdigit() and len(json_length) < 12 and int(json_length) <= len(body)
    ):
        raise RequestError(f"Inference-Header-Content-Length is {json_length!r}, the body has {len(body)} bytes")
    return body[: int(json_length)], body[int(json_length) :]


def _only_input(document: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError(f"'inputs' must be a list of one tensor, {INPUT!r} FP32 [-1, {len(spec.inputs)}]")
    tensor: dict[str, Any] = inputs[0]
    check_input(tensor.get("name"), tensor.get("datatype"), spec)
    return tensor


def check_input(name: Any, datatype: Any, spec: ModelSpec) -> None:
    """Refuse a tensor that is not the model's input.

    Raises:
        RequestError: it has another name or type.
    """
    if name != INPUT:
        raise RequestError(f"the input is named {name!r}: model {spec.name!r} takes {INPUT!r}")
    if datatype != "FP32":
        raise RequestError(f"the input's datatype is {datatype!r}: model {spec.name!r} takes 'FP32'")


def check_shape(shape: Any, spec: ModelSpec) -> tuple[int, int]:
    """Rows and columns of a tensor whose shape fits the model.

    Raises:
        RequestError: it does not.
        TooLarge: more than `MAX_REQUEST_ROWS` rows.
    """
    width = len(spec.inputs)
    if not isinstance(shape, list) or [type(s) for s in shape] != [int, int] or shape[1] != width or shape[0] < 1:
        raise RequestError(f"the input's shape is {shape}: model {spec.name!r} takes [rows, {width}], at least one row")
    check_count(shape[0], spec)
    return shape[0], width


def _values(tensor: dict[str, Any], shape: tuple[int, int], raw: bytes) -> npt.NDArray[np.float32]:
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        if raw:
            raise RequestError(f"{len(raw)} bytes follow the JSON, but the input has no 'binary_data_size'")
        return _from_json(tensor.get("data"), shape)
    else:
        if type(size) is not int or size != len(raw) or size != 4 * shape[0] * shape[1]:
            raise RequestError(
                f"binary_data_size is {size}, {len(raw)} bytes follow the JSON: shape {list(shape)} of FP32 takes "
                f"{4 * shape[0] * shape[1]}"
            )
        if "data" in tensor:
            raise RequestError("the input has both 'data' and 'binary_data_size': send one of them")
        return finite(np.frombuffer(raw, dtype="<f4").reshape(shape).astype(np.float32))


def finite(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The values, none of which is infinite.

    Raises:
        RequestError: one is.
    """
    flat = x.ravel()
    with np.errstate(over="ignore"):
        squares = np.dot(flat, flat)  # faster than a look at each; too large, or NaN, it says nothing
    if not math.isfinite(squares) and bool(np.isinf(x).any()):
        raise RequestError("the input holds values that are infinite as FP32: send finite ones, or NaN for unknown")
    return x


def _from_json(data: Any, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Flat or nested data, row by row."""
    if not isinstance(data, list):
        raise RequestError("the input has no list 'data', and no 'binary_data_size'")
    flat = data
    if data and type(data[0]) is list:
        if len(data) != shape[0] or any(type(row) is not list or len(row) != shape[1] for row in data):
            raise RequestError(f"'data' is nested, but not as its shape {list(shape)} says")
        flat = list(chain.from_iterable(data))
    if len(flat) != shape[0] * shape[1]:
        raise RequestError(f"'data' has {len(flat)} values, shape {list(shape)} takes {shape[0] * shape[1]}")
    if not set(map(type, flat)) <= {int, float}:
        raise RequestError("'data' must hold numbers only")
    if len(flat) <= _FEW and math.isfinite(sum(flat)):
        with suppress(OverflowError):  # a number too large for FP32: below it becomes infinite, and is told
            return np.frombuffer(bytearray(_floats(len(flat)).pack(*flat)), dtype=np.float32).reshape(shape)
    with np.errstate(over="ignore"):
        return finite(np.array(flat, dtype=np.float64).astype(np.float32).reshape(shape))


@cache
def _floats(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}f")  # the native form takes what is too large for infinite


def _parameters(part: dict[str, Any]) -> dict[str, Any]:
    parameters = part.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError("'parameters' must be an object")
    return parameters


def _wants_binary(document: dict[str, Any], spec: ModelSpec) -> bool:
    whole = _parameters(document).get("binary_data_output", False) is True
    outputs = document.get("outputs")
    if outputs is None or outputs == []:
        return whole
    if not isinstance(outputs, list) or len(outputs) != 1 or not isinstance(outputs[0], dict):
        raise RequestError(f"'outputs' may name one tensor, {spec.label!r}")
    if outputs[0].get("name") != spec.label:
        raise RequestError(f"there is no output {outputs[0].get('name')!r}: model {spec.name!r} has {spec.label!r}")
    return bool(_parameters(outputs[0]).get("binary_data", whole) is True)
