"""Rows as JSON text and back: how quarantine keeps a row as it came, and how a mended one comes in again.

Bytes of media are not in the text: there stands `{"blob": checksum, "size": bytes}` in their place, and quarantine
keeps them apart.

Invariant: what the contract said of a row it says again of the row that was read back from its text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors.media import MEDIA, as_media, is_media
from raymill.runtime.spec import Source


def json_rows(rows: pa.Table) -> list[str]:
    """Each row as a JSON object; NaN is null, an infinity is text, moments are cut to µs as the contract does."""
    columns = [_plain_values(c) for c in rows.columns]
    named = (dict(zip(rows.column_names, values, strict=True)) for values in zip(*columns, strict=True))
    return [orjson.dumps(row, default=str, option=orjson.OPT_UTC_Z).decode() for row in named]


def blobs_of(rows: pa.Table) -> dict[str, bytes]:
    """The bytes of the rows' media by their SHA-256."""
    found: dict[str, bytes] = {}
    for column in rows.columns:
        if _holds_media(column.type):
            values = (v["bytes"] for v in as_media(column.combine_chunks()).to_pylist() if v is not None)
            found |= {checksum(v): v for v in values if v is not None}
    return found


def checksums_in(texts: Sequence[str], source: Source) -> list[str]:
    """The SHA-256 of all bytes that these rows' texts name."""
    media = [name for name, declared in source.schema.items() if declared.dtype == "media"]
    values = (orjson.loads(text).get(name) for text in texts for name in media) if media else ()
    return sorted({v["blob"] for v in values if isinstance(v, dict) and isinstance(v.get("blob"), str)})


def rows_of(texts: Sequence[str], source: Source, blobs: Mapping[str, bytes]) -> tuple[pa.Table, np.ndarray]:
    """The rows of such texts, for the contract, and the reason [n] why it need not look, empty where it must.

    All values but media are text for the contract to parse; a column that a row lacks is null. The reason is
    `column:<name>` where a row has a value in a column that the source lacks, `type:<name>` where a value of media is
    no such object.
    """
    rows = [orjson.loads(text) for text in texts]
    reasons = np.full(len(rows), "", dtype=object)
    for i, row in enumerate(rows):
        strange = sorted(c for c, value in row.items() if value is not None and c not in source.schema)
        if strange:
            reasons[i] = f"column:{strange[0]}"
    columns = {}
    for name, declared in source.schema.items():
        values = [row.get(name) for row in rows]
        if declared.dtype == "media":
            for i, value in enumerate(values):
                if value is not None and not _names_media(value, blobs):
                    reasons[i], values[i] = reasons[i] or f"type:{name}", None
            columns[name] = pa.array([_media(v, blobs) for v in values], MEDIA)
        else:
            columns[name] = pa.array([_text(v, declared.dtype) for v in values], pa.string())
    return pa.table(columns), reasons


def checksum(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _plain_values(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        column = pc.cast(column, pa.timestamp("us", column.type.tz), safe=False)
    if _holds_media(column.type):
        return [_named(v) for v in as_media(column.combine_chunks()).to_pylist()]
    values: list[Any] = column.to_pylist()
    if pa.types.is_floating(column.type) and pc.any(pc.is_inf(column)).as_py():
        values = [str(v) if v in (float("inf"), float("-inf")) else v for v in values]
    return values


def _text(value: Any, dtype: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if dtype == "int64" and isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value)


def _holds_media(kind: pa.DataType) -> bool:
    return is_media(kind) and not pa.types.is_null(kind)


def _named(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """A value of media as its text names it."""
    if value is None:
        return None
    told = {name: value[name] for name in ("url", "media_type", "sha256")}
    data = value["bytes"]
    return told if data is None else {"blob": checksum(data), "size": len(data)} | told


def _names_media(value: Any, blobs: Mapping[str, bytes]) -> bool:
    """Whether a value of a row's text is one of media whose bytes, if it has any, are known."""
    if not isinstance(value, dict) or not value.keys() <= {"blob", "size", "url", "media_type", "sha256"}:
        return False
    texts = (value.get(name) for name in ("blob", "url", "media_type", "sha256"))
    return all(v is None or isinstance(v, str) for v in texts) and (value.get("blob") is None or value["blob"] in blobs)


def _media(value: dict[str, Any] | None, blobs: Mapping[str, bytes]) -> dict[str, Any] | None:
    if value is None:
        return None
    data = blobs[value["blob"]] if value.get("blob") else None
    return {"bytes": data} | {name: value.get(name) for name in ("url", "media_type", "sha256")}
