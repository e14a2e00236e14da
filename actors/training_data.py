"""A training table's columns as numpy, without a copy where Arrow allows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.runtime.errors import ContractError

F32 = npt.NDArray[np.float32]


def columns_of(table: Any) -> tuple[F32, F32]:
    """`x` [rows, n] float32 and `y` [rows] float32 of an Arrow table or of the reference to one.

    One chunk gives views of the object store's memory (read-only); several are joined first.

    Raises:
        ContractError: a column is missing, of another type, or holds nulls.
    """
    if not isinstance(table, pa.Table):
        import ray

        table = ray.get(table)
    for name in ("x", "y"):
        if name not in table.column_names:
            raise ContractError(f"training table lacks column {name!r}: it has {table.column_names}")
        if table.column(name).null_count:
            raise ContractError(
                f"training table has nulls in {name!r}: unknown values are NaN, unlabelled rows left out"
            )
    x = _one_chunk(table.column("x"))
    if not pa.types.is_fixed_size_list(x.type) or x.type.value_type != pa.float32():
        raise ContractError(f"training table's x is {x.type}, not fixed_size_list<float32>[n]")
    y = _one_chunk(table.column("y").cast(pa.float32()))
    flat = x.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(x), x.type.list_size), y.to_numpy(zero_copy_only=True)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
