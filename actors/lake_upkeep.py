"""Upkeep of a lake's tables: small parts merged in the order of time, files that no kept version needs removed.

Invariants
- A merge is one commit that takes parts away and adds their rows as new ones: readers see the one or the other. It is
  committed on the very version it was made from, or made sure that its parts are still there and tried again.
- Old versions stay readable until their files are vacuumed; a pinned version, or one younger than asked, always.
- kill -9 at any point leaves at most files that no version refers to; the next vacuum takes them.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction
from pyarrow.fs import FileSelector, FileSystem, FileType

from raymill.actors.lake_layout import FEWEST, Part, Version, kept_versions, merges, unneeded
from raymill.actors.lake_place import Place, as_store_error
from raymill.actors.plain_pages import PAGE_ROWS, repeating
from raymill.runtime.errors import StoreError

SORTED_BY = "raymill.sortedBy"
"""Property of a table: the column whose order its merged parts keep."""
MARK = "raymill"
"""Key in a commit's information under which a merge or migration says what it is."""
KEEP_LOG = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
"""No commit cleans up behind itself: a manifest may pin any version, and checkpoints are made when the lake says so."""
GRACE_S = 3600.0
"""Files younger than that are never vacuumed: their commit may be on its way."""
_ATTEMPTS = 20
_TEXT = 64
"""Characters of a text that the log tells."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did."""

    before: int
    """Parts that it took away."""
    after: int
    """Parts that it made of them."""
    version: int
    """Version that it made."""


@dataclass(frozen=True, slots=True)
class Described:
    """A table as it is now."""

    table: str
    """Its name."""
    version: int
    """The newest."""
    rows: int
    """How many."""
    parts: int
    """Files that they lie in."""
    size: int
    """Bytes of those."""
    sorted_by: str | None
    """Column whose order merged parts keep."""


@dataclass(frozen=True, slots=True)
class Vacuumed:
    """What a vacuum removed, or would."""

    files: list[str]
    """Paths below the table."""
    size: int
    """Bytes of them all."""
    kept: list[int]
    """Versions whose files were looked up to be kept; they stand for every kept one."""


def compact(place: Place, table: str, *, fewest: int = FEWEST) -> Merged | None:
    """Merge small parts, as `lake_layout.merges` decides; None: there was nothing to merge, or another merged them.

    Raises:
        StoreError: there is no such table, a part can not be read, or other writers were first 20 times.
    """
    with as_store_error(place, table, "compact"):
        found = place.open(table)
        groups = merges(parts_of(found), fewest=fewest)
        if not groups:
            return None
        files = place.files(table)
        schema = pa.schema(found.schema().to_arrow())
        added = [write_part(files, merged_rows(files, group, schema, sorted_by(found))) for group in groups]
        removed = [part for group in groups for part in group]
        version = commit_parts(place, table, found, removed, added)
        return None if version is None else Merged(before=len(removed), after=len(added), version=version)


def vacuum(
    place: Place,
    table: str,
    *,
    pins: Collection[int],
    older_than_s: float,
    now_s: float | None = None,
    dry_run: bool = False,
) -> Vacuumed:
    """Remove the files that only versions refer to which are neither pinned nor younger than asked.

    Args:
        place: where the lake is.
        table: name of the table.
        pins: versions that manifests name.
        older_than_s: how long ago a version must have ceased to be the newest, in seconds of wall time.
        now_s: the wall time; absent: the clock's.
        dry_run: only tell.

    Raises:
        StoreError: there is no such table, or its files can not be listed or removed.
    """
    now_ms = int((time.time() if now_s is None else now_s) * 1000)
    with as_store_error(place, table, "vacuum"):
        found = place.open(table)
        kept = kept_versions(_versions(found), pins, now_ms - int(older_than_s * 1000))
        needed = {p.path for version in kept for p in parts_of(place.open(table, version))}
        files = place.files(table)
        stored = {f.path: f for f in files.get_file_info(FileSelector("", recursive=False)) if f.type == FileType.File}
        written = {path: f.mtime_ns // 1_000_000 for path, f in stored.items() if path.endswith(".parquet")}
        doomed = unneeded(written, needed, now_ms - int(max(older_than_s, GRACE_S) * 1000))
        for path in [] if dry_run else doomed:
            files.delete_file(path)
    return Vacuumed(files=doomed, size=sum(stored[p].size for p in doomed), kept=kept)


def describe(place: Place, table: str) -> Described:
    """A table in numbers, from its log alone.

    Raises:
        StoreError: there is no such table.
    """
    with as_store_error(place, table, "look at"):
        found = place.open(table)
        parts = parts_of(found)
        rows, size = sum(p.rows for p in parts), sum(p.size for p in parts)
        return Described(table, found.version(), rows, len(parts), size, sorted_by(found))


def is_whole(place: Place, table: str, version: int) -> bool:
    """Whether a version has all its files: none of them was vacuumed."""
    there = {f.path for f in place.files(table).get_file_info(FileSelector("", recursive=False))}
    return {p.path for p in parts_of(place.open(table, version))} <= there


def first_whole(place: Place, table: str, version: int) -> int:
    """The version, or if files of it were vacuumed the first one after it that is whole: it has all rows of it."""
    if is_whole(place, table, version):
        return version
    later = [v for v in _versions(place.open(table)) if v.number > version]
    candidates = kept_versions(later, [v.number for v in later], 0)
    return next((v for v in candidates if is_whole(place, table, v)), version)


def parts_of(found: DeltaTable) -> list[Part]:
    """The parts of a version, from its log alone."""
    actions = pa.table(found.get_add_actions(flatten=True))
    name = f"min.{sorted_by(found)}"
    first = actions.column(name).to_pylist() if name in actions.column_names else [None] * len(actions)
    columns = ("path", "num_records", "size_bytes", "modification_time")
    return [
        Part(path, rows, size, (1, written) if least is None else (0, least))
        for path, rows, size, written, least in zip(
            *(actions.column(c).to_pylist() for c in columns), first, strict=True
        )
    ]


def added_rows(
    found: DeltaTable, known: Collection[str], columns: Sequence[str] | None, where: list[tuple[str, str, Any]] | None
) -> pa.Table:
    """Rows of the table's files but those known, by their paths below the table."""
    added = {part.path for part in parts_of(found)}.difference(known)
    whole = found.to_pyarrow_dataset()
    fragments = [f for f in whole.get_fragments() if f.path in added]
    new = pads.FileSystemDataset(fragments, whole.schema, whole.format, whole.filesystem)
    filters = None if where is None else pq.filters_to_expression(where)
    return new.to_table(columns=None if columns is None else list(columns), filter=filters)


def sorted_by(found: DeltaTable) -> str | None:
    """The column that a table's merged parts are sorted by; None: they keep the order in which they came."""
    by = found.metadata().configuration.get(SORTED_BY)
    return by if by in {f.name for f in found.schema().fields} else None


def merged_rows(files: FileSystem, parts: list[Part], schema: pa.Schema, by: str | None) -> pa.Table:
    """The rows of parts, with the table's columns, in the order of one of them."""
    rows = pa.concat_tables([conformed(read_part(files, part), schema) for part in parts])
    return rows.sort_by(by) if by and not _is_ascending(rows.column(by)) else rows


def _is_ascending(column: pa.ChunkedArray) -> bool:
    """Whether no value is less than the one before it, and none is null: parts of a log mostly are, one by one."""
    if column.null_count or len(column) < 2:
        return not column.null_count
    return bool(pc.all(pc.greater_equal(column.slice(1), column.slice(0, len(column) - 1))).as_py())


def read_part(files: FileSystem, part: Part) -> pa.Table:
    """The rows of a part, as they are stored."""
    # Not by `read_table`: what makes it quick costs more CPU time than the decoding, and replicas answer beside it.
    with pq.ParquetFile(part.path, filesystem=files, pre_buffer=True) as stored:
        return stored.read(use_threads=False)


def conformed(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows with the columns of a schema; one that they lack is null."""
    columns = [
        rows.column(f.name).cast(f.type) if f.name in rows.column_names else pa.nulls(rows.num_rows, f.type)
        for f in schema
    ]
    return pa.table(columns, schema=schema)


def write_part(files: FileSystem, rows: pa.Table) -> AddAction:
    """Write rows as one part, numbers and moments plain as `append` does; what adds it to the table."""
    path = f"part-{uuid.uuid4()}.parquet"
    with files.open_output_stream(path) as sink:
        pq.write_table(
            rows,
            sink,
            compression="none",
            use_dictionary=repeating(rows),
            row_group_size=PAGE_ROWS,
            data_page_size=PAGE_ROWS * 16,
            max_rows_per_page=PAGE_ROWS,
            store_schema=False,
        )
    size = files.get_file_info(path).size
    return AddAction(path, size, {}, time.time_ns() // 1_000_000, False, json.dumps(_statistics(rows)))


def commit_parts(
    place: Place, table: str, found: DeltaTable, removed: list[Part], added: list[AddAction]
) -> int | None:
    """Put the added parts for the removed ones, in one commit; the version it made, None: another took them away.

    Raises:
        StoreError: other writers were first 20 times.
    """
    gone = [RemoveAction(p.path, False, time.time_ns() // 1_000_000, p.size, {}) for p in removed]
    properties = CommitProperties(custom_metadata={MARK: "compact"}, max_commit_retries=0)
    for _ in range(_ATTEMPTS):
        if not {p.path for p in removed} <= {p.path for p in parts_of(found)}:
            return None
        try:
            found.create_write_transaction(
                [*added, *gone],
                "append",
                found.schema(),
                commit_properties=properties,
                post_commithook_properties=KEEP_LOG,
            )
        except CommitFailedError:  # an append came between: on the version after it
            found = place.open(table)
        else:
            found.update_incremental()
            return found.version()
    raise StoreError(f"lake table {table!r} was appended to {_ATTEMPTS} times while it was compacted: compact it again")


def _versions(found: DeltaTable) -> list[Version]:
    return [
        Version(
            commit["version"],
            commit["timestamp"],
            removes=commit["operation"] not in ("WRITE", "CREATE TABLE", "ADD COLUMN") or MARK in commit,
        )
        for commit in found.history()
    ]


def _statistics(rows: pa.Table) -> dict[str, Any]:
    """What the log says of a part: how many rows, and of each plain column its extremes and its nulls.

    Every column that has values must have extremes: deltalake passes over a part without them, as if it were nulls.
    """
    told: dict[str, dict[str, Any]] = {"minValues": {}, "maxValues": {}, "nullCount": {}}
    for field in rows.schema:
        if not (pa.types.is_nested(field.type) or pa.types.is_binary(field.type)):
            column = rows.column(field.name)
            told["nullCount"][field.name] = column.null_count
            if (ends := _ends(column)) is not None:
                told["minValues"][field.name], told["maxValues"][field.name] = ends
    return {"numRecords": rows.num_rows, **told}


def _ends(column: pa.ChunkedArray) -> tuple[Any, Any] | None:
    """Bounds of a column's values in the log's form, as deltalake's own writer tells them; None: it has no values."""
    if pa.types.is_floating(column.type):
        column = column.filter(pc.invert(pc.is_nan(column)))
    ends = pc.min_max(column).as_py()
    least, most = ends["min"], ends["max"]
    if least is None:
        return None
    if isinstance(least, str):  # cut, a bound still: the protocol's way to close a cut one is the last code point
        return least[:_TEXT], most if len(most) <= _TEXT else most[:_TEXT] + "\U0010ffff"
    if isinstance(least, float):  # JSON has no infinity
        return max(least, -sys.float_info.max), min(most, sys.float_info.max)
    if isinstance(least, datetime):
        return _iso(least), _iso(most)
    return least, most


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
