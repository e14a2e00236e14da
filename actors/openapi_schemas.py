"""The schemas, headers and errors in the endpoint's OpenAPI document; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raymill.actors import oip, wire
from raymill.actors.rollout import ColumnForm, ModelSpec
from raymill.runtime.errors import RaymillError
from raymill.runtime.ids import MAX_ID_LENGTH

JSON = "application/json"
_TYPES: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "int64": {"type": "integer", "format": "int64"},
    "float64": {"type": "number"},
    "bool": {"type": "boolean"},
    "timestamp": {"type": ["string", "integer"], "description": "ISO-8601 with a zone, or microseconds UTC"},
}
_ID = {"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}


def row_schema(spec: ModelSpec) -> dict[str, Any]:
    """A row as `/predict` takes it."""
    properties = {
        "id": {**_ID, "description": "Name of the prediction: the same id gets the same answer. Absent: a fresh one."},
        "at": moment_schema("The row's moment; absent: the request's."),
    }
    properties |= {name: _column(form) for name, form in spec.columns.items()}
    return {
        "type": "object",
        "required": list(spec.required),
        "additionalProperties": False,
        "properties": properties,
    }


def _column(form: ColumnForm) -> dict[str, Any]:
    kind = dict(_TYPES[form.dtype])
    if form.nullable:
        given = kind["type"]
        kind["type"] = [*(given if isinstance(given, list) else [given]), "null"]
    return kind


def answer_schema(spec: ModelSpec) -> dict[str, Any]:
    """The answer to rows."""
    number: dict[str, Any] = {"type": "number"}
    if spec.outputs > 1:
        number = {"type": "array", "items": number, "minItems": spec.outputs, "maxItems": spec.outputs}
    prediction = {
        "type": "object",
        "required": ["id", spec.label, "version"],
        "properties": {"id": _ID, spec.label: number, "version": {"type": "integer"}},
    }
    return {
        "type": "object",
        "required": ["model", "predictions"],
        "properties": {
            "model": {"const": spec.name},
            "version": {"type": "integer", "description": "The version that answered, if it was one for all rows."},
            "predictions": {"type": "array", "items": prediction},
        },
    }


def tensor_schema(spec: ModelSpec) -> dict[str, Any]:
    """The input tensor."""
    width = len(spec.inputs)
    return {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"const": oip.INPUT},
            "datatype": {"const": "FP32"},
            "shape": {
                "type": "array",
                "prefixItems": [{"type": "integer", "minimum": 1, "maximum": wire.MAX_REQUEST_ROWS}, {"const": width}],
                "minItems": 2,
                "maxItems": 2,
            },
            "data": {"type": "array", "description": "Row by row, flat or nested."},
            "parameters": {"type": "object", "description": "`binary_data_size`: bytes of the values behind the JSON."},
        },
    }


def infer_answer_schema() -> dict[str, Any]:
    """The answer to a tensor."""
    return {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string", "description": "The request's."},
            "parameters": {"type": "object", "description": "`prediction_id`: of one row the id, of several its stem."},
            "outputs": {"type": "array", "items": {"type": "object"}},
        },
    }


def error_schema() -> dict[str, Any]:
    """The body of every error."""
    text = {"type": "string"}
    return {
        "type": "object",
        "required": ["error", "code", "remedy"],
        "properties": {
            "error": {**text, "description": "What happened, where, what to do."},
            "code": {**text, "description": "The error's name; see each status."},
            "remedy": text,
        },
    }


def error_responses(classes: Sequence[type[RaymillError]]) -> dict[int, dict[str, Any]]:
    """Status → what it says, with the codes of the errors that have it."""
    by_status: dict[int, list[type[RaymillError]]] = {}
    for cls in dict.fromkeys(classes):
        by_status.setdefault(cls.http_status, []).append(cls)
    found = {}
    for status, some in sorted(by_status.items()):
        told = "; ".join(f"`{cls('').code}`: {(cls.__doc__ or '').splitlines()[0].rstrip('.')}" for cls in some)
        response: dict[str, Any] = {"description": told, "content": {JSON: {"schema": ref("Error")}}}
        if status in (429, 503):
            seconds = {"description": "Seconds to wait.", "schema": {"type": "integer"}}
            response["headers"] = {"retry-after": seconds}
        found[status] = response
    return found


def response_key(status: int) -> str:
    """Name of a status' response among the components."""
    return f"Error{status}"


def common_headers() -> list[dict[str, Any]]:
    """Headers of every request to predict."""
    return [
        _header("timeout", "Seconds for which an answer is of use; what waits longer gets 504.", {"type": "number"}),
        _header("x-raymill-version", "Version that is to answer; absent: as the weights say.", {"type": "integer"}),
        _header(
            "x-request-id", "Comes back in the answer and in the access log; absent: a fresh one.", {"type": "string"}
        ),
        _header("traceparent", "W3C trace context: the caller's trace goes on here.", {"type": "string"}),
    ]


def at_header() -> dict[str, Any]:
    """Header of Arrow requests."""
    return _header("x-raymill-at", "Of an Arrow stream without column `at`: moment of its rows.", {"type": "string"})


def length_header() -> dict[str, Any]:
    """Header of raw tensors."""
    told = "Bytes of the JSON before raw tensor data."
    return _header("inference-header-content-length", told, {"type": "integer"})


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def in_path(name: str) -> dict[str, Any]:
    """A parameter in the path."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def moment_schema(description: str) -> dict[str, Any]:
    """A moment, which may be absent."""
    return {**_TYPES["timestamp"], "type": ["string", "integer", "null"], "description": description}


def ref(schema: str) -> dict[str, str]:
    """Reference to a schema among the components."""
    return {"$ref": f"#/components/schemas/{schema}"}


def refs_to_errors(classes: Sequence[type[RaymillError]]) -> dict[str, Any]:
    """Status → reference to what it says."""
    statuses = sorted({cls.http_status for cls in classes})
    return {str(s): {"$ref": f"#/components/responses/{response_key(s)}"} for s in statuses}
