"""Media that the lake holds by URL alone, read where they lie: a file, an object store, the web.

Invariant: what is given out has the checksum that the lake holds, so a pinned version stands for the same bytes.
"""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from raymill.actors.files import look
from raymill.actors.media import MEDIA
from raymill.actors.row_text import checksum
from raymill.runtime.errors import ContractError, StoreError

READERS = 16
"""URLs read at once."""
TIMEOUT_S = 30.0
"""Longest wait for a web server."""


def with_bytes(values: pa.Array, name: str) -> pa.Array:
    """The values of a column of media, each with its bytes; nulls stay null.

    Raises:
        StoreError: a URL can not be read, or other bytes lie there now.
    """
    lacking = values.field("bytes").is_null().to_numpy(False) & values.is_valid().to_numpy(False)
    if not lacking.any():
        return values
    rows: list[dict[str, Any] | None] = values.to_pylist()
    wanted = [row for row, is_lacking in zip(rows, lacking, strict=True) if is_lacking and row is not None]
    with ThreadPoolExecutor(READERS) as readers:
        for row, data in zip(wanted, readers.map(lambda row: _read(row, name), wanted), strict=True):
            row["bytes"] = data
    return pa.array(rows, MEDIA)


def _read(row: dict[str, Any], name: str) -> bytes:
    url = row["url"]
    try:
        data = _read_web(url) if url.startswith(("http://", "https://")) else _read_file(url)
    except (OSError, ContractError) as err:
        raise StoreError(f"{url} of column {name!r} can not be read: {err}; put it back, or ingest bytes") from err
    if checksum(data) != row["sha256"]:
        raise StoreError(
            f"at {url} of column {name!r} lie other bytes now ({checksum(data)[:12]}… instead of "
            f"{row['sha256'][:12]}…): put the old ones back, or ingest bytes"
        )
    return data


def _read_web(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        data: bytes = answer.read()
    return data


def _read_file(url: str) -> bytes:
    with look(url.removeprefix("file://")).open() as opened:
        data: bytes = opened.read()
    return data
