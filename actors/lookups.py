"""Columns that a row lacks, looked up as of its moment before views are joined: from an order to its customer.

A lookup is a view of one newest value that is no number of a model but an entity's name, a string or an int64. Newest
means what it means for every view (`windows.py`), offline and online. A null newest value, and an entity never seen,
give null, which matches nothing further on.

Online an event keeps its value in two operands: an integer as its upper bits and its lower 26, a string as the two
halves of a 104-bit hash, by which the store has the text beside the events. Both halves are exact as float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from raymill.actors.entities import entity_column
from raymill.actors.evaluate import Floats
from raymill.actors.feature_plan import ViewPlan
from raymill.actors.offline_events import Asked, Events
from raymill.actors.offline_newest import find_newest
from raymill.actors.offline_windows import sweep_newest

_LOW_BITS = 26
"""Bits of an integer's lower part; the upper one has the others and the sign."""
_HALF_BITS = 52
"""Bits of each half of a string's hash."""
_HASH_BYTES = 13


def looked_up(lookup: ViewPlan, events: Events, asked: Asked) -> pa.Array:
    """The looked-up column of the rows, as of their moments."""
    events.rows.check(lookup.columns)
    numbered = events.numbered(lookup, asked.rows)
    found = find_newest(events, numbered, asked) if numbered.groups else np.full(len(asked.at), -1, dtype=np.int64)
    found = sweep_newest(lookup, events, numbered, asked) if found is None else found
    pieces, rows = [_values(lookup, _nothing(lookup))], [np.empty(0, dtype=np.int64)]
    for number, block in enumerate(events.blocks):
        some = np.flatnonzero((found >= block.first) & (found < block.first + block.rows))
        if lookup.max_age_us is not None:
            time = events.time[number][found[some] - block.first]
            some = some[asked.at[some] - time <= lookup.max_age_us]
        if len(some):
            pieces.append(_values(lookup, events.rows.take(block, [lookup.name], found[some])))
            rows.append(some)
    place = np.full(len(found), -1, dtype=np.int64)
    order = np.concatenate(rows)
    place[order] = np.arange(len(order))
    return pa.concat_arrays(pieces).take(pa.array(place, mask=place < 0))


def _nothing(lookup: ViewPlan) -> pa.Table:
    """The looked-up column without rows."""
    kind = pa.large_string() if lookup.source.dtypes[lookup.name] == "string" else pa.int64()
    return pa.schema([(lookup.name, kind)]).empty_table()


def with_column(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The rows with a column more, or another in place of one of that name."""
    if name in rows.column_names:
        return rows.set_column(rows.column_names.index(name), name, values)
    return rows.append_column(name, values)


def key_parts(lookup: ViewPlan, rows: pa.Table) -> tuple[Floats, dict[bytes, bytes]]:
    """The operands of events, float64 [2, rows], NaN for null; and the text of every string by its hash."""
    values = _values(lookup, rows)
    if pa.types.is_int64(values.type):
        numbers = values.fill_null(0).to_numpy()
        parts = np.stack([numbers >> _LOW_BITS, numbers & ((1 << _LOW_BITS) - 1)]).astype(np.float64)
        parts[:, ~np.asarray(values.is_valid())] = np.nan
        return parts, {}
    encoded = values.dictionary_encode()
    words = [text.encode() for text in encoded.dictionary.to_pylist()]
    hashes = [hashlib.blake2b(w, digest_size=_HASH_BYTES).digest() for w in words]
    halves = [divmod(int.from_bytes(h), 1 << _HALF_BITS) for h in hashes]
    table = np.array([*halves, (np.nan, np.nan)], dtype=np.float64)
    return table[encoded.indices.fill_null(-1).to_numpy()].T, dict(zip(hashes, words, strict=True))


def keys_of(lookup: ViewPlan, leaves: Floats, texts: Callable[[list[bytes]], list[bytes]]) -> pa.Array:
    """The looked-up column from leaves [rows, 2]; `texts` gives the strings of distinct hashes."""
    known = ~np.isnan(leaves[:, 0])
    whole = np.where(known[:, None], leaves, 0.0).astype(np.int64)
    if lookup.source.dtypes[lookup.name] != "string":
        return pa.array((whole[:, 0] << _LOW_BITS) | whole[:, 1], pa.int64(), mask=~known)
    hashes = list(_hashes(whole))
    distinct = list(dict.fromkeys(h for h, k in zip(hashes, known.tolist(), strict=True) if k))
    text = dict(zip(distinct, texts(distinct), strict=True))
    return pa.array(
        [text[h].decode() if k else None for h, k in zip(hashes, known.tolist(), strict=True)], pa.large_string()
    )


def _hashes(halves: Any) -> Iterator[bytes]:
    for high, low in halves.tolist():
        yield ((high << _HALF_BITS) | low).to_bytes(_HASH_BYTES)


def _values(lookup: ViewPlan, rows: pa.Table) -> pa.Array:
    return entity_column(rows, lookup.name, lookup.source.dtypes[lookup.name])
