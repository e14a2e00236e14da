"""Copies of stored parts on this host's disk, so that what lies in an object store is read in place too.

Invariants
- A part never changes, and its name is never used again: a copy of the same size is the part. Copies come to be by
  rename, so that a half one is never seen; the whole folder may be deleted at any time.
- The folder stays within its limit but for parts that were asked for in the last hours.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pyarrow.fs import FileSystem

from raymill.runtime.expressions import digest

LIMIT = 32 << 30
"""Bytes of copies that are kept, where the disk has twice as many."""
IN_USE_S = 6 * 3600.0
"""Copies that were asked for since then are not removed: a join may be reading them, and no join takes longer."""
_CHUNK = 16 << 20
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy in the folder."""

    name: str
    """Name of its file."""
    size: int
    """Bytes."""
    used_s: float
    """When it was last asked for, wall time."""


def to_remove(copies: Iterable[Copy], room: int, now_s: float) -> list[str]:
    """Names of the copies to remove, longest unused first, until the rest fit into `room` bytes."""
    found = sorted(copies, key=lambda c: (c.used_s, c.name))
    over = sum(c.size for c in found) - room
    removed = []
    for copy in found:
        if over <= 0 or now_s - copy.used_s < IN_USE_S:
            break
        removed.append(copy.name)
        over -= copy.size
    return removed


class PartCache:
    """The folder of copies; several processes may share it."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self._folder = folder
        self._limit = limit

    def fetch(self, files: FileSystem, uri: str, parts: Sequence[tuple[str, int]]) -> list[Path]:
        """Local paths of the parts, which are copied as far as they are not here yet.

        Args:
            files: the files of the table.
            uri: the table's URL.
            parts: path below it and size in bytes of each.

        Raises:
            OSError: a part can not be read or is not of that size, or the disk is full.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        copies = [self._folder / f"{digest(uri, path, size)}.parquet" for path, size in parts]
        missing = [(c, *p) for c, p in zip(copies, parts, strict=True) if not _touched(c, p[1])]
        if missing:
            self._make_room(sum(size for _, _, size in missing))
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(lambda m: _copy(files, m[1], m[0], m[2]), missing))
        return copies

    def _make_room(self, needed: int) -> None:
        with os.scandir(self._folder) as entries:
            held = [Copy(e.name, e.stat().st_size, e.stat().st_mtime) for e in entries]
        disk = os.statvfs(self._folder)
        limit = min(self._limit, (disk.f_bavail * disk.f_frsize + sum(c.size for c in held)) // 2)
        for name in to_remove(held, limit - needed, time.time()):
            (self._folder / name).unlink(missing_ok=True)


def _touched(copy: Path, size: int) -> bool:
    try:
        os.utime(copy)
        return copy.stat().st_size == size
    except FileNotFoundError:
        return False


def _copy(files: FileSystem, path: str, copy: Path, size: int) -> None:
    half = copy.with_name(f"{copy.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with files.open_input_file(path) as source, open(half, "wb") as target:
            while chunk := source.read(_CHUNK):
                target.write(chunk)
        if half.stat().st_size != size:
            raise OSError(f"{path} has {half.stat().st_size} bytes instead of {size}")
        half.replace(copy)
    finally:
        half.unlink(missing_ok=True)
