"""Where rows come from: files and functions, read into Arrow batches that are the same at every try.

Invariants
- Reading checks nothing: what a row must be is the contract's matter, and one bad value never costs the file.
- A file that did not change is cut into the same batches under the same ids however and however often it is read; the
  id of its last batch ends in `-end`, so the lake knows whether the whole file is in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from raymill.actors.contract import arrow_schema, event_times
from raymill.actors.files import File, files_in, look
from raymill.runtime.errors import ContractError
from raymill.runtime.spec import DeltaTable, Directory, RedisStream, Source

FILE_BATCH_ROWS = 131_072
"""Rows of one batch of a large file; part of the batch's id, so that a retry cuts the file at the same places."""
MEDIA_BATCH_ROWS = 1024
"""The same where rows carry media: what is held at once is then some hundred megabytes, not many gigabytes."""


def read_rows(source: Source) -> pa.Table:
    """All rows that the source's `read` gives now, unchecked.

    Of a watched folder that is all files, of a Delta table the declared version, else the newest.

    Raises:
        ContractError: the source has no `read`, it is a stream, or it gives no Arrow table.
    """
    read = source.read
    if read is None:
        raise ContractError(f"source {source.name!r} declares no `read`: its rows are only sent in")
    if isinstance(read, RedisStream):
        raise ContractError(f"source {source.name!r} is a stream, which has no end: `raymill feed` follows it")
    if isinstance(read, DeltaTable):
        from raymill.actors.delta_follow import snapshot

        return snapshot(read, source)
    if callable(read):
        rows = read()
    else:
        files = files_in(read.path, read.pattern) if isinstance(read, Directory) else [look(read)]
        rows = _whole([rows for file in files for rows in read_batches(file, source)], source)
    if not isinstance(rows, pa.Table):
        raise ContractError(f"`read` of source {source.name!r} gave {type(rows).__name__}: return an Arrow table")
    return rows


def _whole(tables: list[pa.Table], source: Source) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive") if tables else arrow_schema(source).empty_table()
    except pa.ArrowException as err:
        raise ContractError(
            f"files of source {source.name!r} differ in their columns' types and make no one table: {err}; "
            f"`raymill ingest` takes them file by file"
        ) from err


def between(rows: pa.Table, source: Source, start_at: int | None, end_at: int | None) -> pa.Table:
    """The rows with event time in [start_at, end_at), µs UTC; an absent end is open.

    Rows whose time is null or unreadable go with the slice that has no start, so that each row is in one slice.
    """
    times = event_times(rows, source)
    wanted = times.is_valid() if start_at is not None else pa.array(np.ones(rows.num_rows, np.bool_))
    if start_at is not None:
        wanted = pc.and_(wanted, pc.fill_null(pc.greater_equal(times, pa.scalar(start_at, times.type)), False))
    if end_at is not None:
        wanted = pc.and_(wanted, pc.fill_null(pc.less(times, pa.scalar(end_at, times.type)), start_at is None))
    return rows.filter(wanted).combine_chunks()


def read_batches(file: File, source: Source) -> Iterator[pa.Table]:
    """A Parquet, CSV or Arrow file in tables of `batch_rows` (the last may be shorter), in the file's order.

    Raises:
        ContractError: the file is missing, damaged, or of another kind.
    """
    try:
        yield from cut(_record_batches(file, source), batch_rows(source))
    except (OSError, pa.ArrowInvalid) as err:
        raise ContractError(f"{file.place} for source {source.name!r} can not be read: {err}") from err


def batch_rows(source: Source) -> int:
    """Rows of one batch of a file of the source's rows."""
    return MEDIA_BATCH_ROWS if any(c.dtype == "media" for c in source.schema.values()) else FILE_BATCH_ROWS


def cut(batches: Iterable[pa.RecordBatch], most: int) -> Iterator[pa.Table]:
    """The same rows in tables of `most`; the last may be shorter. Holds about one table at a time."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        while sum(b.num_rows for b in waiting) >= most:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, most)
            waiting = [b for b in table.slice(most).to_batches() if b.num_rows]
    if waiting:
        yield pa.Table.from_batches(waiting)


def named(prefix: str, tables: Iterable[pa.Table], source: Source) -> Iterator[tuple[str, pa.Table]]:
    """Each table with its batch id, `<prefix>-<number>`, of the last one `<prefix>-end`; at least one, if empty."""
    waiting: tuple[str, pa.Table] | None = None
    for i, rows in enumerate(tables):
        if waiting is not None:
            yield waiting
        waiting = (f"{prefix}-{i}", rows)
    yield (end_of(prefix), waiting[1] if waiting else arrow_schema(source).empty_table())


def end_of(prefix: str) -> str:
    """Id of the last batch of what `named` named."""
    return f"{prefix}-end"


def file_batches(path: str | Path, source: Source) -> Iterator[tuple[str, pa.Table]]:
    """The file's batches with their ids, which are made from the file's name, size and time of change.

    Raises:
        ContractError: the file is missing, damaged, or of another kind.
    """
    file = look(path)
    yield from named(file.id, read_batches(file, source), source)


def _record_batches(file: File, source: Source) -> Iterator[pa.RecordBatch]:
    if file.kind == "parquet":
        with file.open() as opened:
            yield from pq.ParquetFile(opened).iter_batches(batch_rows(source))
    elif file.kind == "csv":
        # All text: the contract parses, so that one bad value costs its row and not the file.
        texts = dict.fromkeys(source.schema, pa.string())
        options = pacsv.ConvertOptions(column_types=texts, null_values=[""], strings_can_be_null=True)
        with file.open() as opened:
            yield from pacsv.open_csv(opened, convert_options=options)
    elif file.kind == "arrow":
        with file.open() as opened, pa.ipc.open_file(opened) as reader:
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        raise ContractError(
            f"{file.place} for source {source.name!r}: only .parquet, .csv, .arrow, .feather, .ipc are read"
        )
