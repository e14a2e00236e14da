"""A table's columns follow its source: declared steps are carried out once, anything else is refused.

Invariants
- A table's columns are one of the states of its source's history; they tell which steps are still to be done, and
  these are done in one commit: kill -9 at any point leaves the columns before or the columns after.
- Versions from before keep the columns they had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, get_args

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from raymill.actors.contract import ARROW_TYPES
from raymill.actors.lake_place import Place, as_store_error
from raymill.actors.lake_upkeep import KEEP_LOG, MARK, SORTED_BY, conformed, parts_of, read_part, write_part
from raymill.runtime.errors import ContractError, StoreError
from raymill.runtime.migrations import WIDENS, AddColumn, DropColumn, Migration, RenameColumn, states
from raymill.runtime.spec import DType, Source

_ATTEMPTS = 5


def migrate(place: Place, source: Source) -> int | None:
    """Bring the source's table to its declared columns; the version that it made, None: there was nothing to do.

    Raises:
        ContractError: the table's columns are no state of the declared history, or a value does not fit its new type.
        StoreError: the table can not be read or written, or other writers were first five times.
    """
    with as_store_error(place, source.name, "migrate"):
        if not place.has(source.name):
            return None
        for _ in range(_ATTEMPTS):
            found = place.open(source.name)
            if not (steps := pending(found, source)):
                return None
            try:
                if all(isinstance(s, AddColumn) for s in steps):
                    _add_columns(found, _schema({n: c.dtype for n, c in source.schema.items()}), steps)
                else:
                    _rewrite(place, found, source, steps)
            except CommitFailedError:  # rows came meanwhile: once more, with them
                continue
            version = found.version()
            _sort_by(found, source.time)
            return version
    raise StoreError(
        f"lake table {source.name!r} was written {_ATTEMPTS} times while it was migrated: stop its other writers"
    )


def add_missing(place: Place, table: str, schema: pa.Schema) -> None:
    """Give a table of raymill's own the columns that it lacks of a schema: in one commit, null in the rows from before.

    Raises:
        StoreError: the table can not be written, or other writers were first five times.
    """
    with as_store_error(place, table, "add columns to"):
        for _ in range(_ATTEMPTS):
            found = place.open(table)
            has = _columns(found.schema())
            steps = [AddColumn(name) for name in schema.names if name not in has]
            if not steps:
                return
            with suppress(CommitFailedError):  # rows came meanwhile, or the columns: look again
                _add_columns(found, Schema.from_arrow(schema), steps)
                return
    raise StoreError(f"lake table {table!r} was written {_ATTEMPTS} times while columns were added: stop its writers")


def pending(found: DeltaTable, source: Source) -> Sequence[Migration]:
    """The steps that the table has not taken yet, oldest first.

    Raises:
        ContractError: its columns are no state of the source's history.
    """
    has = _columns(found.schema())
    history = states({name: c.dtype for name, c in source.schema.items()}, source.migrations)
    for taken in reversed(range(len(history))):
        if _columns(_schema(history[taken])) == has:
            return source.migrations[taken:]
    raise ContractError(_told(source, has, history[-1]))


def _add_columns(found: DeltaTable, schema: Schema, steps: Sequence[Migration]) -> None:
    names = {s.name for s in steps if isinstance(s, AddColumn)}
    fields = [f for f in schema.fields if f.name in names]
    found.alter.add_columns(fields, commit_properties=_properties(steps), post_commithook_properties=KEEP_LOG)
    found.update_incremental()


def _rewrite(place: Place, found: DeltaTable, source: Source, steps: Sequence[Migration]) -> None:
    """Write every part anew and put them all in the place of the old ones, with the new columns."""
    files = place.files(source.name)
    now = pa.schema(found.schema().to_arrow())
    after = pa.schema([(name, ARROW_TYPES[c.dtype]) for name, c in source.schema.items()])
    added: list[AddAction | RemoveAction] = []
    for part in parts_of(found):
        rows = conformed(read_part(files, part), now)
        for step in steps:
            rows = _taken(rows, step)
        try:
            added.append(write_part(files, conformed(rows, after)))
        except pa.ArrowInvalid as err:
            raise ContractError(
                f"source {source.name!r}: a value in the lake does not fit its new type ({err}): "
                f"add a column of that type instead of widening this one"
            ) from err
    found.create_write_transaction(
        added,
        "overwrite",
        Schema.from_arrow(after),
        commit_properties=_properties(steps),
        post_commithook_properties=KEEP_LOG,
    )
    found.update_incremental()


def _taken(rows: pa.Table, step: Migration) -> pa.Table:
    """The rows after a step; columns that came and types that widened are brought about by `conformed`."""
    if isinstance(step, RenameColumn):
        return rows.rename_columns([step.new if n == step.old else n for n in rows.column_names])
    return rows.drop_columns([step.name]) if isinstance(step, DropColumn) else rows


def _sort_by(found: DeltaTable, time: str) -> None:
    """Renew the note of the column that parts are sorted by, where a step renamed it."""
    if found.metadata().configuration.get(SORTED_BY) not in (None, time):
        found.alter.set_table_properties(
            {SORTED_BY: time}, raise_if_not_exists=False, post_commithook_properties=KEEP_LOG
        )


def _properties(steps: Sequence[Migration]) -> CommitProperties:
    told = {MARK: "migrate", f"{MARK}.steps": [str(s) for s in steps]}
    # Only on the version that was read: rows that came since would keep the old columns.
    return CommitProperties(custom_metadata=told, max_commit_retries=0)


def _schema(columns: Mapping[str, DType]) -> Schema:
    return Schema.from_arrow(pa.schema([(name, ARROW_TYPES[dtype]) for name, dtype in columns.items()]))


def _columns(schema: Schema) -> dict[str, Any]:
    return {f.name: f.type for f in schema.fields}


def _told(source: Source, has: Mapping[str, Any], wanted: Mapping[str, DType]) -> str:
    """What is different, and the declaration that would make it right."""
    delta = _columns(_schema(wanted))
    kinds = {str(_columns(_schema({"c": dtype}))["c"]): dtype for dtype in get_args(DType)}
    new, gone = [n for n in wanted if n not in has], [n for n in has if n not in wanted]
    steps = []
    for name in new:
        steps.append(f"AddColumn({name!r})")
    for name in gone:
        steps.append(f"DropColumn({name!r}, was={kinds.get(str(has[name]))!r})")
    if len(new) == len(gone) == 1 and has[gone[0]] == delta[new[0]]:
        steps = [f"RenameColumn({gone[0]!r}, {new[0]!r}) (or {' and '.join(reversed(steps))})"]
    for name in [n for n in wanted if n in has and has[n] != delta[n]]:
        was = kinds.get(str(has[name]))
        if was is not None and wanted[name] in WIDENS.get(was, ()):
            steps.append(f"Widen({name!r}, was={was!r})")
        else:
            held = was or f"of a type that no source declares, {has[name]},"
            steps.append(f"(column {name!r} is {held} in the lake and can not become {wanted[name]}: name a new one)")
    return (
        f"source {source.name!r} has other columns than its lake table, and its migrations do not lead there: "
        f"add to the end of `migrations`: {', '.join(steps)}"
    )
