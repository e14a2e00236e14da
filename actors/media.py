"""Images, sound and text as values of a column: what they are stored as, and whether they are what they say; pure.

A value has bytes, or a URL where they lie. The lake holds bytes as they came; of a URL it holds the checksum, so that
a pinned version stands for the same bytes for ever. Types are told by their first bytes, never by a name.

Reasons for which a value is refused: `media_type:<column>` (the bytes are of another type than the column or the value
itself declares), `checksum:<column>` (the bytes are not those of the sha256 given, or a URL has none),
`size:<column>` (more bytes than `max_bytes`), `url:<column>` (it lies in none of the folders in `urls`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

from raymill.runtime.column_spec import Col, is_textual

MEDIA = pa.struct(
    [("bytes", pa.large_binary()), ("url", pa.string()), ("media_type", pa.string()), ("sha256", pa.string())]
)
"""How a column of media lies in lake, object store and training table."""

_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_MAGIC: tuple[tuple[str, bytes, int, bytes], ...] = (
    ("image/png", b"\x89PNG\r\n\x1a\n", 0, b""),
    ("image/jpeg", b"\xff\xd8\xff", 0, b""),
    ("image/gif", b"GIF87a", 0, b""),
    ("image/gif", b"GIF89a", 0, b""),
    ("image/webp", b"RIFF", 8, b"WEBP"),
    ("image/tiff", b"II*\x00", 0, b""),
    ("image/tiff", b"MM\x00*", 0, b""),
    ("audio/wav", b"RIFF", 8, b"WAVE"),
    ("audio/flac", b"fLaC", 0, b""),
    ("audio/ogg", b"OggS", 0, b""),
    ("audio/mpeg", b"ID3", 0, b""),
    ("audio/mpeg", b"\xff\xfb", 0, b""),
    ("audio/mpeg", b"\xff\xf3", 0, b""),
    ("audio/mpeg", b"\xff\xf2", 0, b""),
    ("audio/mp4", b"", 4, b"ftypM4A"),
    ("video/mp4", b"", 4, b"ftyp"),
    ("application/pdf", b"%PDF-", 0, b""),
)
"""Type, first bytes, and further bytes at a place."""


def sniffed(data: bytes) -> str | None:
    """Media type of the bytes; `text/plain` for any UTF-8 text that is no other type; None: not told."""
    for kind, head, place, more in _MAGIC:
        if data.startswith(head) and data[place : place + len(more)] == more:
            return kind
    if data[:2] == b"BM" and int.from_bytes(data[2:6], "little") == len(data):
        return "image/bmp"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if b"\x00" in data or not data else "text/plain"


def is_media(given: pa.DataType) -> bool:
    """Whether values of an Arrow type can be read as media: bytes, or a struct of some of `MEDIA`'s fields."""
    t = pa.types
    if t.is_struct(given):
        wanted = {f.name: f.type for f in MEDIA}
        return all(
            f.name in wanted and (t.is_null(f.type) or (_is_bytes(f.type) if f.name == "bytes" else _is_text(f.type)))
            for f in given
        )
    return _is_bytes(given) or bool(t.is_null(given))


def as_media(raw: pa.Array) -> pa.Array:
    """The values as `MEDIA`; null where there are neither bytes nor URL. The type must be one that `is_media` takes."""
    parts = {f.name: pa.nulls(len(raw), f.type) for f in MEDIA}
    if pa.types.is_struct(raw.type):
        parts |= {f.name: raw.field(f.name).cast(MEDIA.field(f.name).type) for f in raw.type}
    elif not pa.types.is_null(raw.type):
        parts["bytes"] = raw.cast(pa.large_binary())
    there = np.asarray(raw.is_valid()) & ~(np.asarray(parts["bytes"].is_null()) & np.asarray(parts["url"].is_null()))
    return pa.StructArray.from_arrays(list(parts.values()), fields=list(MEDIA), mask=pa.array(~there))


def checked(values: pa.Array, name: str, declared: Col) -> tuple[pa.Array, np.ndarray]:
    """The values with type and checksum filled in, and the reason [n] why each is refused, empty where it is not."""
    rows: list[dict[str, Any] | None] = values.to_pylist()
    reasons = np.full(len(rows), "", dtype=object)
    for i, row in enumerate(rows):
        if row is not None:
            fault = _fault_of_url(row, declared) if row["bytes"] is None else _fault_of_bytes(row, declared)
            reasons[i] = f"{fault}:{name}" if fault else ""
    told = (pa.array([row and row[n] for row in rows], pa.string()) for n in ("media_type", "sha256"))
    kept = [values.field("bytes"), values.field("url")]  # the bytes themselves are not copied
    return pa.StructArray.from_arrays([*kept, *told], fields=list(MEDIA), mask=values.is_null()), reasons


def lies_in(url: str, places: Sequence[str]) -> bool:
    """Whether a URL or path names something in one of the folders that are declared, and not by a way round."""
    url = url.removeprefix("file://")
    return ".." not in unquote(url).replace("\\", "/").split("/") and any(
        url.startswith(place) and len(url) > len(place) for place in places
    )


def _fault_of_url(row: dict[str, Any], declared: Col) -> str:
    if not lies_in(row["url"], declared.urls):
        return "url"
    if row["media_type"] not in (declared.media_types or ()):
        return "media_type"
    return "" if row["sha256"] and _SHA256.match(row["sha256"]) else "checksum"


def _fault_of_bytes(row: dict[str, Any], declared: Col) -> str:
    """Why the bytes are refused; type and checksum are filled in."""
    data, types = row["bytes"], declared.media_types or ()
    if len(data) > declared.max_bytes:
        return "size"
    found = sniffed(data)
    told = row["media_type"] or _nearest(found, types)
    if told not in types or not (told == found or (found == "text/plain" and is_textual(told))):
        return "media_type"
    checksum = hashlib.sha256(data).hexdigest()
    if row["sha256"] not in (None, checksum):
        return "checksum"
    row["media_type"], row["sha256"] = told, checksum
    return ""


def _nearest(found: str | None, types: tuple[str, ...]) -> str | None:
    """The column's type that bytes without a type of their own have: of text there are several."""
    if found == "text/plain" and found not in types:
        return next(filter(is_textual, types), found)
    return found


def _is_bytes(given: pa.DataType) -> bool:
    t = pa.types
    return bool(t.is_binary(given) or t.is_large_binary(given) or t.is_binary_view(given))


def _is_text(given: pa.DataType) -> bool:
    t = pa.types
    return bool(t.is_string(given) or t.is_large_string(given) or t.is_string_view(given))
