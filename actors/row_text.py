"""Rows as JSON text and back: how quarantine keeps a row as it came, and how a mended one comes in again.

Invariant: what the contract said of a row it says again of the row that was read back from its text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from raymill.runtime.spec import Source


def json_rows(rows: pa.Table) -> list[str]:
    """Each row as a JSON object; NaN is null, an infinity is text, moments are cut to µs as the contract does."""
    columns = [_plain_values(c) for c in rows.columns]
    named = (dict(zip(rows.column_names, values, strict=True)) for values in zip(*columns, strict=True))
    return [orjson.dumps(row, default=str, option=orjson.OPT_UTC_Z).decode() for row in named]


def rows_of(texts: Sequence[str], source: Source) -> tuple[pa.Table, np.ndarray]:
    """The rows of such texts, for the contract, and why it need not look: `column:<name>` where the source lacks one.

    All values are text for the contract to parse; a column that a row lacks is null. The reasons [n] are empty for
    rows of the source's columns.
    """
    rows = [orjson.loads(text) for text in texts]
    reasons = np.full(len(rows), "", dtype=object)
    for i, row in enumerate(rows):
        strange = sorted(row.keys() - source.schema.keys())
        if strange:
            reasons[i] = f"column:{strange[0]}"
    columns = {
        name: pa.array([_text(row.get(name), declared.dtype) for row in rows], pa.string())
        for name, declared in source.schema.items()
    }
    return pa.table(columns), reasons


def _plain_values(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        column = pc.cast(column, pa.timestamp("us", column.type.tz), safe=False)
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
