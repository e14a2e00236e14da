"""The rows of a batch job's table, read by the endpoint's own codec; a bad row is a reject with the endpoint's reason.

Invariant: every row is either taken or rejected, and what is taken the endpoint would have taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors import oip, wire
from raymill.actors.batch_plan import BatchPlan, is_id
from raymill.actors.rollout import ColumnForm, ModelSpec
from raymill.actors.wire import ARROW_TYPES, Rows
from raymill.runtime.errors import ContractError, RaymillError, RequestError

T = TypeVar("T")
ROW = "__row"
"""Column with each row's number in its part, as long as a part is read."""
ANSWERS = pa.schema([("id", pa.string()), ("version", pa.int64()), ("p", pa.float32())])
"""Columns of the answers of a model with one number a row."""


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that gets no answer."""

    row: int
    """Its number in the part."""
    error: RaymillError
    """What the endpoint would have answered."""


def answers_of(outputs: int) -> pa.Schema:
    """Columns of the answers of a model with so many numbers a row."""
    return ANSWERS.set(2, pa.field("p", wire.type_of(outputs)))


def form_of(plan: BatchPlan) -> ModelSpec:
    """The columns that a row may have: the label's source's, or the model's inputs as numbers."""
    if plan.features:
        return plan.model
    columns = {name: ColumnForm("float64", True) for name in plan.model.inputs}
    return replace(plan.model, columns=columns, required=plan.model.inputs, key=())


def asked_columns(table: pa.Table, plan: BatchPlan, name: str, first_row: int) -> pa.Table:
    """The columns that the codec reads, with an id for every row, the same at every try; others are left away.

    Args:
        table: a part of the table.
        plan: the job.
        name: of the piece; job, name and row make the ids of rows without one.
        first_row: number of its first row.
    """
    form = form_of(plan)
    columns: dict[str, Any] = {name: table.column(name) for name in form.columns if name in table.column_names}
    columns |= _moments(table, plan)
    ids = pa.chunked_array([pa.array([f"{first_row + i}" for i in range(len(table))], pa.string())])
    ids = pc.binary_join_element_wise(plan.job, name, ids, "/")
    if "id" in table.column_names:
        given = table.column("id")
        ids = pc.coalesce(given.cast(pa.string()), ids) if is_id(given.type) else given
    return pa.table(columns | {"id": ids})


def check_columns(schema: pa.Schema, plan: BatchPlan, *, is_text: bool) -> None:
    """Refuse a table none of whose rows can be read, before anything is computed.

    Raises:
        ContractError: a column is missing, or of another type.
        RequestError: a column that is to be kept is not there, or has a name that the answers have.
    """
    form = form_of(plan)
    some = asked_columns(schema.empty_table(), plan, "", 0)
    if is_text:
        some = _parsed(some, form)
    wire.check_schema(some.schema, form)
    kept = kept_columns(schema.names, plan.request.keep)
    wrong = [c for c in kept if c not in schema.names]
    if wrong:
        raise RequestError(f"columns {wrong} are to be kept, and the table lacks them: it has {schema.names}")
    taken = [c for c in kept if c in ANSWERS.names]
    if taken:
        raise RequestError(f"columns {taken} can not be kept: the answers have columns of these names")


def kept_columns(names: list[str], keep: tuple[str, ...]) -> list[str]:
    """The columns that stand beside the answers; of all of them the `id` is the answers' own."""
    return [n for n in names if n != "id"] if keep == ("*",) else list(keep)


def readable(
    table: pa.Table, plan: BatchPlan, *, is_text: bool, twice: Mapping[int, str]
) -> tuple[Rows | None, npt.NDArray[np.int64], list[Reject]]:
    """What the codec takes of a part: the rows, their numbers in the part, and the others with the reason.

    Args:
        table: what `asked_columns` gave.
        plan: the job.
        is_text: whether its columns are text to be parsed.
        twice: rows whose id another row before them has, by number in the part; and that row in words.
    """
    form = form_of(plan)
    with_texts = plan.request.log and plan.features

    def read_rows(some: pa.Table) -> Rows:
        some = some.drop_columns([ROW])
        some = _parsed(some, form) if is_text else some
        return wire.rows_of_table(some, form, plan.now_us, with_texts=with_texts)

    rejects = [
        Reject(row, RequestError(f"{first} has the same 'id': give each its own")) for row, first in twice.items()
    ]
    fresh = table.append_column(ROW, pa.array(np.arange(len(table))))
    if rejects:
        fresh = fresh.filter(pc.invert(pc.is_in(fresh[ROW], value_set=pa.array(list(twice)))))
    whole, bad = parted(fresh, read_rows)
    if bad:
        lost = [some[ROW][0].as_py() for some, _ in bad]
        rejects += [Reject(row, err) for row, (_, err) in zip(lost, bad, strict=True)]
        fresh = fresh.filter(pc.invert(pc.is_in(fresh[ROW], value_set=pa.array(lost))))
        whole = [read_rows(fresh)] if len(fresh) else []
    return (whole[0] if whole else None), fresh[ROW].to_numpy(), rejects


def parted(rows: Any, do: Callable[[Any], T]) -> tuple[list[T], list[tuple[Any, RaymillError]]]:
    """What `do` gives for the rows, and the single rows for which it gives nothing.

    It is done for halves of what fails, until the bad row stands alone: k bad rows of n cost k·log n, none costs one.
    Only what is the caller's fault (4xx) is a row's; another error ends the job.
    """
    if not len(rows):
        return [], []
    try:
        return [do(rows)], []
    except RaymillError as err:
        if err.http_status >= 500:
            raise
        if len(rows) == 1:
            return [], [(rows, err)]
    half = len(rows) // 2
    done, bad = parted(rows[:half], do)
    more_done, more_bad = parted(rows[half:], do)
    return done + more_done, bad + more_bad


def vectors_of(rows: Rows) -> npt.NDArray[np.float32]:
    """The model's inputs, [rows, n]; an infinite one is an infinity here, and its row is refused by `oip.finite`."""
    x = np.empty((len(rows), rows.columns.num_columns), dtype=np.float32)
    with np.errstate(over="ignore"):
        for j, column in enumerate(rows.columns.columns):
            x[:, j] = column.to_numpy(zero_copy_only=False)
    return x


def infinite(x: npt.NDArray[np.float32]) -> dict[int, RaymillError]:
    """The rows that `oip.finite` refuses."""
    found: dict[int, RaymillError] = {}
    for i in np.flatnonzero(np.isinf(x).any(axis=1)).tolist():
        try:
            oip.finite(x[i : i + 1])
        except RequestError as err:
            found[i] = err
    return found


def _moments(table: pa.Table, plan: BatchPlan) -> dict[str, Any]:
    at = plan.request.at
    if at is not None and at in table.column_names:
        return {"at": table.column(at)}
    if at is not None:
        moment = wire.parse_at(at, plan.now_us)
        return {"at": pa.repeat(pa.scalar(moment, pa.int64()), len(table)).cast(wire.TIMESTAMP)}
    return {"at": table.column("at")} if "at" in table.column_names else {}


def _parsed(rows: pa.Table, form: ModelSpec) -> pa.Table:
    found = {}
    for name in rows.column_names:
        wanted = {"at": wire.TIMESTAMP, "id": pa.string()}.get(name) or ARROW_TYPES[form.columns[name].dtype]
        try:
            found[name] = pc.cast(rows[name], wanted)
        except pa.ArrowException as err:
            raise ContractError(f"column {name!r} does not fit {wanted}: {err}") from err
    return pa.table(found)
