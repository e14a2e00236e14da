"""`raymill predict MODEL`: ask the endpoint."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from raymill.jobs.cli.output import AsJson, emit, table
from raymill.jobs.cli.records import needed_session
from raymill.runtime.errors import RequestError


def predict(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    rows: Annotated[str, typer.Argument(help="JSON: a row, a list of rows, @FILE, or - for standard input.")],
    at: Annotated[str | None, typer.Option(help="Moment of the request, ISO-8601 with a zone; absent: now.")] = None,
    url: Annotated[str | None, typer.Option(help="The endpoint; absent: the running cluster's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predictions of rows, with their ids."""
    from raymill.runtime.client import URL_VARIABLE, connect

    asked = _read(rows)
    with connect(url or os.environ.get(URL_VARIABLE) or needed_session().serve_url, deadline_s=8) as client:
        answers = client.predict(model, asked, at=at).to_pylist()

    def human() -> None:
        table(model, ["id", "version", "p"], [[a["id"], a["version"], f"{a['p']:.4f}"] for a in answers])

    emit(answers, as_json, human)


def _read(text: str) -> list[dict[str, Any]]:
    try:
        source = sys.stdin.read() if text == "-" else Path(text[1:]).read_text() if text.startswith("@") else text
        rows = json.loads(source)
    except OSError as err:
        raise RequestError(f"the rows can not be read: {err}") from err
    except ValueError as err:
        raise RequestError(f'the rows are no JSON ({err}): give a row such as \'{{"origin": "EWR"}}\'') from err
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RequestError("the rows must be a JSON object, or a list of them")
    return rows
