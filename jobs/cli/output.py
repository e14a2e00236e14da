"""What a verb prints: one JSON document or the human form on stdout; progress and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from raymill.runtime.errors import RaymillError, RequestError, SpecError

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]

out = Console(markup=False, highlight=False)  # what is told is data: `[ports]` is no style
err = Console(stderr=True, markup=False, highlight=False)


def claim_stdout() -> None:
    """Keep stdout for what a verb says: whatever Ray and other libraries print goes to stderr from now on."""
    out.file = sys.stdout
    sys.stdout = sys.stderr


def emit(document: Any, as_json: bool, human: Callable[[], None]) -> None:
    """Print the document as JSON, or the human form of it."""
    if as_json:
        print(json.dumps(document, indent=1, default=str, allow_nan=False), file=out.file)
    else:
        human()


def fail(error: RaymillError, as_json: bool) -> int:
    """Print the error with its remedy; the exit code: 2 for what the user wrote, 1 for what went wrong."""
    if as_json:
        told = {"error": error.message, "code": error.code, "remedy": error.remedy}
        print(json.dumps(told, indent=1), file=out.file)
    err.print(Text.assemble((error.code, "bold red"), f": {error.message}"), soft_wrap=True)
    err.print(f"remedy: {error.remedy}", style="dim", soft_wrap=True)
    return 2 if isinstance(error, SpecError | RequestError) else 1


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table on stdout."""
    drawn = Table(title=title, title_justify="left", header_style="bold")
    for name in columns:
        drawn.add_column(name, overflow="fold")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    out.print(drawn)


def progress() -> Progress:
    """A progress bar on stderr; where that is no terminal, nothing moves but the finished lines stay."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        console=err,
        disable=not sys.stderr.isatty(),
    )
