"""Rows on their way between actors: Arrow tables, or references to them in Ray's object store.

Without Ray in the process the table itself travels, so that every actor works as a plain class.
"""

from __future__ import annotations

import sys
from typing import Any

import pyarrow as pa

from raymill.runtime.errors import ContractError


def table_of(rows: Any) -> pa.Table:
    """The table that `rows` is, holds or refers to.

    Raises:
        ContractError: it is no Arrow table.
    """
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    ray = sys.modules.get("ray")
    if ray is not None and isinstance(rows, ray.ObjectRef):
        rows = ray.get(rows)
    if not isinstance(rows, pa.Table):
        raise ContractError(f"rows must be an Arrow table, not {type(rows).__name__}")
    return rows


def shared(rows: pa.Table) -> Any:
    """A reference to the rows, each column in one piece, in the object store; without Ray the table itself."""
    ray = sys.modules.get("ray")
    rows = rows.combine_chunks()
    return ray.put(rows) if ray is not None and ray.is_initialized() else rows
