"""The endpoint's description of itself: valid, true, and shown by a page that needs nobody else."""

import asyncio
import re
from dataclasses import replace
from urllib.parse import unquote

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from raymill.actors import openapi, routes
from raymill.actors.named_inputs import spec_alone
from raymill.actors.rollout import ColumnForm
from raymill.runtime.errors import ModelError
from tests.unit.actors import serving_parts
from tests.unit.actors.serving_parts import model

VECTORS = {"plan": None, "columns": {}, "required": (), "key": ()}
SPECS = [
    model((1, "live", 1.0)),
    model((1, "live", 1.0), name="a model", **VECTORS),
    model((1, "live", 1.0), name="whole", required=tuple(serving_parts.COLUMNS)),
]


@pytest.fixture(scope="module")
def document():
    return openapi.document(SPECS)


def ask(test, home):
    async def whole():
        found = await serving_parts.replica(home, *SPECS)
        try:
            async with serving_parts.http(found) as client:
                return await test(client)
        finally:
            found.stop()

    return asyncio.run(whole())


def schema_in(document, schema):
    """A schema that stands on its own."""
    return {**schema, "components": document["components"]}


def test_the_document_is_valid_whatever_the_models_are_called():
    odd = [replace(SPECS[0], name=name, label=name) for name in ("a/b", "ü", "{x}", "a b")]
    OpenAPIV31SpecValidator(openapi.document([SPECS[1], *odd])).validate()
    OpenAPIV31SpecValidator(openapi.document([])).validate()


def test_every_example_gets_the_status_and_the_form_that_are_documented(document, tmp_path):
    async def test(client):
        assert (await client.get("/openapi.json")).json() == document
        asked = 0
        for path, item in document["paths"].items():
            for method, operation in item.items():
                content = operation.get("requestBody", {}).get("content", {}).get("application/json")
                bodies = [e["value"] for e in content["examples"].values()] if content else [None]
                url = path.replace("{model}", "taxi").replace("{version}", "1")
                for body in bodies:
                    answer = await client.request(method, url, json=body)
                    assert answer.status_code == 200, (url, answer.text)
                    told = operation["responses"]["200"]["content"]["application/json"]
                    shown = [e["value"] for e in told.get("examples", {}).values()]
                    for form in (answer.json(), *shown):
                        Draft202012Validator(schema_in(document, told["schema"])).validate(form)
                    if body is not None:
                        Draft202012Validator(schema_in(document, content["schema"])).validate(body)
                    asked += 1
        return asked

    assert ask(test, tmp_path) == 12


@pytest.mark.parametrize(
    ("path", "changes", "headers", "code"),
    [
        ("/predict/taxi", {"rows": []}, {}, "request_error"),
        ("/predict/taxi", {"rows": [{"zone": "a"}]}, {}, "contract_error"),
        ("/predict/taxi", {"rows": [{"zone": "nowhere", "miles": 1.0}]}, {}, "unknown_entity"),
        ("/predict/taxi", {"rows": [{"zone": "a", "miles": 1.0}]}, {"timeout": "soon"}, "request_error"),
        ("/predict/taxi", {"rows": [{"zone": "a", "miles": 1.0}]}, {"x-raymill-version": "9"}, "unknown_version"),
        ("/v2/models/taxi/infer", {"inputs": []}, {}, "request_error"),
    ],
)
def test_what_is_refused_is_refused_with_a_code_that_the_document_names(
    document, tmp_path, path, changes, headers, code
):
    async def test(client):
        return await client.post(path, json=changes, headers=headers)

    answer = ask(test, tmp_path)
    assert answer.json()["code"] == code
    response = document["paths"][path]["post"]["responses"][str(answer.status_code)]
    response = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
    assert f"`{code}`" in response["description"]
    Draft202012Validator(schema_in(document, {"$ref": "#/components/schemas/Error"})).validate(answer.json())


def test_columns_stand_there_with_their_types_and_what_is_needed(document):
    row = document["components"]["schemas"]["taxi.Row"]
    assert row["required"] == ["zone", "miles"] and row["additionalProperties"] is False
    assert row["properties"]["trip"] == {"type": "integer", "format": "int64"}
    assert row["properties"]["miles"]["type"] == ["number", "null"]
    assert "/predict/a%20model" not in document["paths"]  # which takes ready vectors alone
    assert len(document["paths"]["/v2/models/a%20model/infer"]["post"]["requestBody"]["content"]) == 2


def test_entities_that_must_be_known_are_told():
    plan = '{"views": [{"name": "z", "required": true, "entity": ["zone"]}, {"name": "r"}]}'
    told = openapi.document([model((1, "live", 1.0), plan=plan)])["paths"]["/predict/taxi"]["post"]["description"]
    assert "`zone` (view `z`) events must have been ingested" in told


def test_a_model_without_features_is_not_said_to_look_them_up():
    paths = openapi.document([spec_alone("alone", ("a", "b"), [])])["paths"]
    assert paths["/predict/alone"]["post"]["description"].startswith("Takes the inputs from each row, by name")


def test_every_path_of_the_endpoint_that_is_for_callers_is_described(document):
    named = {re.sub(r"\[.*?\]", "", p.split()[1]) for p in routes.PATHS if "/raymill" not in p}
    named -= {"/docs", "/openapi.json", "/healthz"}
    of_taxi = {
        unquote(p).replace("/predict/taxi", "/predict/{model}").replace("/taxi/", "/{model}/")
        for p in document["paths"]
    }
    assert named <= of_taxi


def test_the_page_needs_no_other_host_and_lets_nothing_in(tmp_path):
    async def test(client):
        return await client.get("/docs"), await client.post("/docs")

    page, wrong = ask(test, tmp_path)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|innerHTML|src=", page.text)
    assert wrong.status_code == 405


def test_a_type_that_a_column_may_have_has_an_example():
    columns = {d: ColumnForm(d, False) for d in ("string", "int64", "float64", "bool", "timestamp")}
    spec = replace(SPECS[0], columns=columns, required=tuple(columns))
    assert list(openapi.example_row(spec)) == list(columns)


@pytest.mark.parametrize("kind", openapi._PREDICTING)
def test_no_remedy_names_what_a_caller_has_not_or_what_does_not_look_at_models(kind):
    assert "README" not in kind.remedy  # it does not come with the endpoint, /docs does
    assert kind is not ModelError or "doctor" not in kind.remedy  # that looks at machines
