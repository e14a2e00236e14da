"""Rows of the prediction log: as answered, as frames of the spool, and as an Arrow table for the lake; pure.

A frame is one batch of answers, made in a few µs while callers wait; the table is made when it is shipped. Layout,
little-endian: magic, length of the head, length of the body, CRC-32 of both; the head in JSON; the body, which is
x float32 [rows, width], p float32 [rows] (of a model with k > 1 numbers a row [rows, k], k the head's `outputs`),
at int64 [rows], version int64 [rows].

Invariant: what `decode` gives is whole frames only; it ends where a frame is torn or damaged.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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
        ("scores", pa.list_(pa.float32())),
    ]
)
"""`p` is the answer of one number, `scores` that of more; the other one of them is null."""
_FRAME = struct.Struct("<4sIII")
_MAGIC = b"rmp1"
_SHARED = {"role": "roles", "key": "keys", "row": "rows"}
"""Column → what a head calls it: a list, or the one value of all rows."""


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
    """[rows], or [rows, k]."""

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
        "rows": _decoded(scored.texts),
    }
    if scored.p.ndim == 2:
        head["outputs"] = scored.p.shape[1]
    for name in _SHARED.values():
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


def _decoded(texts: Sequence[bytes | None]) -> Sequence[str | None]:
    if texts.count(None) == len(texts):  # ready vectors, faster than one by one
        return [None] * len(texts)
    return [None if t is None else t.decode() for t in texts]


def decode(data: bytes) -> pa.Table:
    """The rows of all whole frames, in order."""
    heads: list[dict[str, Any]] = []
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("x", "p", "at", "version")}
    for head, body in _frames(data):
        heads.append(head)
        rows = len(head["ids"])
        at = 0
        for name, kind, count in (
            ("x", "<f4", rows * head["width"]), ("p", "<f4", rows * head.get("outputs", 1)), ("at", "<i8", rows),
            ("version", "<i8", rows),
        ):  # fmt: skip
            parts[name].append(np.frombuffer(body, kind, count, at))
            at += parts[name][-1].nbytes
    if not any(head["ids"] for head in heads):
        return SCHEMA.empty_table()
    counts = np.array([len(head["ids"]) for head in heads])
    whole = {name: np.concatenate(found) for name, found in parts.items()}
    widths = np.repeat([head["width"] for head in heads], counts)
    arrays = {name: _column(name, heads, counts) for name in ("model", "wall_s", "replica")}
    arrays |= {name: _column(name, heads, counts, given) for name, given in _SHARED.items()}
    arrays |= {
        "id": pa.array(list(chain.from_iterable(head["ids"] for head in heads)), pa.string()),
        "x": pa.ListArray.from_arrays(pa.array(_offsets(widths)), pa.array(whole["x"], pa.float32())),
        "at": pa.array(whole["at"], pa.int64()).view(SCHEMA.field("at").type),
        "version": pa.array(whole["version"], pa.int64()),
    }
    arrays |= _answers(whole["p"], np.repeat([head.get("outputs", 1) for head in heads], counts))
    return pa.table([arrays[name] for name in SCHEMA.names], schema=SCHEMA)


def _answers(numbers: npt.NDArray[np.float32], outputs: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
    """`p` and `scores` of rows whose answers lie one after the other, so many numbers each."""
    several = outputs > 1
    if not several.any():
        return {"p": pa.array(numbers, pa.float32()), "scores": pa.nulls(len(outputs), SCHEMA.field("scores").type)}
    first = np.cumsum(outputs) - outputs
    offsets = pa.array(_offsets(np.where(several, outputs, 0)))
    scores = pa.array(numbers[np.repeat(several, outputs)], pa.float32())
    return {
        "p": pa.array(numbers[first], pa.float32(), mask=several),
        "scores": pa.ListArray.from_arrays(offsets, scores, mask=pa.array(~several)),
    }


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Where lists of these lengths begin, and the end."""
    found = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=found[1:])
    return found


def _column(
    name: str, heads: list[dict[str, Any]], counts: npt.NDArray[np.int64], given: str | None = None
) -> pa.Array:
    """A column of which a head has one value for all its rows, or (those that are `given` by a list) one for each."""
    kind, values = SCHEMA.field(name).type, [head[given or name] for head in heads]
    if any(isinstance(v, list) for v in values):
        each = (v if isinstance(v, list) else [v] * n for v, n in zip(values, counts.tolist(), strict=True))
        return pa.array(list(chain.from_iterable(each)), kind)
    return pa.array(values, kind).take(pa.array(np.repeat(np.arange(len(heads)), counts)))


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
