"""Whether rows fit what their source declares: pure; bad rows get a reason, a batch of another shape is refused.

Reasons: `type:<column>` (the value can not be read as the column's type), `null:<column>`, `range:<column>`,
`one_of:<column>`, `reference:<column>` (no row of the other source has the value), `duplicate_key`, `other_values`
(of a source with corrections: key and `known_at` are those of a row that has other values), and those of `media.py`. A
row gets one: types and media first, then column by column as declared, then references, the key last.
A key or time column is never null, whatever the schema says; NaN is null; an infinity is out of range.
A batch is refused as a whole for its shape, its age (`freshness`) and its nulls (`max_null_share`).

Invariants
- Every row is either accepted or rejected, in the order given; nothing is repaired or guessed.
- The verdict over a row depends on the row, the source, the rows before it and what the lake holds, on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors.keys import first_alike, plain_rows
from raymill.actors.media import MEDIA, as_media, checked, is_media
from raymill.actors.row_text import blobs_of, json_rows
from raymill.runtime.errors import ContractError
from raymill.runtime.expressions import duration_us
from raymill.runtime.spec import Col, Source

ARROW_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", "UTC"),
    "media": MEDIA,
}
"""The Arrow type of each type that a source may declare."""

NULL_SHARE_ROWS = 100
"""Rows from which on a batch's share of nulls says something; smaller batches are not judged by it."""

REJECTED_SCHEMA = pa.schema([("row", pa.string()), ("reason", pa.string())])

IsKnown = Callable[[pa.Table], np.ndarray]
"""n rows, or key columns of them → bool [n]: which the lake holds already."""
HasValues = Callable[[str, pa.Array], np.ndarray]
"""(`<source>.<column>`, values [n]) → bool [n]: which of them stand in that column of the lake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InLake:
    """What the contract asks of the lake."""

    keys: IsKnown | None = None
    """Which keys (`Source.version_key`) were accepted before; absent: none."""
    rows: IsKnown | None = None
    """Which whole rows were accepted before; asked of a source with corrections, about rows whose keys were."""
    values: HasValues | None = None
    """Which referred values exist; absent: references are not checked."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of a batch's rows."""

    accepted: pa.Table
    """The sound rows, in the source's columns and types."""
    rejected: pa.Table
    """The others: `row` (JSON of the row as it came) and `reason`."""
    reasons: np.ndarray
    """Reason [n] of each row of the batch, empty where it was accepted."""
    blobs: dict[str, bytes]
    """Checksum → bytes of the others' media, which their JSON only names."""


def arrow_schema(source: Source) -> pa.Schema:
    """Columns and types of the source's rows in lake and object store (nulls are the contract's matter)."""
    return pa.schema([(name, ARROW_TYPES[c.dtype]) for name, c in source.schema.items()])


def check(
    rows: pa.Table,
    source: Source,
    lake: InLake | None = None,
    *,
    at: int | None = None,
    before: np.ndarray | None = None,
    whole: bool = True,
) -> Checked:
    """Part the rows into those that fit the source and those that do not.

    Args:
        rows: the batch; columns in any order, text is parsed, any width of integer or unit of time is taken.
        source: what they must fit.
        lake: what was accepted before; absent: nothing, and references are not checked.
        at: present event time, µs UTC, against which the source's `freshness` is held; absent: it is not.
        before: reason [n] of rows that were refused already, empty for the others.
        whole: whether the rows are a batch as it came, whose share of nulls is judged.

    Raises:
        ContractError: a column is missing, strange, of a wrong type or null too often, or the newest row is too old.
    """
    _check_shape(rows.schema, source)
    reasons = np.full(rows.num_rows, "", dtype=object) if before is None else before.copy()
    columns = {}
    for name, declared in source.schema.items():
        columns[name], unreadable = _as_type(rows[name].combine_chunks(), ARROW_TYPES[declared.dtype])
        if whole:
            _check_null_share(columns[name], len(unreadable), name, source)
        _mark(reasons, unreadable, f"type:{name}")
        if declared.dtype == "media":
            columns[name], faults = checked(columns[name], name, declared)
            _mark_each(reasons, faults)
    never_null = {*source.key, source.time}
    for name, declared in source.schema.items():
        _check_values(reasons, columns[name], name, declared, name not in never_null and declared.nullable)
    typed = pa.table(columns, schema=arrow_schema(source))
    if lake is not None and lake.values is not None:
        _check_references(reasons, typed, source, lake.values)
    sound = np.flatnonzero(reasons == "")
    reasons[sound] = _repeats(typed.take(sound), source, lake)
    good = reasons == ""
    accepted = typed if good.all() else typed.filter(pa.array(good))
    _check_freshness(accepted, source, at)
    refused = rows.take(np.flatnonzero(~good))
    return Checked(accepted, _rejected(refused, reasons[~good]), reasons, blobs_of(refused))


def event_times(rows: pa.Table, source: Source) -> pa.Array:
    """Event times [n] of unchecked rows, timestamp µs UTC; null where there is none that can be read.

    Raises:
        ContractError: there is no such column, or it can not hold times.
    """
    wanted = ARROW_TYPES["timestamp"]
    if source.time not in rows.column_names or not _readable(rows.schema.field(source.time).type, wanted):
        raise ContractError(f"rows of source {source.name!r} need their event times in a column {source.time!r}")
    return _as_type(rows[source.time].combine_chunks(), wanted)[0]


def _check_shape(schema: pa.Schema, source: Source) -> None:
    wanted = arrow_schema(source)
    missing = [n for n in wanted.names if n not in schema.names]
    strange = [n for n in schema.names if n not in wanted.names]
    twice = sorted({n for n in schema.names if schema.names.count(n) > 1})
    faults = [
        f"{word} {names}" for word, names in (("lacks", missing), ("has strange", strange), ("repeats", twice)) if names
    ]
    if faults:
        raise ContractError(
            f"a batch for source {source.name!r} {' and '.join(faults)}: send exactly the columns {wanted.names}"
        )
    for name in wanted.names:
        given, needed = schema.field(name).type, wanted.field(name).type
        if not _readable(given, needed):
            hint = "; give it a time zone, UTC at best" if pa.types.is_timestamp(given) else ""
            raise ContractError(
                f"column {name!r} of a batch for source {source.name!r} is {given}, which can not be read as "
                f"{needed}{hint}"
            )


def _readable(given: pa.DataType, needed: pa.DataType) -> bool:
    """Whether values of one type may stand for another: text is parsed, numbers widened, times brought to µs UTC."""
    t = pa.types
    if needed.equals(MEDIA):
        return is_media(given)
    if t.is_dictionary(given):
        given = given.value_type
    if given.equals(needed) or t.is_null(given) or _is_text(given):
        return True
    if t.is_integer(needed) or t.is_floating(needed):
        return bool(t.is_integer(given) or t.is_floating(given) or t.is_decimal(given))
    return bool(t.is_timestamp(needed) and t.is_timestamp(given) and given.tz)


def _is_text(given: pa.DataType) -> bool:
    t = pa.types
    return bool(t.is_string(given) or t.is_large_string(given) or t.is_string_view(given))


def _as_type(raw: pa.Array, wanted: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """The column in the wanted type, null where a value can not be read, and where that is."""
    if wanted.equals(MEDIA):
        return as_media(raw), np.empty(0, np.int64)
    if pa.types.is_dictionary(raw.type):
        raw = raw.dictionary_decode()
    if raw.type.equals(wanted):
        return raw, np.empty(0, np.int64)
    if pa.types.is_floating(raw.type) and not pa.types.is_floating(wanted):
        raw = pc.if_else(pc.is_nan(raw), pa.scalar(None, raw.type), raw)  # pandas writes a missing whole number so
    pieces: list[pa.Array] = []
    unreadable: list[int] = []
    _cast(raw, 0, wanted, pieces, unreadable)
    return pa.concat_arrays(pieces) if pieces else pa.array([], wanted), np.array(unreadable, np.int64)


def _cast(raw: pa.Array, start: int, wanted: pa.DataType, pieces: list[pa.Array], unreadable: list[int]) -> None:
    # One unreadable value fails the cast of a whole array, so it is halved until the value stands alone: k bad
    # values of n cost k·log n casts, and none costs one.
    try:
        # A finer unit of time is cut to µs; a number that would lose digits is no number of that type.
        pieces.append(pc.cast(raw, options=pc.CastOptions(wanted, allow_time_truncate=True)))
    except pa.ArrowInvalid:
        if len(raw) == 1:
            pieces.append(pa.nulls(1, wanted))
            unreadable.append(start)
            return
        half = len(raw) // 2
        _cast(raw.slice(0, half), start, wanted, pieces, unreadable)
        _cast(raw.slice(half), start + half, wanted, pieces, unreadable)


def _check_values(reasons: np.ndarray, values: pa.Array, name: str, declared: Col, nullable: bool) -> None:
    missing = pc.is_null(values, nan_is_null=True)
    if not nullable and values.null_count + (declared.dtype == "float64"):
        _mark(reasons, np.flatnonzero(missing.to_numpy(False)), f"null:{name}")
    if declared.dtype in ("int64", "float64"):
        numbers = values.fill_null(0).to_numpy(False)
        wrong = np.isinf(numbers) if declared.dtype == "float64" else np.zeros(len(numbers), np.bool_)
        if declared.ge is not None:
            wrong |= numbers < declared.ge
        if declared.le is not None:
            wrong |= numbers > declared.le
        if wrong.any():
            _mark(reasons, np.flatnonzero(wrong & ~missing.to_numpy(False)), f"range:{name}")
    if declared.one_of is not None:
        strange = pc.invert(pc.is_in(values, value_set=pa.array(declared.one_of, values.type)))
        _mark(reasons, np.flatnonzero(pc.and_(strange, values.is_valid()).to_numpy(False)), f"one_of:{name}")


def _mark(reasons: np.ndarray, where: np.ndarray, reason: str) -> None:
    reasons[where[reasons[where] == ""]] = reason


def _mark_each(reasons: np.ndarray, faults: np.ndarray) -> None:
    free = reasons == ""
    reasons[free] = faults[free]


def _check_null_share(values: pa.Array, unreadable: int, name: str, source: Source) -> None:
    most = source.schema[name].max_null_share
    if most is None or len(values) < NULL_SHARE_ROWS:
        return
    nulls = pc.sum(pc.is_null(values, nan_is_null=True)).as_py() - unreadable
    if nulls > most * len(values):
        raise ContractError(
            f"column {name!r} of a batch for source {source.name!r} is null in {nulls:,} of {len(values):,} rows "
            f"({nulls / len(values):.1%}), and max_null_share is {most:.1%}: nothing of it was taken; mend the feed"
        )


def _check_references(reasons: np.ndarray, typed: pa.Table, source: Source, has: HasValues) -> None:
    for name, declared in source.schema.items():
        if declared.references is None:
            continue
        where = np.flatnonzero((reasons == "") & typed[name].is_valid().to_numpy())
        values = typed[name].take(where).combine_chunks()
        _mark(reasons, where[~has(declared.references, values)], f"reference:{name}")


def _repeats(typed: pa.Table, source: Source, lake: InLake | None) -> np.ndarray:
    """Reason [n] of each row whose key is that of a row before it or in the lake; empty for the others."""
    keys = typed.select(list(source.version_key))
    first = first_alike(keys)
    within = first != np.arange(len(first))
    before = lake.keys(keys) if lake is not None and lake.keys is not None else np.zeros(len(first), np.bool_)
    reasons = np.where(within | before, "duplicate_key", "").astype(object)
    if source.corrected and (within | before).any():
        here, there = np.flatnonzero(within & ~before), np.flatnonzero(before)
        pairs = zip(plain_rows(typed.take(here)), plain_rows(typed.take(first[here])), strict=True)
        reasons[here[[a != b for a, b in pairs]]] = "other_values"
        if lake is not None and lake.rows is not None and len(there):
            reasons[there[~lake.rows(typed.take(there))]] = "other_values"
    return reasons


def _check_freshness(accepted: pa.Table, source: Source, at: int | None) -> None:
    if at is None or source.freshness is None or accepted.num_rows == 0:
        return
    newest = pc.max(accepted[source.time]).cast(pa.int64()).as_py()
    if newest < at - duration_us(source.freshness):
        seen, now = (datetime.fromtimestamp(t / 1e6, UTC).isoformat() for t in (newest, at))
        raise ContractError(
            f"the newest row of a batch for source {source.name!r} is of {seen}, but now is {now} and freshness is "
            f"{source.freshness}: mend the feed, or load old rows as history (without `at`)"
        )


def _rejected(rows: pa.Table, reasons: np.ndarray) -> pa.Table:
    if not rows.num_rows:
        return REJECTED_SCHEMA.empty_table()
    return pa.table([json_rows(rows), reasons.tolist()], schema=REJECTED_SCHEMA)
