"""`raymill predict MODEL`: ask the endpoint about some rows, or have a whole table answered as a job on the cluster."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymill.jobs.cli.output import AsJson, emit, out, progress, table
from raymill.jobs.cli.records import join, needed_session
from raymill.runtime.errors import RequestError, Usage

if TYPE_CHECKING:
    from raymill.actors.batch_job import Summary
    from raymill.actors.batch_plan import BatchRequest
    from raymill.actors.batch_worker import Done
    from raymill.cluster.session import Session

Keep = Annotated[list[str] | None, typer.Option("--keep", help="Column to stand beside the answers; `*`: all.")]


def predict(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    rows: Annotated[str | None, typer.Argument(help="JSON: a row, a list of rows, @FILE, or - for stdin.")] = None,
    at: Annotated[
        str | None, typer.Option(help="Moment of the rows, ISO-8601 with a zone; of a table also a column's name.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The endpoint; absent: the running cluster's.")] = None,
    answer: Annotated[
        str | None, typer.Option("--table", help="File, folder, Delta table or URL of rows: answered as a job.")
    ] = None,
    to: Annotated[str | None, typer.Option("--out", help="Folder or URL for a job's answers, Parquet.")] = None,
    version: Annotated[
        int | None, typer.Option(help="Version that answers; absent: live, for rows a canary, too.")
    ] = None,
    keep: Keep = None,
    vectors: Annotated[bool, typer.Option(help="The table holds the model's inputs by name.")] = False,
    log: Annotated[bool, typer.Option(help="A table's answers go to the prediction log, too.")] = False,
    delta_version: Annotated[int | None, typer.Option(help="Version of a Delta table; absent: the newest.")] = None,
    job: Annotated[str | None, typer.Option(help="Id of a job; absent: a fresh one.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes of a job; absent: one a processor.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predictions of rows with their ids; or, with --table, of a table of any size, without the endpoint."""
    if answer is None:
        if rows is None or to is not None:
            raise Usage("name rows, or --table TABLE with --out FOLDER: see `raymill predict --help`")
        _refuse_of_tables(
            {
                "--keep": keep,
                "--vectors": vectors,
                "--log": log,
                "--delta-version": delta_version,
                "--job": job,
                "--workers": workers,
            }
        )
        _ask(model, rows, at, version, url, as_json)
        return
    if rows is not None or to is None:
        raise Usage("--table takes the rows from the table and needs --out, a folder or URL for the answers")
    session = needed_session()
    join(session)  # before the imports: Ray reads the session's token when it is imported
    from raymill.actors.batch_plan import BatchRequest
    from raymill.jobs.batch import lasting_place_of, place_of

    here = Path.cwd()
    request = BatchRequest(
        table=place_of(answer, here),
        out=lasting_place_of(to, here),
        at=at,
        keep=tuple(keep or ()),
        vectors=vectors,
        log=log,
        delta_version=delta_version,
    )
    _run(session, model, version, request, job, workers, as_json)


def _refuse_of_tables(given: dict[str, Any]) -> None:
    if of_tables := [option for option, value in given.items() if value]:
        raise Usage(f"{', '.join(of_tables)}: only with --table, whose rows a job answers")


def _ask(model: str, rows: str, at: str | None, version: int | None, url: str | None, as_json: bool) -> None:
    from raymill.runtime.api_keys import key_of_environment
    from raymill.runtime.client import URL_VARIABLE, connect

    asked = _read(rows)
    url = url or os.environ.get(URL_VARIABLE)
    session = None if url else needed_session()
    key = key_of_environment() or (session.operator_key if session else None)
    with connect(url or (session.serve_url if session else None), key=key, deadline_s=8) as client:
        answers = client.predict(model, asked, at=at, version=version).to_pylist()

    def human() -> None:
        table(model, ["id", "version", "p"], [[a["id"], a["version"], _numbers(a["p"])] for a in answers])

    emit(answers, as_json, human)


def _numbers(p: float | list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in (p if isinstance(p, list) else [p]))


def _run(
    session: Session,
    model: str,
    version: int | None,
    request: BatchRequest,
    job: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    from raymill.actors.batch_job import plan_job, run_job
    from raymill.jobs.batch import served

    found, route = served(session, model, version)
    plan = plan_job(found, route, request, session.home, job=job)
    with progress() as bar:
        task = bar.add_task(f"{model} version {plan.version}", total=len(plan.pieces), note="ids that come twice")

        def done(piece: Done, of: int) -> None:
            bar.update(task, advance=1, note="pieces of the table")

        summary = run_job(plan, session.home, workers=workers, on_piece=done)
    emit(asdict(summary), as_json, lambda: out.print(_told(summary)))


def _told(did: Summary) -> str:
    fast = f", {did.answered_now:,} of them now in {did.seconds:,.1f} s ({did.rows_per_s:,.0f} rows/s)"
    twice = f" ({did.duplicates:,} as their id came before)" if did.duplicates else ""
    rejected = f"; {did.rejected:,} rejected{twice}, see {did.out}/_rejects" if did.rejected else ""
    return f"job {did.job}: {did.model} version {did.version} answered {did.rows:,} rows{fast}{rejected}\n{did.out}"


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
