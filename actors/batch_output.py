"""What a batch job writes: parts of answers and of rejects, the plan before them and the manifest after them.

    OUT/part-000000-0000.parquet …       answers, in the order of the table
    OUT/_rejects/part-….parquet          rows without an answer, with the reason; of parts that have any
    OUT/_pieces/000000.json              pieces of the table that are done
    OUT/_duplicates.parquet              rows whose id a row before them has
    OUT/_plan.json  OUT/_manifest.json   what the job does; what it did, written when all of it is there

Invariants
- A file is there whole or not at all: in a folder it gets its name when its bytes are on disk, in an object store it
  appears when its upload ends.
- A part's rejects are written before its answers, so a part that is there is done.
- What a killed process was writing has a name of its own, which counts for nothing and is taken away by the next try.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raymill.runtime.errors import StoreError

T = TypeVar("T")
PLAN, MANIFEST, REJECTS, PIECES = "_plan.json", "_manifest.json", "_rejects", "_pieces"
_AT_ONCE = 16
"""Texts that are read at once."""


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

    def texts(self, folder: str) -> list[str]:
        """All texts that were written into a folder, in the order of their names.

        Raises:
            StoreError: the place can not be read.
        """
        with _as_store_error(self.place, "look at"):
            filesystem, root = self._opened()
            infos = filesystem.get_file_info(pafs.FileSelector(f"{root}/{folder}", allow_not_found=True))
            names = sorted(i.base_name for i in infos if not i.base_name.startswith("."))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return [text for text in pool.map(lambda name: self.read(f"{folder}/{name}"), names) if text is not None]

    def create(self, name: str, text: str) -> bool:
        """Write a text, unless it is there: of several processes one succeeds (in an object store the last one does).

        Raises:
            StoreError: the place can not be written.
        """
        if self._local is None:
            self.write(name, text)
            return True
        with _as_store_error(self.place, "write to"):
            return _write_file(self._local / name, text.encode(), place=os.link)

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

    def read_rows(self, name: str, filters: Any) -> pa.Table:
        """The rows of a part that has to be there which pass Parquet's `filters`.

        Raises:
            StoreError: it is not there, or the place can not be read.
        """
        found = self._read(name, lambda opened: pq.read_table(opened, filters=filters))
        if found is None:
            raise StoreError(f"{self.place}/{name} is not there any more: give the job another folder")
        return found

    def write_rows(self, name: str, rows: pa.Table) -> None:
        """Write a part.

        Raises:
            StoreError: the place can not be written.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd")
        self._write(name, sink.getvalue())

    def is_free(self) -> bool:
        """Whether nothing is there yet; what was begun by somebody who did not come to write the plan is nothing.

        Raises:
            StoreError: the place can not be read.
        """
        with _as_store_error(self.place, "look at"):
            filesystem, root = self._opened()
            found = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
            return not [i for i in found if not i.base_name.startswith(f".{PLAN}.")]

    def sweep(self) -> None:
        """Take away what processes that are gone had begun to write."""
        if self._local is None:
            return
        for folder in (self._local, self._local / REJECTS, self._local / PIECES):
            for path in folder.glob(".*.*"):
                if (pid := path.suffix[1:]).isdigit() and not psutil.pid_exists(int(pid)):
                    path.unlink(missing_ok=True)

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


def _write_file(path: Path, data: Any, place: Callable[[Path, Path], None] = os.replace) -> bool:
    """Bring the file about whole; whether it was placed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(begun, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        place(begun, path)
        return True
    except FileExistsError:
        return False
    finally:
        begun.unlink(missing_ok=True)


@contextmanager
def _as_store_error(place: str, verb: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as err:
        raise StoreError(f"could not {verb} {place}: {err}; may this host do that, and is there room?") from err
