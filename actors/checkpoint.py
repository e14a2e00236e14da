"""A training's state as bytes, and the folder that keeps the newest of each training.

The bytes are a safetensors file (length of the header, JSON header, raw arrays; no pickle, so reading one runs
nobody's code), with the crc32 of the arrays in its metadata. It holds whole arrays, not a rank's part of them, so
any number of ranks can go on from it.

Invariant: a file in the folder is complete; a kill at any moment leaves the one before.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from raymill.runtime.errors import StoreError
from raymill.runtime.whole_files import sync_folder

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}
_LENGTH_BYTES = 8

Arrays = dict[str, npt.NDArray[Any]]


def encode(arrays: Mapping[str, npt.NDArray[Any]], facts: dict[str, Any]) -> bytes:
    """Arrays and JSON facts as one safetensors file."""
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    at = 0
    for name, array in arrays.items():
        part = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(part)],
        }
        parts.append(part)
        at += len(part)
    body = b"".join(parts)
    header["__metadata__"] = {"facts": json.dumps(facts), "crc32": str(zlib.crc32(body))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin on a multiple of 8, as the format wants
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + body


def decode(data: bytes) -> tuple[Arrays, dict[str, Any]]:
    """The arrays (read-only views of `data`) and the facts.

    Raises:
        StoreError: the bytes are not a whole checkpoint.
    """
    try:
        header, start = _header(data)
        metadata = header.pop("__metadata__")
        body = memoryview(data)[start:]
        if zlib.crc32(body) != int(metadata["crc32"]):
            raise ValueError("its checksum does not fit")
        arrays = {name: _array(body, entry) for name, entry in header.items()}
        return arrays, json.loads(metadata["facts"])
    except (ValueError, KeyError, TypeError) as err:
        raise StoreError(f"checkpoint can not be read ({err}): delete it, and the training begins anew") from err


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if len(data) < start or not length:
        raise ValueError(f"{len(data)} bytes are too few")
    header = json.loads(data[_LENGTH_BYTES:start])
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return header, start


def _array(body: memoryview, entry: dict[str, Any]) -> npt.NDArray[Any]:
    start, stop = entry["data_offsets"]
    return np.frombuffer(body[start:stop], dtype=np.dtype(_DTYPES[entry["dtype"]])).reshape(entry["shape"])


class CheckpointFolder:
    """The newest checkpoint of each training, one file each; written by one process at a time."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def path(self, training_id: str) -> Path:
        """File of a training, whether or not it exists."""
        return self._folder / f"{quote(training_id, safe='')}.safetensors"

    def write(self, training_id: str, data: bytes) -> None:
        """Put `data` in place of the one before, all at once and for good (flushed to the disk)."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self.path(training_id)
        half = path.with_suffix(".half")
        with half.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
        sync_folder(self._folder)

    def read(self, training_id: str) -> bytes | None:
        """The newest checkpoint of a training; None if it has none."""
        try:
            return self.path(training_id).read_bytes()
        except FileNotFoundError:
            return None

    def forget(self, training_id: str) -> None:
        """Delete a training's checkpoint, if there is one."""
        self.path(training_id).unlink(missing_ok=True)
