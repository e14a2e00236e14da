"""Rows of a batch job whose id a row before them has, found over the whole table before a row is answered.

Invariants
- Of the rows with one id the first in the table's order is asked, and the others are rejects, whichever worker is
  faster and however often the job is begun again: what is found depends on the plan alone, and is written once.
- Ids are compared themselves; their hashes only say which ones to look at. What is held are hashes of `IN_MEMORY` rows
  (beyond, they are on disk, in shares), and the ids that come twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.batch_input import ids_of
from raymill.actors.batch_output import Output
from raymill.actors.batch_plan import Piece
from raymill.actors.entities import key_hashes

DUPLICATES = "_duplicates.parquet"
"""Name of the file that holds them; it is there, if empty, before the first part is."""
IN_MEMORY = 1 << 23
"""Rows whose hashes are held in memory."""
_SHARES = 128
"""Files of hashes on disk, where there are more rows."""
_ROW_BITS = 40
"""A row's place is its piece's number and its own in the piece, in one number that grows along the table."""
_SCHEMA = pa.schema(
    [("piece", pa.int64()), ("row", pa.int64()), ("first_file", pa.string()), ("first_row", pa.int64())]
)
_HASHED = np.dtype([("hash", np.int64), ("place", np.int64)])

Ints = npt.NDArray[np.int64]
Hashed = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Twice:
    """The rows of one piece whose ids rows before them have, by their numbers in the file."""

    rows: Ints
    first_files: tuple[str, ...]
    first_rows: Ints

    def among(self, first: int, count: int) -> dict[int, str]:
        """Of the rows from `first` on: number from there → which row has the id."""
        begin, end = np.searchsorted(self.rows, [first, first + count]).tolist()
        return {
            int(self.rows[i]) - first: f"row {self.first_rows[i]} of {self.first_files[i]}" for i in range(begin, end)
        }


def note_duplicates(pieces: Iterable[Piece], output: Output) -> int:
    """Find them and write them down, unless that was done; how many there are.

    Raises:
        ContractError: the table can not be read, or is not what it was when the job was planned.
        StoreError: the output can not be used.
    """
    known = output.rows_of(DUPLICATES)
    if known is not None:
        return known
    found = find_duplicates(tuple(pieces))
    output.write_rows(DUPLICATES, found)
    return len(found)


def duplicates_of(piece: Piece, output: Output) -> Twice:
    """What `note_duplicates` wrote of a piece; it has to be there.

    Raises:
        StoreError: the output can not be read.
    """
    found = output.read_rows(DUPLICATES, [("piece", "==", piece.number)])
    return Twice(found["row"].to_numpy(), tuple(found["first_file"].to_pylist()), found["first_row"].to_numpy())


def find_duplicates(pieces: tuple[Piece, ...]) -> pa.Table:
    """The rows whose id a row before them has, in the table's order, each with that row.

    Raises:
        ContractError: as `note_duplicates`.
    """
    with TemporaryDirectory(prefix="raymill-ids-") as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = _Hashes(Path(scratch))
        for hashed in _in_order(pool, pieces):
            hashes.add(hashed)
        places = np.sort(np.concatenate([_suspected(share) for share in hashes.shares()]))
    return _confirmed(pieces, places)


def _in_order(pool: ThreadPoolExecutor, pieces: tuple[Piece, ...]) -> Iterator[Hashed]:
    """The pieces' hashes, of a few pieces at a time."""
    at_once = 2 * (os.cpu_count() or 1)
    for begin in range(0, len(pieces), at_once):
        yield from pool.map(_hashed, pieces[begin : begin + at_once])


def _hashed(piece: Piece) -> Hashed:
    """Hash and place of each row that has an id."""
    found, row = [], 0
    for ids in ids_of(piece):
        part = np.empty(len(ids), _HASHED)
        part["hash"] = key_hashes(pa.table({"id": ids}), ("id",), {"id": "string"})
        part["place"] = (piece.number << _ROW_BITS) + np.arange(row, row + len(ids))
        found.append(part[ids.is_valid().to_numpy(zero_copy_only=False)])
        row += len(ids)
    return np.concatenate(found) if found else np.empty(0, _HASHED)


class _Hashes:
    """Hashes of many rows, in memory or in shares on disk; each share holds all rows that have one hash, in order."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._held: list[Hashed] = []
        self._on_disk = False

    def add(self, hashed: Hashed) -> None:
        self._held.append(hashed)
        if sum(map(len, self._held)) > IN_MEMORY:
            self._spill()

    def shares(self) -> Iterator[Hashed]:
        if not self._on_disk:
            yield np.concatenate([np.empty(0, _HASHED), *self._held])
            return
        self._spill()
        for path in sorted(self._scratch.iterdir()):
            yield np.fromfile(path, _HASHED)

    def _spill(self) -> None:
        held = np.concatenate(self._held) if self._held else np.empty(0, _HASHED)
        share = held["hash"] % _SHARES
        order = np.argsort(share, kind="stable")
        ends = np.searchsorted(share[order], np.arange(_SHARES + 1))
        for i in range(_SHARES):
            with open(self._scratch / f"{i:03d}", "ab") as file:
                held[order[ends[i] : ends[i + 1]]].tofile(file)
        self._held, self._on_disk = [], True


def _suspected(share: Hashed) -> Ints:
    """Places of the rows whose hash another row has."""
    order = np.argsort(share["hash"], kind="stable")
    hashes = share["hash"][order]
    same = np.zeros(len(order) + 1, np.bool_)
    same[1:-1] = hashes[1:] == hashes[:-1]
    places: Ints = share["place"][order[same[1:] | same[:-1]]]
    return places


def _confirmed(pieces: tuple[Piece, ...], places: Ints) -> pa.Table:
    """Of the rows at these places, which ascend, those whose id is that of one before them."""
    if not len(places):
        return _SCHEMA.empty_table()
    of_piece = places >> _ROW_BITS
    row = places & ((1 << _ROW_BITS) - 1)
    ids = pa.chunked_array([_taken(pieces[n], row[of_piece == n]) for n in np.unique(of_piece).tolist()])
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    _, firsts, inverse = np.unique(codes, return_index=True, return_inverse=True)
    first = firsts[inverse]  # of all that have a row's id, the one that comes first
    later = np.flatnonzero(first != np.arange(len(places)))
    first = first[later]
    in_file = row + np.array([p.row for p in pieces])[of_piece]
    names = [pieces[n].fragment or pieces[n].place for n in of_piece[first].tolist()]
    return pa.table([of_piece[later], in_file[later], pa.array(names, pa.string()), in_file[first]], schema=_SCHEMA)


def _taken(piece: Piece, rows: Ints) -> pa.Array:
    """Ids of some rows of a piece."""
    found, begin = [], 0
    for ids in ids_of(piece):
        some = rows[np.searchsorted(rows, begin) : np.searchsorted(rows, begin + len(ids))]
        found.append(ids.take(pa.array(some - begin)))
        begin += len(ids)
    return pa.concat_arrays(found)
