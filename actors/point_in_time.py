"""The point-in-time join: features of every row as they were known at its moment, from Arrow tables, no cluster.

What "known" and "in the window" mean is said in `windows.py`; the kernel and the last step to float32 are those of the
online store, so that both give the same vector bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.evaluate import Floats, Ints, columns_of, evaluate, moments
from raymill.actors.feature_plan import FeaturePlan, SourcePlan, ViewPlan
from raymill.actors.windows import BEFORE_ALL, NEVER, group, hash_bytes, hash_numbers, pack, sweep
from raymill.runtime.errors import ContractError

_DENSE = 1 << 22
"""Products of dictionary sizes above this are made dense again."""


def join(
    rows: pa.Table, plan: FeaturePlan, sources: Mapping[str, pa.Table], *, at: str | Ints
) -> npt.NDArray[np.float32]:
    """Feature vectors of `rows`, each as of its own moment.

    Args:
        rows: label rows with the plan's `request_columns`; every one is kept, in order.
        plan: the features.
        sources: name → rows of each source that the views read, in any order.
        at: the moment of each row: name of a timestamp column, or µs UTC.

    Returns:
        float32 [rows, features], NaN for unknown.

    Raises:
        ContractError: a table, a column or a moment is missing, or has another type than declared.
    """
    moment = moments(rows.column(at), BEFORE_ALL) if isinstance(at, str) else np.ascontiguousarray(at, dtype=np.int64)
    if len(moment) != len(rows):
        raise ContractError(f"{len(moment)} moments for {len(rows)} rows: give one each")
    by_moment = np.argsort(moment, kind="stable")
    histories: dict[str, History] = {}
    leaves: dict[str, Floats] = {}
    for view in plan.event_views:
        name = view.source.name
        if name not in sources:
            raise ContractError(f"view {view.name!r} reads source {name!r}, which is not among {list(sources)}")
        history = histories.setdefault(name, History.of(sources[name], view.source))
        codes, wanted, groups = entity_codes(view, sources[name], rows)
        operands = operands_of(view, sources[name])
        buffer, starts = history.pack(codes, groups, operands)
        order, row_starts = group(wanted, groups, by_moment)
        out = view.empty(len(rows))
        sweep(buffer, starts, order, row_starts, moment, view.leaves, out)
        leaves[view.name] = out
    request = columns_of(rows, plan.request_view_columns, plan.row.dtypes)
    return plan.assemble(request, leaves, len(rows))


@dataclass(frozen=True)
class History:
    """Times of a source's rows, and the two orders in which the kernel reads them."""

    time: Ints
    """Event time, µs."""
    known: Ints
    """Moment from which it is known; NEVER for never."""
    key_hash: Ints
    """Hash of the row's key."""

    @classmethod
    def of(cls, rows: pa.Table, source: SourcePlan) -> History:
        """Times and key hashes of rows."""
        time = moments(_column(rows, source.time), NEVER)
        known = moments(_column(rows, source.known_at), NEVER) if source.known_at else time.copy()
        known[time == NEVER] = NEVER
        return cls(time, known, key_hashes(rows, source.key, source.dtypes))

    def pack(self, codes: Ints, groups: int, operands: Floats) -> tuple[Ints, Ints]:
        """Records of the groups, as `windows.pack` makes them."""
        return pack(codes, groups, self.by_time, self.by_known, self.time, self.known, self.key_hash, operands)

    @cached_property
    def by_time(self) -> Ints:
        """Order by (event time, known-at, key hash)."""
        return np.lexsort((self.key_hash, self.known, self.time))

    @cached_property
    def by_known(self) -> Ints:
        """Order of becoming known."""
        return np.argsort(np.maximum(self.time, self.known), kind="stable")


def operands_of(view: ViewPlan, rows: pa.Table) -> Floats:
    """What a view keeps of each row: float64 [operands, rows]."""
    wanted = dict.fromkeys(c for e in view.operands for c in e.columns())
    columns = columns_of(rows, wanted, view.source.dtypes)
    values = [evaluate(e, columns, len(rows)) for e in view.operands]
    return np.ascontiguousarray(values, dtype=np.float64).reshape(len(values), len(rows))


def entity_codes(view: ViewPlan, *tables: pa.Table) -> tuple[Ints, Ints, int]:
    """Dense codes 0 … n − 1 of the view's entities in two tables, −1 where a key column is null, and n."""
    first, second = tables
    codes = np.zeros(len(first) + len(second), dtype=np.int64)
    unknown = np.zeros(len(codes), dtype=np.bool_)
    groups = 1
    for name in view.entity:
        both = [entity_column(t, name, view.source.dtypes[name]) for t in tables]
        encoded = pa.concat_arrays(both).dictionary_encode()
        unknown |= np.asarray(encoded.is_null())
        part = np.asarray(encoded.indices.fill_null(0)).astype(np.int64)
        size = max(len(encoded.dictionary), 1)
        codes = codes * size + part  # mixed radix over the columns' dictionaries
        groups *= size
        if groups > _DENSE:
            distinct, codes = np.unique(codes, return_inverse=True)
            groups = len(distinct)
    codes[unknown] = -1
    return codes[: len(first)].copy(), codes[len(first) :].copy(), groups


def key_hashes(rows: pa.Table, key: tuple[str, ...], dtypes: Mapping[str, str]) -> Ints:
    """A 64-bit hash of each row's key, the same in every process and for every order of rows."""
    state = np.zeros(len(rows), dtype=np.int64)
    for name in key:
        column = _column(rows, name)
        if dtypes[name] == "string":
            text = column.cast(pa.large_string())
            text = text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text
            values = np.empty(len(rows), dtype=np.int64)
            _, ends, data = text.buffers()
            starts = np.frombuffer(ends, dtype=np.int64)[text.offset : text.offset + len(text) + 1].copy()
            hash_bytes(values, starts, np.frombuffer(bytearray(data or b""), dtype=np.uint8))
        elif dtypes[name] == "float64":
            values = np.array(column.to_numpy(), dtype=np.float64).view(np.int64)
        elif dtypes[name] == "timestamp":
            values = moments(column, NEVER)
        else:
            values = np.array(column.cast(pa.int64()).fill_null(NEVER).to_numpy(), dtype=np.int64)
        hash_numbers(state, values)
    return state


def entity_column(rows: pa.Table, name: str, dtype: str) -> pa.Array:
    """A column of an entity's key as strings or int64 (timestamps as µs).

    Raises:
        ContractError: the column is missing or no such type.
    """
    column = _column(rows, name)
    try:
        if dtype == "string":
            column = column.cast(pa.large_string())
        else:
            column = (column.cast(pa.timestamp("us", "UTC")) if dtype == "timestamp" else column).cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as err:
        raise ContractError(f"entity column {name!r} is {column.type}, which is no {dtype}: {err}") from err
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _column(rows: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in rows.column_names:
        raise ContractError(f"column {name!r} is missing: the rows have {', '.join(rows.column_names)}")
    return rows.column(name)
