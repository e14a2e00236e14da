"""The table of a batch job: cut into pieces when the job is planned, read piece by piece by whoever answers it.

Invariant: a piece gives the same rows in the same order at every reading, or an error that says the table changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from raymill.actors.batch_plan import PART_ROWS, Piece, is_id
from raymill.actors.files import File, files_in, is_folder, look
from raymill.actors.lake_place import Place, in_one_line
from raymill.actors.sources import cut
from raymill.runtime.errors import ContractError, RequestError

PIECE_ROWS = 4 * PART_ROWS
"""Rows of Parquet from which on a file is several pieces."""
_AT_ONCE = 16
"""Files whose ends are read at once."""


def pieces_of(table: str, delta_version: int | None) -> tuple[Piece, ...]:
    """The pieces of a file, of a folder's files by name, or of a Delta table.

    Raises:
        RequestError: there is nothing to read, or a version is named and it is no Delta table.
        ContractError: a file can not be read, or is of another kind.
    """
    with _as_contract_error(table):
        if _is_delta(table):
            found = _of_delta(table, delta_version)
        elif delta_version is not None:
            raise RequestError(f"{table} is no Delta table, so it has no version {delta_version}")
        else:
            found = _of_files(table)
    if not found:
        raise RequestError(
            f"{table} holds no rows to predict: give a .parquet, .csv or .arrow file, or a folder of them"
        )
    return tuple(replace(piece, number=number) for number, piece in enumerate(found))


def schema_of(piece: Piece) -> pa.Schema:
    """The columns of a piece, as `read` gives them.

    Raises:
        ContractError: it can not be read.
    """
    with _as_contract_error(piece.place):
        for batch in _batches(piece):
            return batch.schema
    return pa.schema([])


def read(piece: Piece) -> Iterator[pa.Table]:
    """A piece's rows in tables of `PART_ROWS`, the last of which may be shorter; all columns of CSV are text.

    Raises:
        ContractError: it can not be read, or the file is not what it was when the job was planned.
    """
    with _as_contract_error(piece.place):
        if piece.version is None:
            _check_unchanged(piece)
        yield from cut(_batches(piece), PART_ROWS)


def ids_of(piece: Piece) -> Iterator[pa.Array]:
    """The column `id` of a piece as text, in the order of `read`; null where a row has none; nothing without a column.

    Raises:
        ContractError: as `read`.
    """
    with _as_contract_error(piece.place):
        if piece.version is None:
            _check_unchanged(piece)
        for batch in _batches(piece, "id"):
            ids = batch.column("id")
            if not is_id(ids.type):
                return  # its rows are refused, each
            yield ids.cast(pa.string())


def is_text(piece: Piece) -> bool:
    """Whether all of its columns are text, to be parsed."""
    return File(piece.place, 0, 0).kind == "csv"


def _is_delta(table: str) -> bool:
    if "://" not in table:
        return (Path(table) / "_delta_log").is_dir()
    return bool(DeltaTable.is_deltatable(table, Place(table).options))


def _of_files(table: str) -> list[Piece]:
    files = [f for f in files_in(table) if f.kind] if is_folder(table) else [look(table)]
    wrong = [f.place for f in files if not f.kind]
    if wrong:
        raise RequestError(f"{wrong[0]} is of another kind: only .parquet, .csv, .arrow, .feather, .ipc are read")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [piece for found in pool.map(_of_file, files) for piece in found]


def _of_file(file: File) -> list[Piece]:
    whole = Piece(number=0, place=file.place, size=file.size, mtime_ns=file.mtime_ns)
    if file.kind != "parquet":
        return [whole]
    with file.open() as opened:
        about = pq.ParquetFile(opened).metadata
        sizes = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
    return [replace(whole, groups=groups, row=row) for groups, row in _grouped(sizes)]


def _of_delta(table: str, version: int | None) -> list[Piece]:
    opened = DeltaTable(table, version=version, storage_options=Place(table).options)
    found = []
    for fragment in _fragments(opened):
        whole = Piece(number=0, place=table, version=opened.version(), fragment=fragment.path)
        sizes = [group.num_rows for group in fragment.row_groups]
        found += [replace(whole, groups=groups, row=row) for groups, row in _grouped(sizes)]
    return found


def _grouped(sizes: list[int]) -> list[tuple[tuple[int, int], int]]:
    """((first, end), row) of runs of row groups: `PIECE_ROWS` rows, or one group that has more."""
    found: list[tuple[tuple[int, int], int]] = []
    first = row = rows = 0
    for i, size in enumerate(sizes):
        if rows and rows + size > PIECE_ROWS:
            found.append(((first, i), row))
            first, row, rows = i, row + rows, 0
        rows += size
    return [*found, ((first, len(sizes)), row)] if rows else found


def _fragments(opened: DeltaTable) -> list[Any]:
    return sorted(opened.to_pyarrow_dataset().get_fragments(), key=lambda f: str(f.path))


def _batches(piece: Piece, only: str | None = None) -> Iterator[pa.RecordBatch]:
    """A piece's rows; with `only` that column of them, and nothing where it is not there."""
    if piece.version is not None:
        yield from _delta_batches(piece, only)
        return
    file = File(piece.place, piece.size, piece.mtime_ns)
    with file.open() as opened:
        if file.kind == "parquet":
            yield from _parquet_batches(opened, piece, only)
        elif file.kind == "csv":
            yield from _csv_batches(opened, only)
        else:
            with pa.ipc.open_file(opened) as reader:
                if only is None or only in reader.schema.names:
                    batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
                    yield from (b if only is None else b.select([only]) for b in batches)


def _parquet_batches(opened: Any, piece: Piece, only: str | None) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(opened)
    groups = list(range(*piece.groups)) if piece.groups else None
    if only is None or only in file.schema_arrow.names:
        yield from file.iter_batches(PART_ROWS, row_groups=groups, columns=None if only is None else [only])


def _delta_batches(piece: Piece, only: str | None) -> Iterator[pa.RecordBatch]:
    opened = DeltaTable(piece.place, version=piece.version, storage_options=Place(piece.place).options)
    schema = opened.to_pyarrow_dataset().schema
    [fragment] = [f for f in _fragments(opened) if f.path == piece.fragment]
    if piece.groups is not None:
        fragment = fragment.subset(row_group_ids=list(range(*piece.groups)))
    if only is None or only in schema.names:
        columns = None if only is None else [only]
        yield from fragment.to_batches(schema=schema, columns=columns, batch_size=PART_ROWS)


def _csv_batches(opened: Any, only: str | None) -> Iterator[pa.RecordBatch]:
    """All columns as text, so that one bad value costs its row and not the file; an empty field is null."""
    names = pacsv.open_csv(opened).schema.names
    if only is not None and only not in names:
        return
    opened.seek(0)
    texts = dict.fromkeys(names, pa.string())
    options = pacsv.ConvertOptions(
        column_types=texts,
        null_values=[""],
        strings_can_be_null=True,
        include_columns=None if only is None else [only],
    )
    yield from pacsv.open_csv(opened, convert_options=options)


def _check_unchanged(piece: Piece) -> None:
    now = look(piece.place)
    if (now.size, now.mtime_ns) != (piece.size, piece.mtime_ns):
        raise ContractError(
            f"{piece.place} is not what it was when the job was planned: give the new file's answers another folder"
        )


@contextmanager
def _as_contract_error(table: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, DeltaError) as err:
        raise ContractError(
            f"{table} can not be read: {in_one_line(err)}; is it whole, and are its credentials in the environment?"
        ) from err
