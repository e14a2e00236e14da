"""Files that are written whole: a reader finds the old content or the new one, and so it is after a crash."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

PRIVATE = 0o600
"""For what nobody else may read."""


def write_whole(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Put the content in the file's place, on the disk before this returns; the folder is made if it is not there.

    `mode` is what the new file may be by, less the process's umask. Raises OSError; the old file is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with suppress(OSError):
            fresh.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: else one may be the old file's after a crash."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_json(path: Path, document: Any) -> None:
    """As `write_whole`, of a JSON document that nobody else may read."""
    write_whole(path, json.dumps(document, indent=1), mode=PRIVATE)
