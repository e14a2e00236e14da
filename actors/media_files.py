"""Media that the lake holds by URL alone, read where they lie: a file, an object store, the web.

Invariants
- What is given out has the checksum that the lake holds, so a pinned version stands for the same bytes.
- Nothing is fetched but what lies in a folder that the column declares (`Col.urls`): rows come from anybody, and must
  not make this process ask servers or read files of their choice; a redirect is held to the same. No more than
  `max_bytes` is read.
"""

from __future__ import annotations

import http.client
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from raymill.actors.files import look
from raymill.actors.media import MEDIA, lies_in
from raymill.actors.row_text import checksum
from raymill.runtime.errors import ContractError, StoreError
from raymill.runtime.spec import Col

READERS = 16
"""URLs read at once."""
TIMEOUT_S = 30.0
"""Longest wait for a web server: for its next bytes, and for the whole of a value."""
_CHUNK = 1 << 16


def with_bytes(values: pa.Array, name: str, declared: Col) -> pa.Array:
    """The values of a column of media, each with its bytes; nulls stay null.

    Raises:
        StoreError: a URL can not be read, lies in no folder that the column declares, or other bytes lie there now.
    """
    lacking = values.field("bytes").is_null().to_numpy(False) & values.is_valid().to_numpy(False)
    if not lacking.any():
        return values
    rows: list[dict[str, Any] | None] = values.to_pylist()
    wanted = [row for row, is_lacking in zip(rows, lacking, strict=True) if is_lacking and row is not None]
    with ThreadPoolExecutor(READERS) as readers:
        for row, data in zip(wanted, readers.map(lambda row: _read(row, name, declared), wanted), strict=True):
            row["bytes"] = data
    return pa.array(rows, MEDIA)


def _read(row: dict[str, Any], name: str, declared: Col) -> bytes:
    url = row["url"]
    if not lies_in(url, declared.urls):
        raise StoreError(
            f"{url} of column {name!r} lies in none of its `urls` {list(declared.urls)}: declare its folder"
        )
    try:
        if url.startswith(("http://", "https://")):
            data = _read_web(url, declared)
        else:
            with look(url.removeprefix("file://")).open() as opened:
                data = _bounded(opened, declared.max_bytes)
    except (OSError, ContractError, http.client.HTTPException) as err:
        raise StoreError(f"{url} of column {name!r} can not be read: {err}; put it back, or ingest bytes") from err
    if checksum(data) != row["sha256"]:
        raise StoreError(
            f"at {url} of column {name!r} lie other bytes now ({checksum(data)[:12]}… instead of "
            f"{row['sha256'][:12]}…): put the old ones back, or ingest bytes"
        )
    return data


def _read_web(url: str, declared: Col) -> bytes:
    opener = urllib.request.OpenerDirector()  # of http and https alone: the usual one opens file:, ftp: and data: too
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(declared.urls),
    ):
        opener.add_handler(handler)
    with opener.open(url, timeout=TIMEOUT_S) as answer:
        return _bounded(answer, declared.max_bytes)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to where its column's values may lie, and nowhere else."""

    def __init__(self, places: tuple[str, ...]) -> None:
        self._places = places

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith(("http://", "https://")) or not lies_in(newurl, self._places):
            raise OSError(f"the server sends on to {newurl}, which lies in none of the column's `urls`")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _bounded(opened: Any, most: int) -> bytes:
    """All that is there, of which `most` bytes may be; as they come, so that a slow server does not hold us."""
    parts, size, until = [], 0, time.monotonic() + TIMEOUT_S
    while part := opened.read1(min(_CHUNK, most + 1 - size)):
        parts.append(part)
        size += len(part)
        if size > most:
            raise OSError(f"it has more than the column's max_bytes, {most}")
        if time.monotonic() > until:
            raise OSError(f"it did not come within {TIMEOUT_S:g} s")
    return b"".join(parts)
