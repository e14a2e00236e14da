"""`raymill quarantine …`: rows that a contract refused: list, show, fix, send in again, discard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymill.jobs.cli.output import AsJson, emit, out, table
from raymill.jobs.cli.records import joined_session
from raymill.runtime.errors import Usage

if TYPE_CHECKING:
    from raymill.actors.quarantine_life import Entry
    from raymill.jobs.mending import Desk

quarantine = typer.Typer(no_args_is_help=True, help="Rows that a contract refused: list, fix, send in again.")

Pipeline = Annotated[str | None, typer.Option(help="Pipeline that runs, or its file; absent: the only one.")]
Source = Annotated[str | None, typer.Option(help="Rows of this source.")]
Reason = Annotated[str | None, typer.Option(help="Rows refused for this, e.g. range:wind_speed.")]
Ids = Annotated[list[str] | None, typer.Argument(help="Ids of rows; absent: all open ones of --source and --reason.")]


@quarantine.command("list", help="Rows that are in quarantine, newest first.")
def list_rows(
    source: Source = None,
    reason: Reason = None,
    closed: Annotated[bool, typer.Option("--closed", help="Those that were reingested or discarded.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most rows shown.")] = 50,
    pipeline: Pipeline = None,
    as_json: AsJson = False,
) -> None:
    """Counts by source and reason, and the newest rows."""
    with _desk(pipeline) as desk:
        found = [e for e in desk.rows.quarantine(source=source, reason=reason) if e.state.is_terminal == closed]
    counts = sorted(Counter((e.source, e.reason) for e in found).items())
    shown = [e.document() for e in reversed(found[-limit:])]
    document = {
        "total": len(found),
        "counts": [{"source": s, "reason": r, "rows": n} for (s, r), n in counts],
        "rows": shown,
    }

    def human() -> None:
        table("quarantine", ["source", "reason", "rows"], [[s, r, f"{n:,}"] for (s, r), n in counts])
        if shown:
            rows = [[e["id"], e["source"], e["reason"], e["state"], json.dumps(e["row"])] for e in shown]
            table(f"newest {len(shown)} of {len(found):,}", ["id", "source", "reason", "state", "row"], rows)

    emit(document, as_json, human)


@quarantine.command(help="All that is known of a row.")
def show(
    entry: Annotated[str, typer.Argument(metavar="ID", help="Id of the row.")],
    pipeline: Pipeline = None,
    as_json: AsJson = False,
) -> None:
    """One quarantined row, with its columns."""
    with _desk(pipeline) as desk:
        (found,) = desk.rows.quarantine([entry])
    document = found.document()

    def human() -> None:
        table(entry, ["", ""], [[k, v] for k, v in document.items() if k != "row" and v not in ("", None)])
        table("row", ["column", "value"], [[k, json.dumps(v)] for k, v in document["row"].items()])

    emit(document, as_json, human)


@quarantine.command(help="Change columns of rows; they come in with the next reingest.")
def fix(
    ids: Ids = None,
    source: Source = None,
    reason: Reason = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="column=value; nothing after = is null.")] = None,
    set_file: Annotated[list[str] | None, typer.Option(help="column=path of the bytes of a column of media.")] = None,
    file: Annotated[Path | None, typer.Option(help='JSON lines: {"id": …, "row": {column: value, …}}.')] = None,
    pipeline: Pipeline = None,
    as_json: AsJson = False,
) -> None:
    """Either the same columns of all named rows, or of each what a file says (`list --json` gives its form)."""
    if bool(set_ or set_file) == bool(file):
        raise Usage("say what to change: either --set column=value, once or more, or --file rows.jsonl")
    if file is not None and (ids or source or reason):
        raise Usage("--file names its rows itself: leave ids, --source and --reason away")
    same: dict[str, Any] = {name: text or None for name, text in _settings(set_ or [])}
    same |= {name: _bytes(path) for name, path in _settings(set_file or [])}
    each = _changes(file) if file else {}
    with _desk(pipeline) as desk:
        changes = each or dict.fromkeys(_chosen(desk, ids, source, reason), same)
        fixed = desk.rows.fix(changes)
    emit(
        [e.document() for e in fixed],
        as_json,
        lambda: out.print(f"{len(fixed):,} rows are fixed; `raymill quarantine reingest` sends them in"),
    )


@quarantine.command(help="Hold rows against the contract again; those that pass go to the lake, once.")
def reingest(
    ids: Ids = None,
    source: Source = None,
    reason: Reason = None,
    pipeline: Pipeline = None,
    as_json: AsJson = False,
) -> None:
    """What a reingest before this one did not bring to its end comes first."""
    with _desk(pipeline) as desk:
        landed = desk.reingest(_chosen(desk, ids, source, reason))
    batches = [{"source": d.source, "batch_id": d.batch_id, "accepted": d.accepted} for d in landed]
    still = sum((Counter(d.quarantined) for d in landed), Counter[str]())
    document = {"accepted": sum(d.accepted for d in landed), "still_refused": dict(still), "batches": batches}

    def human() -> None:
        out.print(f"{document['accepted']:,} rows are in the lake now, {still.total():,} are still refused")
        for why, rows in sorted(still.items()):
            out.print(f"  {why}  {rows:,}")

    emit(document, as_json, human)


@quarantine.command(help="Close rows for good; they never come in.")
def discard(
    why: Annotated[str, typer.Option(help="Why, for the log.")],
    ids: Ids = None,
    source: Source = None,
    reason: Reason = None,
    pipeline: Pipeline = None,
    as_json: AsJson = False,
) -> None:
    """The rows stay readable; `list --closed` shows them."""
    with _desk(pipeline) as desk:
        count = desk.rows.discard(_chosen(desk, ids, source, reason), why)
    emit({"discarded": count}, as_json, lambda: out.print(f"{count:,} rows are discarded"))


@contextmanager
def _desk(pipeline: str | None) -> Iterator[Desk]:
    """The desk; a running cluster is joined before anything imports Ray, which reads its token only then."""
    session = joined_session()
    from raymill.jobs.mending import open_desk

    with open_desk(pipeline, session) as desk:
        yield desk


def _chosen(desk: Desk, ids: list[str] | None, source: str | None, reason: str | None) -> list[str]:
    """Ids of the rows that are meant."""
    if ids:
        if source or reason:
            raise Usage("name rows either by their ids or by --source and --reason")
        return list(dict.fromkeys(ids))
    if not source and not reason:
        raise Usage("say which rows: ids, or --source and --reason; `raymill quarantine list` shows them")
    from raymill.actors.quarantine_life import State

    found: list[Entry] = desk.rows.quarantine(source=source, reason=reason, state=State.OPEN)
    return [e.id for e in found]


def _settings(words: list[str]) -> list[tuple[str, str]]:
    split = [word.partition("=") for word in words]
    bad = [word for word, (name, sign, _) in zip(words, split, strict=True) if not name or not sign]
    if bad:
        raise Usage(f"{bad[0]!r} sets nothing: write column=value")
    return [(name, value) for name, _, value in split]


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as err:
        raise Usage(f"--set-file {path} can not be read: {err}") from err


def _changes(file: Path) -> dict[str, dict[str, Any]]:
    """What a file says of each row: id → {column: value}."""
    changes: dict[str, dict[str, Any]] = {}
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise Usage(f"--file {file} can not be read: {err}") from err
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
        except ValueError as err:
            raise Usage(f"--file {file}, line {number} is no JSON: {err}") from err
        if not isinstance(told, dict) or not isinstance(told.get("id"), str) or not isinstance(told.get("row"), dict):
            raise Usage(f'--file {file}, line {number}: write {{"id": "…", "row": {{"column": value}}}}')
        if told["id"] in changes:
            raise Usage(f"--file {file}, line {number}: row {told['id']} is named twice")
        changes[told["id"]] = told["row"]
    if not changes:
        raise Usage(f"--file {file} names no row")
    return changes
