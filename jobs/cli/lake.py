"""`raymill lake …`: the tables of this home's lakes: list them, merge their small parts, remove what nobody needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymill.jobs.cli.output import AsJson, emit, table
from raymill.jobs.cli.records import open_records
from raymill.runtime.errors import SpecError, Usage
from raymill.runtime.expressions import duration_us

if TYPE_CHECKING:
    from raymill.actors.lake import Lake

lake = typer.Typer(no_args_is_help=True, help="Tables of the lake: list, compact, vacuum.")

Tables = Annotated[list[str] | None, typer.Argument(help="Tables; absent: all.")]


@lake.command("list", help="Tables: rows, parts, bytes, newest version, pinned versions.")
def list_tables(tables: Tables = None, as_json: AsJson = False) -> None:
    """Every table of every lake that this home's pipelines use."""
    with _chosen(tables) as (found, pins):
        told = [{"lake": at.root, **asdict(at.describe(t)), "pinned": sorted(pins.get(t, ()))} for at, t in found]

    def row(f: dict[str, Any]) -> list[Any]:
        pinned = ", ".join(map(str, f["pinned"])) or "–"
        return [f"{f['rows']:,}", f["parts"], _bytes(f["size"]), f["version"], f["sorted_by"] or "–", pinned]

    emit(told, as_json, lambda: _tables(told, ["rows", "parts", "bytes", "version", "sorted by", "pinned"], row))


@lake.command(help="Merge small parts into few, in the order of event time.")
def compact(tables: Tables = None, as_json: AsJson = False) -> None:
    """Old versions stay as they are until they are vacuumed."""
    told: list[dict[str, Any]] = []
    with _chosen(tables) as (found, _):
        for at, name in found:
            merged = at.compact(name, fewest=2)
            now = at.describe(name)
            before = now.parts if merged is None else now.parts - merged.after + merged.before
            told.append({"lake": at.root, "table": name, "before": before, "after": now.parts, "version": now.version})

    def row(f: dict[str, Any]) -> list[Any]:
        return [f["before"], f["after"], f["version"]]

    emit(told, as_json, lambda: _tables(told, ["parts before", "now", "version"], row))


@lake.command(help="Remove files that only versions need which are neither pinned nor young.")
def vacuum(
    tables: Tables = None,
    older_than: Annotated[str, typer.Option(help="How long ago a version was the newest, at least 1h.")] = "7d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False,
    as_json: AsJson = False,
) -> None:
    """A version that a training set's manifest in this home's ledger names is pinned, and so is each younger one."""
    try:
        seconds = duration_us(older_than) / 1e6
    except SpecError as err:
        raise Usage(f"--older-than: {err}") from err
    if seconds < 3600:
        raise Usage(f"--older-than {older_than}: at least 1h, so that no reader or writer at work loses its files")
    told: list[dict[str, Any]] = []
    with _chosen(tables) as (found, pins):
        for at, name in found:
            gone = at.vacuum(name, pins=pins.get(name, set()), older_than_s=seconds, dry_run=dry_run)
            told.append({"lake": at.root, "table": name, "files": len(gone.files), "size": gone.size})

    words = ["files to remove" if dry_run else "files removed", "bytes"]
    emit(told, as_json, lambda: _tables(told, words, lambda f: [f["files"], _bytes(f["size"])]))


@contextmanager
def _chosen(tables: list[str] | None) -> Iterator[tuple[list[tuple[Lake, str]], dict[str, set[int]]]]:
    """The tables with their lakes, and the versions that are pinned of each."""
    with open_records() as (home, records):
        from raymill.actors.lakes import Lakes

        found = [(at, t) for at in Lakes(home, records.events).all() for t in at.tables()]
        strange = sorted(set(tables or ()) - {t for _, t in found})
        if strange:
            raise Usage(f"there is no table {strange[0]!r}: there are {sorted({t for _, t in found})}")
        yield [(at, t) for at, t in found if not tables or t in tables], pinned(records.events("training_set.made"))


def pinned(made: Iterable[dict[str, Any]]) -> dict[str, set[int]]:
    """Table → versions that the manifests of training sets name, whichever lake they were read from."""
    found: dict[str, set[int]] = {}
    for event in made:
        for name, version in event["data"]["manifest"]["lake_versions"].items():
            found.setdefault(name, set()).add(version)
    return found


def _tables(told: list[dict[str, Any]], columns: list[str], row: Callable[[dict[str, Any]], list[Any]]) -> None:
    """Print one table a lake."""
    for place in dict.fromkeys(f["lake"] for f in told):
        table(place, ["table", *columns], [[f["table"], *row(f)] for f in told if f["lake"] == place])


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
