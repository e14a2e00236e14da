"""Files of rows, on this host or in an object store: what they are called, how large, whether whole.

Keys and endpoint of an object store come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from raymill.runtime.errors import ContractError, StoreError
from raymill.runtime.expressions import digest

_KINDS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
_ENDS = {"parquet": b"PAR1", "arrow": b"ARROW1"}
"""What a whole file of a kind ends in; a writer writes it last."""


@dataclass(frozen=True, slots=True)
class File:
    """A file as it was when it was looked at."""

    place: str
    """Path or URL."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Time of its last change."""

    @property
    def name(self) -> str:
        """Its name without folder."""
        return self.place.rsplit("/", 1)[-1]

    @property
    def id(self) -> str:
        """Name, and a digest of name, size and time of change: a file that was changed is another one."""
        return f"{self.name}-{digest(self.name, self.size, self.mtime_ns)}"

    @property
    def kind(self) -> str:
        """`parquet`, `csv`, `arrow`; empty: none that is read."""
        return _KINDS.get(Path(self.name).suffix, "")

    @contextmanager
    def open(self) -> Iterator[Any]:
        """The opened file, for random access; raises OSError."""
        filesystem, path = _found(self.place)
        with filesystem.open_input_file(path) as opened:
            yield opened

    def is_whole(self) -> bool | None:
        """Whether its writer has come to the end; None: files of this kind do not show it."""
        if "://" in self.place:
            return True  # an object appears when it was written
        if self.kind not in _ENDS:
            return None
        end = _ENDS[self.kind]
        try:
            with self.open() as opened:
                return bool(opened.size() > len(end) and opened.read_at(len(end), opened.size() - len(end)) == end)
        except OSError:
            return False  # it went away, or may not be read: that is told when it is read


def look(place: str | Path) -> File:
    """The file at a path or URL.

    Raises:
        ContractError: there is none, or it is a folder.
    """
    [info] = _infos(str(place), lambda path: [path])
    if info.type != pafs.FileType.File:
        what = "is a folder" if info.type == pafs.FileType.Directory else "can not be read: there is no such file"
        raise ContractError(f"{place} {what}: give the path of a .parquet, .csv or .arrow file")
    return File(str(place), info.size, info.mtime_ns)


def is_folder(place: str | Path) -> bool:
    """Whether a path or URL is a folder."""
    return bool(_infos(str(place), lambda path: [path])[0].type == pafs.FileType.Directory)


def files_in(folder: str, pattern: str = "*") -> list[File]:
    """Files directly in a folder whose names match, by name; those that begin with `.` or `_` never do.

    Raises:
        StoreError: there is no such folder, or it can not be listed.
    """
    infos = _infos(folder, lambda path: pafs.FileSelector(path))
    found = [
        File(f"{folder.rstrip('/')}/{info.base_name}", info.size, info.mtime_ns)
        for info in infos
        if info.type == pafs.FileType.File
        and not info.base_name.startswith((".", "_"))
        and fnmatch.fnmatchcase(info.base_name, pattern)
    ]
    return sorted(found, key=lambda file: file.name)


def _infos(place: str, what: Any) -> list[Any]:
    try:
        filesystem, path = _found(place)
        return list(filesystem.get_file_info(what(path)))
    except (OSError, pa.ArrowException) as err:
        raise StoreError(f"{place} can not be looked at: {err}; does it exist, and may this host read it?") from err


def _found(place: str) -> tuple[Any, str]:
    """Filesystem and path in it."""
    if "://" in place:
        filesystem, path = pafs.FileSystem.from_uri(place)
        return filesystem, path
    return pafs.LocalFileSystem(), str(Path(place).absolute())
