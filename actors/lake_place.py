"""Where a lake lies: a folder, or the URL of an object store; tables and files are reached alike in both.

Invariant: keys and endpoint of an object store come from the environment alone (`AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, …), as delta-rs reads them; nothing here keeps or tells them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler
from pyarrow.fs import FileSelector, FileSystem, FileType, PyFileSystem

from raymill.runtime.errors import StoreError

_TABLE = re.compile(r"^[a-z][a-z0-9_-]{0,62}$")
RETRY_FOR = "30s"
"""How long requests to an object store are made again before the lake counts as unreachable."""

_TERMINAL = re.compile("\x1b\\[[0-9;]*m|↳")
"""What delta-rs puts between the causes of an error, for a terminal."""


class Place:
    """The folder or URL that holds one folder a table."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root).rstrip("/")
        self.is_local = "://" not in self.root
        self.options = None if self.is_local else _options()

    @property
    def remedy(self) -> str:
        """What to do where it can not be reached."""
        return "see `raymill doctor`" if self.is_local else "check the AWS_… variables, the bucket and the network"

    def uri(self, table: str) -> str:
        """Path or URL of a table.

        Raises:
            StoreError: the name can not be a table's.
        """
        if not _TABLE.match(table):
            raise StoreError(f"{table!r} can not name a lake table: lower case letters, digits, - and _ only")
        return f"{self.root}/{table}"

    def open(self, table: str, version: int | None = None) -> DeltaTable:
        """The table at a version, the newest if none is named; errors as delta-rs raises them."""
        return DeltaTable(self.uri(table), version=version, storage_options=self.options)

    def has(self, table: str) -> bool:
        """Whether the table exists: a folder whose maker was killed before the first commit is no table yet."""
        uri = self.uri(table)
        if self.is_local:
            return any(Path(uri, "_delta_log").glob("*.json"))
        return bool(DeltaTable.is_deltatable(uri, self.options))

    def has_version(self, table: str, version: int) -> bool:
        """Whether the table has come to a version; costs a look at one file."""
        commit = f"_delta_log/{version:020d}.json"
        if self.is_local:
            return Path(self.uri(table), commit).exists()
        return bool(self.files(table).get_file_info(commit).type == FileType.File)

    def tables(self) -> list[str]:
        """Names of the tables, sorted."""
        if self.is_local:
            names = [p.name for p in Path(self.root).glob("*") if (p / "_delta_log").is_dir()]
        else:
            found = _files(self.root, self.options).get_file_info(FileSelector("", recursive=False))
            names = [f.base_name for f in found if f.type == FileType.Directory]
        return sorted(n for n in names if _TABLE.match(n) and self.has(n))

    def files(self, table: str) -> FileSystem:
        """The files of a table, by their paths below it."""
        return _files(self.uri(table), self.options)


def _files(uri: str, options: dict[str, str] | None) -> FileSystem:
    return PyFileSystem(DeltaStorageHandler(uri, options))


def _options() -> dict[str, str]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    # An endpoint that says http:// is meant: no second variable has to allow it.
    return {"retry_timeout": RETRY_FOR} | ({"aws_allow_http": "true"} if endpoint.startswith("http://") else {})


@contextmanager
def as_store_error(place: Place, table: str, verb: str) -> Iterator[None]:
    """What goes wrong with a table in the block is a StoreError that says what to do."""
    try:
        yield
    except TableNotFoundError as err:
        raise StoreError(f"there is no lake table {table!r} (or not that version): ingest rows first; {err}") from err
    except (DeltaError, OSError, pa.ArrowException) as err:
        raise StoreError(
            f"could not {verb} lake table {table!r} in {place.root}: {in_one_line(err)}; {place.remedy}"
        ) from err


def in_one_line(err: Exception) -> str:
    """What delta-rs says, without what it draws for a terminal."""
    return " ".join(_TERMINAL.sub(" ", str(err)).split())
