"""The endpoint described as OpenAPI 3.1, from the models that are served; pure.

Invariants: every example is a request that the endpoint takes as it stands, with the answer's status as documented
(where a view requires its entity, with one that was ingested); nothing of callers' rows is in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from raymill.actors import oip, wire
from raymill.actors import openapi_schemas as parts
from raymill.actors.openapi_schemas import JSON
from raymill.actors.rollout import ModelSpec
from raymill.runtime import errors
from raymill.runtime.errors import RaymillError
from raymill.runtime.ids import MAX_ID_LENGTH

PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
}
"""What the page may do: nothing beyond this endpoint."""
PAGE_TYPE = "text/html; charset=utf-8"
ARROW, RAW = wire.ARROW_STREAM, "application/octet-stream"
_AT = "2026-01-05T06:30:00Z"
_EXAMPLES: dict[str, Any] = {
    "string": "a",
    "int64": 1,
    "float64": 1.5,
    "bool": True,
    "timestamp": "2026-01-05T06:30:00Z",
}
_PREDICTING: tuple[type[RaymillError], ...] = (
    errors.RequestError,
    errors.Unauthenticated,
    errors.Forbidden,
    errors.UnknownModel,
    errors.UnknownVersion,
    errors.WrongMethod,
    errors.TooSlow,
    errors.TooLarge,
    errors.ContractError,
    errors.UnknownEntity,
    errors.Overloaded,
    errors.ModelError,
    errors.StoreError,
    errors.Unavailable,
    errors.Expired,
)
_LOOKING = (errors.Unauthenticated, errors.Forbidden, errors.UnknownModel, errors.UnknownVersion, errors.WrongMethod)


def page() -> bytes:
    """The page of `GET /docs`: one file, which shows the document and asks nothing of other hosts."""
    return files("raymill.actors").joinpath("docs_page.html").read_bytes()


def document(models: Iterable[ModelSpec]) -> dict[str, Any]:
    """The document of `GET /openapi.json`."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {"Error": parts.error_schema(), "InferAnswer": parts.infer_answer_schema()}
    for number, spec in enumerate(models):
        key = _key(spec.name, number)
        schemas[f"{key}.Tensor"] = parts.tensor_schema(spec)
        paths[f"/v2/models/{quote(spec.name)}/infer"] = {"post": _infer(spec, key)}
        if spec.columns:
            schemas[f"{key}.Row"], schemas[f"{key}.Answer"] = parts.row_schema(spec), parts.answer_schema(spec)
            paths[f"/predict/{quote(spec.name)}"] = {"post": _predict(spec, key)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "raymill endpoint",
            "version": oip.VERSION,
            "description": "Predictions by rows (`/predict`) and by ready vectors (Open Inference Protocol, `/v2`).",
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"key": []}],
        "tags": [{"name": "predict"}, {"name": "look"}],
        "paths": dict(sorted(paths.items())) | _fixed_paths(),
        "components": {
            "schemas": schemas,
            "responses": {
                parts.response_key(s): r for s, r in parts.error_responses((*_PREDICTING, *_LOOKING)).items()
            },
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, where the endpoint asks for one.",
                }
            },
        },
    }


def example_row(spec: ModelSpec) -> dict[str, Any]:
    """A row with a value for each column that the model needs."""
    return {name: _EXAMPLES[spec.columns[name].dtype] for name in spec.required}


def _example_answer(spec: ModelSpec) -> Any:
    return 0.25 if spec.outputs == 1 else [0.25] * spec.outputs


def _predict(spec: ModelSpec, key: str) -> dict[str, Any]:
    rows = {"type": "array", "minItems": 1, "maxItems": wire.MAX_REQUEST_ROWS, "items": parts.ref(f"{key}.Row")}
    body = {
        "type": "object",
        "required": ["rows"],
        "additionalProperties": False,
        "properties": {"rows": rows, "at": parts.moment_schema("Moment of rows that name none; absent: now.")},
    }
    example = {"rows": [example_row(spec)]}
    answer = {
        "model": spec.name,
        "version": 1,
        "predictions": [{"id": "01M86N3V9K5W0F2Q7XJ4T8RB6D", spec.label: _example_answer(spec), "version": 1}],
    }
    return {
        "operationId": f"predict-{key}",
        "tags": ["predict"],
        "summary": f"{spec.name}: `{spec.label}` of rows",
        "description": (
            f"{_origin(spec)}, and asks the version that the row's id falls to. "
            f"At most {wire.MAX_REQUEST_ROWS:,} rows and {wire.MAX_BODY_BYTES >> 20} MiB. {_required_entities(spec)}"
        ).strip(),
        "parameters": [*parts.common_headers(), parts.at_header()],
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": body, "examples": {"one row": {"value": example}}},
                ARROW: {
                    "schema": {"description": "An Arrow IPC stream with the same columns, `id` and `at` as wished."}
                },
            },
        },
        "responses": {
            "200": {
                "description": "Answers in the order of the rows; an Arrow stream if that was sent.",
                "content": {
                    JSON: {"schema": parts.ref(f"{key}.Answer"), "examples": {"one row": {"value": answer}}},
                    ARROW: {
                        "schema": {"description": f"Columns id string, version int64, p {wire.type_of(spec.outputs)}."}
                    },
                },
            },
            **parts.refs_to_errors(_PREDICTING),
        },
    }


def _origin(spec: ModelSpec) -> str:
    if spec.plan is None:
        return "Takes the inputs from each row, by name"
    return "Looks the features up as of each row's moment"


def _infer(spec: ModelSpec, key: str) -> dict[str, Any]:
    body = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string", "maxLength": MAX_ID_LENGTH, "description": "Given back in the answer."},
            "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": parts.ref(f"{key}.Tensor")},
            "outputs": {"type": "array", "maxItems": 1, "items": {"type": "object"}},
            "parameters": {"type": "object"},
        },
    }
    width = len(spec.inputs)
    tensor = {"name": oip.INPUT, "datatype": "FP32", "shape": [1, width], "data": [0.0] * width}
    output = {"name": spec.label, "datatype": "FP32", "shape": oip.output_shape(1, spec), "data": [0.25] * spec.outputs}
    answer = {
        "model_name": spec.name,
        "model_version": "1",
        "parameters": {"prediction_id": "01M86N3V9K5W0F2Q7XJ4T8RB6D"},
        "outputs": [output],
    }
    return {
        "operationId": f"infer-{key}",
        "tags": ["predict"],
        "summary": f"{spec.name}: `{spec.label}` of ready vectors, by the Open Inference Protocol",
        "description": f"Inputs, in order: {', '.join(f'`{n}`' for n in spec.inputs)}. "
        f"The output has shape {oip.output_shape(-1, spec)}.",
        "parameters": [*parts.common_headers(), parts.length_header()],
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": body, "examples": {"one vector": {"value": {"inputs": [tensor]}}}},
                RAW: {"schema": {"description": "The JSON, then the tensor's values, little-endian FP32."}},
            },
        },
        "responses": {
            "200": {
                "description": "The output tensor; raw behind the JSON where `binary_data_output` was asked for.",
                "content": {
                    JSON: {"schema": parts.ref("InferAnswer"), "examples": {"one vector": {"value": answer}}},
                    RAW: {"schema": {"description": "The JSON, then the values; the JSON's length is in a header."}},
                },
            },
            **parts.refs_to_errors(_PREDICTING),
        },
    }


def _fixed_paths() -> dict[str, Any]:
    model, version = parts.in_path("model"), parts.in_path("version")
    ready = {"200": _told("Whether it is ready: yes."), "400": _told("Not (yet).")}
    found: dict[str, Any] = {
        "/v2": _get("server", "What this server is.", []),
        "/v2/health/live": _get("live", "Whether the server lives.", []),
        "/v2/health/ready": _get("ready", "Whether every model has a version that answers.", [], ready),
    }
    for part, extra, name in (("", [], ""), ("/versions/{version}", [version], "-version")):
        at = f"/v2/models/{{model}}{part}"
        found[at] = _get(f"metadata{name}", "A model's versions, inputs and outputs.", [model, *extra], looking=True)
        found[f"{at}/ready"] = _get(f"model-ready{name}", "Whether it answers.", [model, *extra], ready, looking=True)
    return found


def _get(
    operation: str,
    summary: str,
    parameters: list[Any],
    responses: dict[str, Any] | None = None,
    *,
    looking: bool = False,
) -> dict[str, Any]:
    known = (_LOOKING if looking else _LOOKING[:2]) + ((errors.WrongMethod,) if not looking else ())
    told = responses or {"200": _told(summary)}
    get = {"operationId": operation, "tags": ["look"], "summary": summary, "parameters": parameters}
    return {"get": get | {"responses": {**told, **parts.refs_to_errors(known)}}}


def _told(summary: str) -> dict[str, Any]:
    return {"description": summary, "content": {JSON: {"schema": {"type": "object"}}}}


def _key(name: str, number: int) -> str:
    """The name as components and operations may carry it."""
    return name if re.fullmatch(r"[A-Za-z0-9._-]+", name) else f"model-{number}"


def _required_entities(spec: ModelSpec) -> str:
    """What the examples can not know: entities that must have been ingested."""
    if not isinstance(spec.plan, str) or not spec.plan.startswith("{"):
        return ""
    views = [v for v in json.loads(spec.plan)["views"] if v.get("required")]
    told = [f"{' and '.join(f'`{c}`' for c in v['entity'])} (view `{v['name']}`)" for v in views]
    return f"Of {', '.join(told)} events must have been ingested, else the row gets 422." if told else ""
