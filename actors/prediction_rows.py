"""Rows of the prediction log: as answered, as frames of the spool, and as an Arrow table for the lake; pure.

A frame is one batch of answers, made in a few µs while callers wait; the table is made when it is shipped. Layout,
little-endian: magic, length of the head, length of the body, CRC-32 of both; the head in JSON; the body, which is
x float32 [rows, width], p float32 [rows], at int64 [rows], version int64 [rows].

Invariant: what `decode` gives is whole frames only; it ends where a frame is torn or damaged.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("model", pa.string()),
        ("version", pa.int64()),
        ("role", pa.string()),
        ("at", pa.timestamp("us", "UTC")),
        ("key", pa.string()),
        ("row", pa.string()),
        ("x", pa.list_(pa.float32())),
        ("p", pa.float32()),
        ("wall_s", pa.float64()),
        ("replica", pa.string()),
    ]
)
_FRAME = struct.Struct("<4sIII")
_MAGIC = b"rmp1"
_ROW_BYTES = 4 + 8 + 8
"""Of p, at and version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Answers of one batch of one model, before they are logged."""

    model: str
    ids: list[str]
    versions: npt.NDArray[np.int64]
    roles: list[str]
    at: npt.NDArray[np.int64]
    keys: list[str | None]
    texts: list[bytes | None]
    x: npt.NDArray[np.float32]
    p: npt.NDArray[np.float32]

    def take(self, places: list[int]) -> Scored:
        """Only the rows at `places`."""
        return Scored(
            model=self.model,
            ids=[self.ids[i] for i in places],
            versions=self.versions[places],
            roles=[self.roles[i] for i in places],
            at=self.at[places],
            keys=[self.keys[i] for i in places],
            texts=[self.texts[i] for i in places],
            x=self.x[places],
            p=self.p[places],
        )


def encode(scored: Scored, replica: str, wall_s: float) -> bytes:
    """A frame of the batch, answered by that replica at that wall time."""
    head: dict[str, Any] = {
        "model": scored.model,
        "replica": replica,
        "wall_s": wall_s,
        "width": scored.x.shape[1],
        "ids": scored.ids,
        "roles": scored.roles,
        "keys": scored.keys,
        "rows": [None if t is None else t.decode() for t in scored.texts],
    }
    for name in ("roles", "keys", "rows"):
        values = head[name]
        if values.count(values[0]) == len(values):
            head[name] = values[0]
    text = orjson.dumps(head)
    body = b"".join(
        (
            np.ascontiguousarray(scored.x, dtype="<f4").tobytes(),
            np.asarray(scored.p, dtype="<f4").tobytes(),
            np.asarray(scored.at, dtype="<i8").tobytes(),
            np.asarray(scored.versions, dtype="<i8").tobytes(),
        )
    )
    return _FRAME.pack(_MAGIC, len(text), len(body), zlib.crc32(body, zlib.crc32(text))) + text + body


def decode(data: bytes) -> pa.Table:
    """The rows of all whole frames, in order."""
    columns: dict[str, list[Any]] = {name: [] for name in ("id", "model", "role", "key", "row", "wall_s", "replica")}
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("x", "p", "at", "version")}
    widths: list[npt.NDArray[np.int32]] = [np.zeros(1, np.int32)]
    for head, body in _frames(data):
        rows, width = len(head["ids"]), head["width"]
        columns["id"] += head["ids"]
        for name, given in (("role", "roles"), ("key", "keys"), ("row", "rows")):
            columns[name] += head[given] if isinstance(head[given], list) else [head[given]] * rows
        for name in ("model", "wall_s", "replica"):
            columns[name] += [head[name]] * rows
        widths.append(np.full(rows, width, np.int32))
        at = 0
        for name, kind, count in (
            ("x", "<f4", rows * width), ("p", "<f4", rows), ("at", "<i8", rows), ("version", "<i8", rows)
        ):  # fmt: skip
            parts[name].append(np.frombuffer(body, kind, count, at))
            at += parts[name][-1].nbytes
    if not columns["id"]:
        return SCHEMA.empty_table()
    whole = {name: np.concatenate(found) for name, found in parts.items()}
    offsets = pa.array(np.cumsum(np.concatenate(widths), dtype=np.int32))
    arrays = {name: pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()}
    arrays |= {
        "x": pa.ListArray.from_arrays(offsets, pa.array(whole["x"], pa.float32())),
        "p": pa.array(whole["p"], pa.float32()),
        "at": pa.array(whole["at"], pa.int64()).view(SCHEMA.field("at").type),
        "version": pa.array(whole["version"], pa.int64()),
    }
    return pa.table([arrays[name] for name in SCHEMA.names], schema=SCHEMA)


def _frames(data: bytes) -> Iterator[tuple[dict[str, Any], memoryview]]:
    """Head and body of each frame, up to the first that is not whole."""
    view, at = memoryview(data), 0
    while at + _FRAME.size <= len(view):
        magic, head_bytes, body_bytes, checksum = _FRAME.unpack_from(view, at)
        begin = at + _FRAME.size
        middle, at = begin + head_bytes, begin + head_bytes + body_bytes
        if magic != _MAGIC or at > len(view) or zlib.crc32(view[begin:at]) != checksum:
            return
        head = orjson.loads(view[begin:middle])
        yield head, view[middle:at]
