"""Who a row is about: entities of two tables as dense numbers, and hashes of row keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors.code_cache import FROM_ROWS, cached, encoded, keep
from raymill.actors.evaluate import Ints, moments
from raymill.actors.feature_plan import ViewPlan
from raymill.actors.merge import densify
from raymill.actors.parts import Block, Parts, Rows
from raymill.actors.windows import NEVER, hash_bytes, hash_numbers
from raymill.runtime.errors import ContractError

_NO_CODE = np.iinfo(np.uint32).max
_DENSE = 1 << 22
"""Numbers up to this are taken for dense; larger ones are numbered anew."""


@dataclass(frozen=True)
class Numbered:
    """Entities of a view's events and of the rows that ask, as numbers 0 … groups − 1."""

    events: list[Ints | npt.NDArray[np.uint32]]
    """Block by block, the number of each event's entity plus `low`; any other value: of no entity."""
    low: int
    """What is to be taken off."""
    groups: int
    """How many numbers there are."""
    asked: Ints
    """Of each row; −1: of none that an event has."""


def number(view: ViewPlan, events: Rows | Parts, rows: pa.Table) -> Numbered:
    """Number the entities of stored or other events and of the rows that ask.

    Whole numbers that lie plain in the files and are close together are their own codes: they are not even copied.
    """
    blocks = [b for b in events.blocks() if b.rows]
    if (span := _span(view, events)) is not None:
        asked = _integers(entity_column(rows, view.entity[0], view.source.dtypes[view.entity[0]]), NEVER)
        codes = [events.numbers(b, view.entity[0]) for b in blocks]
        return Numbered(list(codes), span[0], span[1] - span[0] + 1, _shifted(asked, *span))
    if isinstance(events, Parts) and blocks and max(b.rows for b in blocks) >= FROM_ROWS:
        return _from_codes(view, events, blocks, rows)
    whole, asked, groups = entity_codes(view, events.table(view.entity), rows)
    return Numbered([whole[b.first : b.first + b.rows] for b in blocks], 0, groups, asked)


def _from_codes(view: ViewPlan, events: Parts, blocks: list[Block], rows: pa.Table) -> Numbered:
    """Number what the parts hold by the codes kept beside them: only distinct entities are looked at."""
    events.check(view.entity)
    found = [_codes_of(view, events, block) for block in blocks]
    entities = pa.concat_tables([e.select(list(view.entity)) for _, e in found], promote_options="permissive")
    numbers, asked, groups = entity_codes(view, entities, rows)
    codes: list[Ints | npt.NDArray[np.uint32]] = []
    first = 0
    for own, distinct in found:
        mine = np.append(numbers[first : first + len(distinct)], _NO_CODE).astype(np.uint32)
        codes.append(mine[own])
        first += len(distinct)
    return Numbered(codes, 0, groups, asked)


def _codes_of(view: ViewPlan, events: Parts, block: Block) -> tuple[npt.NDArray[np.uint32], pa.Table]:
    kept = cached(events, block, view.entity)
    if kept is not None:
        return kept
    table = events.read(block, view.entity)
    codes, _, _ = entity_codes(view, table, table.slice(0, 0))
    made = encoded(codes, table)
    if block.rows >= FROM_ROWS:
        keep(events, block, view.entity, *made)
    return made


def _span(view: ViewPlan, events: Rows | Parts) -> tuple[int, int] | None:
    """Smallest and largest entity, where the files say them and they may be taken for dense."""
    if len(view.entity) > 1 or isinstance(events, Rows) or view.entity[0] not in events.column_names:
        return None
    if view.source.dtypes[view.entity[0]] == "string":  # whatever the files hold is read as such
        return None
    found = [(events.place(b, view.entity[0]), events.extremes(b, view.entity[0])) for b in events.blocks() if b.rows]
    spans = [span for place, span in found if place is not None and span is not None]
    if not spans or len(spans) < len(found):
        return None
    low, high = min(s[0] for s in spans), max(s[1] for s in spans)
    return (low, high) if high - low < max(_DENSE, len(events) // 2) else None


def entity_codes(view: ViewPlan, events: pa.Table, rows: pa.Table) -> tuple[Ints, Ints, int]:
    """Numbers 0 … n − 1 of the view's entities in two tables, and n.

    −1 where a key column is null, and for the second table's entities that the first one does not have (some of
    them: others have numbers that no event has).
    """
    codes, asked = _numbers(events, rows, view.entity[0], view.source.dtypes)
    for name in view.entity[1:]:
        more, more_asked = _numbers(events, rows, name, view.source.dtypes)
        size = int(more.max(initial=0)) + 1
        codes = np.where((codes < 0) | (more < 0), -1, codes * size + more)  # mixed radix over the columns
        asked = np.where((asked < 0) | (more_asked < 0) | (more_asked >= size), -1, asked * size + more_asked)
        if int(codes.max(initial=0)) >= _DENSE:
            densify(codes, asked, -1)
    groups = int(codes.max(initial=-1)) + 1
    if len(asked) and int(asked.max()) >= groups:
        asked = np.where(asked < groups, asked, -1)
    return codes, asked, groups


def _numbers(events: pa.Table, rows: pa.Table, name: str, dtypes: Mapping[str, str]) -> tuple[Ints, Ints]:
    """Numbers ≥ 0 of one column's values, −1 for null and for what only `rows` has."""
    first, second = (entity_column(t, name, dtypes[name]) for t in (events, rows))
    if dtypes[name] == "string":
        encoded = first.dictionary_encode()
        codes = _integers(encoded.indices, -1)
        return codes, _integers(pc.index_in(second, value_set=encoded.dictionary.drop_null()), -1)
    low, high = (pc.min_max(first)[k].as_py() or 0 for k in ("min", "max"))
    codes, asked = _integers(first, NEVER), _integers(second, NEVER)
    if high - low < max(_DENSE, len(first) // 2):
        return _shifted(codes, low, high), _shifted(asked, low, high)
    codes, asked = codes.copy(), asked.copy()
    densify(codes, asked, NEVER)
    codes[codes == NEVER] = -1
    asked[asked == NEVER] = -1
    return codes, asked


def _shifted(values: Ints, low: int, high: int) -> Ints:
    """Distance from `low`, −1 outside; itself where it is all that already."""
    if low == 0 and len(values) and int(values.min()) >= 0 and int(values.max()) <= high:
        return values
    return np.where((values >= low) & (values <= high) & (values != NEVER), values - low, -1)


def _integers(values: pa.Array, null: int) -> Ints:
    if values.null_count:
        values = values.fill_null(null)
    return values.cast(pa.int64()).to_numpy()


def key_hashes(rows: pa.Table, key: tuple[str, ...], dtypes: Mapping[str, str]) -> Ints:
    """A 64-bit hash of each row's key, the same in every process and for every order of rows."""
    state = np.zeros(len(rows), dtype=np.int64)
    for name in key:
        column = column_of(rows, name)
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
            values = np.array(moments(column, NEVER))
        else:
            values = np.array(column.cast(pa.int64()).fill_null(NEVER).to_numpy(), dtype=np.int64)
        hash_numbers(state, values)
    return state


def entity_column(rows: pa.Table, name: str, dtype: str) -> pa.Array:
    """A column of an entity's key as strings or int64 (timestamps as µs).

    Raises:
        ContractError: the column is missing or no such type.
    """
    column = column_of(rows, name)
    try:
        if dtype == "string":
            column = column.cast(pa.large_string())
        else:
            column = (column.cast(pa.timestamp("us", "UTC")) if dtype == "timestamp" else column).cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as err:
        raise ContractError(f"entity column {name!r} is {column.type}, which is no {dtype}: {err}") from err
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def column_of(rows: pa.Table, name: str) -> pa.ChunkedArray:
    """A column.

    Raises:
        ContractError: there is none of that name.
    """
    if name not in rows.column_names:
        raise ContractError(f"column {name!r} is missing: the rows have {', '.join(rows.column_names)}")
    return rows.column(name)
