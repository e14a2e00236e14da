"""Values that lie in a Parquet file as they lie in memory, found without decoding.

A column chunk that is not compressed, has no dictionary, no nulls and one page is 8-byte numbers in a row behind one
page header. The lake writes numbers so (`PLAIN`): a valid Parquet file for every other reader, and for us a place in a
mapped file. Anything else is left to the reader of all Parquet files.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake import ColumnProperties, WriterProperties
from numba import float64, int64, njit, types, uint8, void

from raymill.actors.evaluate import Floats, Ints

Bytes = npt.NDArray[np.uint8]

PAGE_ROWS = 1 << 20
"""Rows of a row group; each column of it is one page."""

_LOOKED_AT = 512
"""Values of a column by which it is decided how the others are written."""
_WIDTH = 8
_HEADER = 4096
"""Bytes in which a page's header ends."""
_PHYSICAL = ("INT64", "DOUBLE")
_BYTES = types.Array(uint8, 1, "C", readonly=True)
_INTS = types.Array(int64, 1, "C", readonly=True)


def is_plain(kind: pa.DataType) -> bool:
    """Whether values of a type lie in a file as in memory: int64, float64, microseconds."""
    return kind in (pa.int64(), pa.float64()) or (pa.types.is_timestamp(kind) and kind.unit == "us")


def repeating(rows: pa.Table) -> list[str]:
    """Columns whose values seem to come again and again: in others a search for it takes longer than writing them."""
    return [field.name for field in rows.schema if _repeats(rows, field)]


def _repeats(rows: pa.Table, column: pa.Field) -> bool:
    if is_plain(column.type) or pa.types.is_floating(column.type) or pa.types.is_nested(column.type):
        return False
    few = rows[column.name].slice(0, _LOOKED_AT)
    return 2 * len(few.unique()) <= len(few)


def writer_properties(rows: pa.Table) -> WriterProperties:
    """How the lake writes these rows: columns that repeat themselves with a dictionary, all others plain."""
    return WriterProperties(
        compression="UNCOMPRESSED",
        data_page_size_limit=PAGE_ROWS * _WIDTH * 2,
        data_page_row_count_limit=PAGE_ROWS,
        max_row_group_size=PAGE_ROWS,
        default_column_properties=ColumnProperties(dictionary_enabled=False),
        column_properties={name: ColumnProperties(dictionary_enabled=True) for name in repeating(rows)} or None,
    )


def mapped(path: str) -> Bytes:
    """The bytes of a file; they stay readable as long as the array lives, even if the file is removed."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return np.empty(0, dtype=np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def plain_offset(chunk: Any, path: str) -> int | None:
    """Where the values of a column chunk begin in the file at `path`, None where they must be decoded.

    Args:
        chunk: pyarrow's metadata of the column chunk.
        path: the file; only a page's header is read.
    """
    known = chunk.statistics is not None and chunk.statistics.has_null_count and chunk.statistics.null_count == 0
    if not known or chunk.compression != "UNCOMPRESSED" or chunk.physical_type not in _PHYSICAL:
        return None
    if chunk.dictionary_page_offset is not None or chunk.num_values == 0:
        return None
    end = chunk.data_page_offset + chunk.total_compressed_size
    with open(path, "rb", buffering=0) as file:
        file.seek(chunk.data_page_offset)
        header, at = _Thrift(file.read(min(_HEADER, chunk.total_compressed_size))).read()
    page = header.get(5)  # a data page of the first version, the one that delta-rs and Arrow write
    if header.get(1) != 0 or not isinstance(page, dict) or page.get(1) != chunk.num_values or page.get(2) != 0:
        return None
    start = end - _WIDTH * chunk.num_values
    size = header.get(3)
    if size is None or chunk.data_page_offset + at + size != end or start < chunk.data_page_offset + at:
        return None
    return start


class _Thrift:
    """A struct in Thrift's compact protocol, as far as page headers go."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def read(self) -> tuple[dict[int, Any], int]:
        """Field number → value, and how many bytes it took."""
        return self._struct(), self._at

    def _struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = self._value(head & 15)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            self._at += 8
            return None
        if kind == 8:
            length = self._varint()
            self._at += length
            return None
        if kind == 12:
            return self._struct()
        raise ValueError(f"a page header with a field of Thrift type {kind}")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


@njit(void(_BYTES, int64, _INTS, int64, float64[::1]), cache=True, nogil=True)
def take_plain(data: Bytes, start: int, chosen: Ints, first: int, out: Floats) -> None:
    """`out[i]` = the double (or the bits of the integer) number `chosen[i] − first` of the values at byte `start`."""
    bits = out.view(np.uint64)
    for i in range(len(chosen)):
        at = start + 8 * (chosen[i] - first)
        v = np.uint64(0)
        for k in range(8):  # values in a file lie on no boundary; this becomes one load
            v |= np.uint64(data[at + k]) << np.uint64(8 * k)
        bits[i] = v
