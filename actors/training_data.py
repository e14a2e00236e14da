"""A training table's columns as numpy, without a copy where Arrow allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.runtime.errors import ContractError, TrainingError
from raymill.runtime.spec import Train

DECODE_ROWS = 1024
"""Most rows whose media are decoded at once."""

F32 = npt.NDArray[np.float32]


def columns_of(table: Any, train: Train | None = None) -> tuple[F32, F32]:
    """`x` [rows, n] float32 and `y` [rows] float32 of an Arrow table or of the reference to one.

    One chunk gives views of the object store's memory (read-only); several are joined first. Where the training asks
    for media, `x` is [rows, n + k]: what its `decode` makes of them stands behind the features, all of it in memory.

    Raises:
        ContractError: a column is missing, of another type, or holds nulls.
        TrainingError: `decode` fails, or gives something else than float32 [rows, k].
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
    x = flat.reshape(len(x), x.type.list_size)
    if train is not None and train.decode is not None:
        x = np.concatenate([x, _decoded(table, train.media, train.decode)], axis=1)
    return x, y.to_numpy(zero_copy_only=True)


def _decoded(table: pa.Table, names: tuple[str, ...], decode: Callable[[pa.Table], Any]) -> F32:
    """[rows, k] float32, by pieces: `decode` sees at most `DECODE_ROWS` rows at once."""
    lost = [name for name in names if name not in table.column_names]
    if lost:
        raise ContractError(f"training table lacks media columns {lost}: it has {table.column_names}")
    media = table.select(list(names))
    pieces: list[F32] = []
    for start in range(0, max(len(media), 1), DECODE_ROWS):
        piece = media.slice(start, DECODE_ROWS)
        try:
            values = np.asarray(decode(piece))
        except Exception as err:  # the user's own code may raise anything
            raise TrainingError(f"train.decode failed on rows {start} …: {type(err).__name__}: {err}") from err
        if values.dtype != np.float32 or values.ndim != 2 or len(values) != len(piece):
            raise TrainingError(
                f"train.decode gave {values.dtype} {values.shape} for {len(piece)} rows: return float32 [rows, k]"
            )
        pieces.append(values)
    if len({p.shape[1] for p in pieces}) > 1:
        raise TrainingError(f"train.decode gave rows of different widths {sorted({p.shape[1] for p in pieces})}")
    return np.concatenate(pieces)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
