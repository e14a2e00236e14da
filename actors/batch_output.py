"""What a batch job writes: parts of answers and of rejects, the plan before them and the manifest after them.

    OUT/part-000000-0000.parquet …       answers, in the order of the table
    OUT/_rejects/part-….parquet          rows without an answer, with the reason; of parts that have any
    OUT/_pieces/000000.json              pieces of the table that are done
    OUT/_plan.json  OUT/_manifest.json   what the job does; what it did, written when all of it is there

Invariants
- A file is there whole or not at all: in a folder it gets its name when its bytes are on disk, in an object store it
  appears when its upload ends.
- A part's rejects are written before its answers, so a part that is there is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raymill.runtime.errors import StoreError

T = TypeVar("T")
PLAN, MANIFEST, REJECTS, PIECES = "_plan.json", "_manifest.json", "_rejects", "_pieces"


class Output:
    """The folder or URL of one job."""

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")
        self._local = None if "://" in place else Path(place).absolute()

    def read(self, name: str) -> str | None:
        """A text that was written; None: it is not there.

        Raises:
            StoreError: the place can not be read.
        """
        return self._read(name, lambda opened: bytes(opened.read()).decode())

    def write(self, name: str, text: str) -> None:
        """Write a text.

        Raises:
            StoreError: the place can not be written.
        """
        self._write(name, text.encode())

    def rows_of(self, name: str) -> int | None:
        """Rows of a part of answers or rejects, from its end; None: it is not there.

        Raises:
            StoreError: the place can not be read.
        """
        return self._read(name, lambda opened: int(pq.ParquetFile(opened).metadata.num_rows))

    def write_rows(self, name: str, rows: pa.Table) -> None:
        """Write a part.

        Raises:
            StoreError: the place can not be written.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd")
        self._write(name, sink.getvalue())

    def is_free(self) -> bool:
        """Whether nothing is there yet.

        Raises:
            StoreError: the place can not be read.
        """
        with _as_store_error(self.place, "look at"):
            filesystem, root = self._opened()
            return not filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))

    def _read(self, name: str, read: Callable[[Any], T]) -> T | None:
        with _as_store_error(self.place, "read"):
            filesystem, root = self._opened()
            if filesystem.get_file_info(f"{root}/{name}").type != pafs.FileType.File:
                return None
            with filesystem.open_input_file(f"{root}/{name}") as opened:
                return read(opened)

    def _write(self, name: str, data: Any) -> None:
        with _as_store_error(self.place, "write to"):
            if self._local is not None:
                _write_file(self._local / name, data)
                return
            filesystem, root = self._opened()
            with filesystem.open_output_stream(f"{root}/{name}") as opened:
                opened.write(data)

    def _opened(self) -> tuple[Any, str]:
        if self._local is not None:
            return pafs.LocalFileSystem(), str(self._local)
        filesystem, path = pafs.FileSystem.from_uri(self.place)
        return filesystem, path


def _write_file(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(begun, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        begun.rename(path)
    finally:
        begun.unlink(missing_ok=True)


@contextmanager
def _as_store_error(place: str, verb: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as err:
        raise StoreError(f"could not {verb} {place}: {err}; may this host do that, and is there room?") from err
