"""Where rows come from: files and functions, read into Arrow batches that are the same at every try.

Invariants
- Reading checks nothing: what a row must be is the contract's matter, and one bad value never costs the file.
- A file that did not change is cut into the same batches under the same ids however often it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from raymill.actors.contract import event_times
from raymill.runtime.errors import ContractError
from raymill.runtime.expressions import digest
from raymill.runtime.spec import Source

FILE_BATCH_ROWS = 131_072
"""Rows of one batch of a large file; part of the batch's id, so that a retry cuts the file at the same places."""


def read_rows(source: Source) -> pa.Table:
    """All rows that the source's `read` gives, unchecked.

    Raises:
        ContractError: the source has no `read`, or it gives no Arrow table.
    """
    if source.read is None:
        raise ContractError(f"source {source.name!r} declares no `read`: its rows are only sent in")
    rows = source.read() if callable(source.read) else pa.concat_tables(read_batches(Path(source.read), source))
    if not isinstance(rows, pa.Table):
        raise ContractError(f"`read` of source {source.name!r} gave {type(rows).__name__}: return an Arrow table")
    return rows


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


def read_batches(path: Path, source: Source) -> Iterator[pa.Table]:
    """A Parquet, CSV or Arrow file in tables of `FILE_BATCH_ROWS` (the last may be shorter), in the file's order.

    Raises:
        ContractError: the file is missing, damaged, or of another kind.
    """
    waiting: list[pa.RecordBatch] = []
    try:
        for batch in _record_batches(path, source):
            waiting.append(batch)
            while sum(b.num_rows for b in waiting) >= FILE_BATCH_ROWS:
                table = pa.Table.from_batches(waiting)
                yield table.slice(0, FILE_BATCH_ROWS)
                waiting = table.slice(FILE_BATCH_ROWS).to_batches()
    except (OSError, pa.ArrowInvalid) as err:
        raise ContractError(f"{path} for source {source.name!r} can not be read: {err}") from err
    if waiting:
        yield pa.Table.from_batches(waiting)


def file_batches(path: Path, source: Source) -> Iterator[tuple[str, pa.Table]]:
    """The file's batches with their ids, which are made from the file's name, size and time of change.

    Raises:
        ContractError: the file is missing, damaged, or of another kind.
    """
    prefix = f"{path.name}-{_fingerprint(path)}"
    yield from ((f"{prefix}-{i}", rows) for i, rows in enumerate(read_batches(path, source)))


def _record_batches(path: Path, source: Source) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        yield from pq.ParquetFile(path).iter_batches(FILE_BATCH_ROWS)
    elif path.suffix == ".csv":
        # All text: the contract parses, so that one bad value costs its row and not the file.
        texts = dict.fromkeys(source.schema, pa.string())
        options = pacsv.ConvertOptions(column_types=texts, null_values=[""], strings_can_be_null=True)
        yield from pacsv.open_csv(path, convert_options=options)
    elif path.suffix in (".arrow", ".feather", ".ipc"):
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        raise ContractError(f"{path} for source {source.name!r}: only .parquet, .csv, .arrow, .feather, .ipc are read")


def _fingerprint(path: Path) -> str:
    try:
        facts = path.stat()
    except OSError as err:
        raise ContractError(f"{path} can not be read: {err}") from err
    return digest(path.name, facts.st_size, facts.st_mtime_ns)
