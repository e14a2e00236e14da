"""Bytes ↔ rows, pure: every lane (HTTP JSON, Arrow IPC, batch) reads requests and writes answers through this file.

Invariants: what comes from the network is checked before anything is computed and ends in an error with 4xx, never
in another one; columns are handled whole, never row by row where Arrow can; no pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from raymill.actors.rollout import ColumnForm, ModelSpec
from raymill.runtime.errors import ContractError, RequestError, TooLarge
from raymill.runtime.ids import MAX_ID_LENGTH, new_ids

ARROW_STREAM = "application/vnd.apache.arrow.stream"
MAX_REQUEST_ROWS = 65_536
MAX_BODY_BYTES = 64 << 20
MAX_ANSWER_NUMBERS = 16 << 20
"""Numbers in one answer, 64 MiB as FP32; with up to 256 numbers a row all rows of a request have room."""
TIMESTAMP = pa.timestamp("us", "UTC")
EARLIEST_AT = -2_208_988_800_000_000  # 1900: moments outside 1900–2200 are seconds or nanoseconds by mistake
LATEST_AT = 7_258_118_400_000_000
ARROW_TYPES = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": TIMESTAMP,
}
_JSON_TYPES: dict[str, set[type]] = {
    "string": {str},
    "int64": {int},
    "float64": {int, float},
    "bool": {bool},
    "timestamp": {int, str},
}
_NONE = type(None)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one request, columns typed as the model's source declares."""

    ids: list[str]
    """Prediction ids, the caller's or fresh ones; unique within the request."""
    at: npt.NDArray[np.int64]
    """Moment of each row, µs UTC."""
    columns: pa.Table
    """The required columns, in the model's order."""
    keys: list[str | None]
    """Row key as JSON text: the list of key values, timestamps in µs; null: the row has none."""
    texts: list[bytes]
    """The row as JSON text, in a form that can be sent again."""

    def __len__(self) -> int:
        return len(self.ids)


def read_json(body: bytes, model: ModelSpec, now_us: int) -> Rows:
    """Rows of `{"rows": [{…}], "at": …}`.

    Raises:
        RequestError: the body is not such a document.
        ContractError: a column is missing, strange or of another type.
        TooLarge: more than `MAX_REQUEST_ROWS` rows.
    """
    rows, at = objects_of(body)
    check_count(len(rows), model)
    if set(map(type, rows)) != {dict}:
        raise RequestError("every row of 'rows' must be an object {column: value, …}")
    moments = [row.get("at") for row in rows]
    return rows_of_objects(rows, [at] * len(rows) if set(map(type, moments)) == {_NONE} else moments, model, now_us)


def objects_of(body: bytes) -> tuple[list[Any], Any]:
    """The list `rows` of a body, whatever it holds, and its `at`.

    Raises:
        RequestError: the body is not such a document.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as err:
        raise RequestError(f"the body is not JSON ({err}): send {{'rows': [{{…}}]}}") from err
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise RequestError("the body has no list 'rows': send {'rows': [{column: value, …}], 'at': moment}")
    strange = sorted(document.keys() - {"rows", "at"})
    if strange:
        raise RequestError(f"the body has {strange} beside 'rows' and 'at': put them into the rows, or leave them out")
    return document["rows"], document.get("at")


def rows_of_objects(rows: list[dict[str, Any]], moments: list[Any], model: ModelSpec, now_us: int) -> Rows:
    """Rows of JSON objects, each with its moment (None: now).

    Raises:
        RequestError, ContractError: as `read_json`.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    raw = {name: [row.get(name) for row in rows] for name in names}
    raw.pop("at", None)
    ids = _checked_ids(raw.pop("id", None), len(rows))
    _check_names(raw, model)
    typed = {name: _from_values(name, values, model.columns[name]) for name, values in raw.items()}
    return _rows(ids, _moments(moments, now_us), typed, model, [orjson.dumps(row) for row in rows])


def read_arrow(body: bytes, model: ModelSpec, now_us: int, at: str | None = None) -> Rows:
    """Rows of an Arrow IPC stream; columns `id` and `at` are optional.

    Args:
        body: the stream.
        model: what the rows are for.
        now_us: moment of rows that name none.
        at: moment of all rows without a column `at` (header `x-raymill-at`).

    Raises:
        RequestError: the body is no such stream.
        ContractError: a column is missing, strange or of another type.
        TooLarge: more than `MAX_REQUEST_ROWS` rows.
    """
    return rows_of_table(_read_stream(body, model), model, now_us, at)


def rows_of_table(
    table: pa.Table, model: ModelSpec, now_us: int, at: str | None = None, *, with_texts: bool = True
) -> Rows:
    """The rows of a table, as `read_arrow` reads them; without texts (nor keys) where nobody logs them.

    Raises:
        ContractError: a column is missing, strange or of another type.
        RequestError: an `id` is no name of a prediction, or stands there twice.
    """
    try:
        names = table.column_names
    except UnicodeDecodeError as err:
        raise RequestError(f"a column's name is no UTF-8 ({err}): send names as text") from err
    if len(set(names)) != len(names):
        raise ContractError(f"the table names a column twice: {sorted({n for n in names if names.count(n) > 1})}")
    raw = {name: table.column(name) for name in names}
    ids = _checked_ids(raw.pop("id").to_pylist() if "id" in raw else None, table.num_rows)
    moments = raw.pop("at", None)
    if moments is None:
        at_us = _moments([at] * table.num_rows, now_us)
    else:
        column = _cast("at", moments, ColumnForm("timestamp", True))
        at_us = _in_range(column.cast(pa.int64()).fill_null(now_us).to_numpy())
    _check_names(raw, model)
    typed = {name: _cast(name, column, model.columns[name]) for name, column in raw.items()}
    if not with_texts:
        return _rows(ids, at_us, typed, replace(model, key=()), [b""] * table.num_rows)
    lists = [_plain(column) for column in typed.values()]
    texts = [orjson.dumps(dict(zip(typed, row, strict=True))) for row in zip(*lists, strict=True)]
    return _rows(ids, at_us, typed, model, texts or [b"{}"] * table.num_rows)


def check_schema(schema: pa.Schema, model: ModelSpec) -> None:
    """Refuse columns of which no row can be read.

    Raises:
        ContractError: one is missing, strange or of another type.
    """
    kinds = {field.name: field.type for field in schema}
    _check_names({name: None for name in kinds if name not in ("id", "at")}, model)
    forms = {**model.columns, "id": ColumnForm("string", True), "at": ColumnForm("timestamp", True)}
    for name, kind in kinds.items():
        _check_kin(name, kind, forms[name])


def write_json(model: ModelSpec, ids: Sequence[str], versions: npt.NDArray[np.int64], p: npt.NDArray[Any]) -> bytes:
    """The answer as `{"model", "version", "predictions": [{"id", <label>, "version"}]}`; one `version` if uniform.

    What stands at the label is a number, or a list of k where the model has k > 1 numbers a row.
    """
    label = model.label
    numbers = versions.tolist()
    document: dict[str, Any] = {"model": model.name}
    if numbers and numbers.count(numbers[0]) == len(numbers):
        document["version"] = numbers[0]
    document["predictions"] = [
        {"id": i, label: value, "version": v}
        for i, value, v in zip(ids, p.astype(np.float64).tolist(), numbers, strict=True)
    ]
    return orjson.dumps(document)


def write_arrow(model: ModelSpec, ids: Sequence[str], versions: npt.NDArray[np.int64], p: npt.NDArray[Any]) -> bytes:
    """The answer as an Arrow IPC stream of `id`, `version`, `p` (`column_of`); metadata names model and label."""
    columns = [pa.array(ids, pa.string()), pa.array(versions), column_of(p)]
    batch = pa.record_batch(columns, names=["id", "version", "p"])
    batch = batch.replace_schema_metadata({"model": model.name, "label": model.label})
    return write_stream(pa.Table.from_batches([batch]))


def column_of(p: npt.NDArray[Any]) -> pa.Array:
    """Answers as a column: float32, or lists of k float32 where there are k > 1 numbers a row."""
    if p.ndim == 1:
        return pa.array(p)
    return pa.FixedSizeListArray.from_arrays(pa.array(p.ravel()), p.shape[1])


def type_of(outputs: int) -> pa.DataType:
    """Type of what `column_of` gives for so many numbers a row."""
    return pa.float32() if outputs == 1 else pa.list_(pa.float32(), outputs)


def write_stream(table: pa.Table) -> bytes:
    """A table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(memoryview(sink.getvalue()))


def check_count(count: int, model: ModelSpec) -> None:
    """Refuse a request of no rows, or of too many.

    Raises:
        RequestError: there are none.
        TooLarge: more than `MAX_REQUEST_ROWS`, or than `MAX_ANSWER_NUMBERS` in the answer.
    """
    if count == 0:
        raise RequestError("there are no rows: send at least one")
    if count > MAX_REQUEST_ROWS or count * model.outputs > MAX_ANSWER_NUMBERS:
        most = min(MAX_REQUEST_ROWS, MAX_ANSWER_NUMBERS // model.outputs)
        raise TooLarge(f"{count} rows in one request, {most} may be: split them over several requests")


def parse_at(value: object, now_us: int) -> int:
    """Moment in µs UTC of an ISO-8601 text with zone, an integer of µs, or null (now)."""
    return int(_moments([value], now_us)[0])


def _rows(
    ids: list[str],
    at: npt.NDArray[np.int64],
    typed: dict[str, pa.ChunkedArray | pa.Array],
    model: ModelSpec,
    texts: list[bytes],
) -> Rows:
    columns = pa.table(
        [typed[name] for name in model.required],
        schema=pa.schema([(name, ARROW_TYPES[model.columns[name].dtype]) for name in model.required]),
    )
    return Rows(ids=ids, at=at, columns=columns, keys=_keys(typed, model.key, len(ids)), texts=texts)


def _keys(typed: dict[str, Any], key: tuple[str, ...], count: int) -> list[str | None]:
    if not any(name in typed for name in key):
        return [None] * count
    lists = [_plain(typed[name]) if name in typed else [None] * count for name in key]
    return [orjson.dumps(row).decode() for row in zip(*lists, strict=True)]


def _plain(column: Any) -> list[Any]:
    return (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist()


def _checked_ids(ids: list[Any] | None, count: int) -> list[str]:
    if ids is None:
        return new_ids(count)
    types = set(map(type, ids))
    if types == {_NONE}:
        return new_ids(count)
    if types == {str, _NONE}:
        ids = [fresh if given is None else given for given, fresh in zip(ids, new_ids(count), strict=True)]
    elif types != {str}:
        raise RequestError("an 'id' must be a string: the prediction's name, by which a retry is recognised")
    if not all(0 < len(i) <= MAX_ID_LENGTH for i in ids):
        raise RequestError(f"an 'id' must have 1 to {MAX_ID_LENGTH} characters")
    if len(set(ids)) != count:
        raise RequestError("two rows of the request have the same 'id': give each its own")
    return ids


def _check_names(raw: dict[str, Any], model: ModelSpec) -> None:
    strange = sorted(raw.keys() - model.columns.keys())
    if strange:
        raise ContractError(
            f"columns {strange} are none of model {model.name!r}: its rows have {sorted(model.columns)}"
        )
    missing = [name for name in model.required if name not in raw]
    if missing:
        raise ContractError(f"columns {missing} are missing: model {model.name!r} needs {list(model.required)}")


def _from_values(name: str, values: list[Any], form: ColumnForm) -> pa.Array:
    types = set(map(type, values))
    if _NONE in types:
        _check_null(name, form, values.index(None))
        types = types - {_NONE}
    if not types <= _JSON_TYPES[form.dtype]:
        wrong = sorted(t.__name__ for t in types - _JSON_TYPES[form.dtype])
        raise ContractError(f"column {name!r} holds {', '.join(wrong)}: it must be {form.dtype}")
    try:
        if form.dtype == "timestamp":
            return pa.array(_timestamps(values, types), TIMESTAMP)
        return pa.array(values, ARROW_TYPES[form.dtype])
    except (pa.ArrowException, OverflowError, ValueError) as err:
        raise ContractError(f"column {name!r} does not fit {form.dtype}: {_told(err)}") from err


def _timestamps(values: list[Any], types: set[type]) -> list[Any] | pa.Array:
    """Integers are µs already; texts are parsed together."""
    if types <= {int}:
        return values
    if types == {str}:
        return pa.array(values, pa.string()).cast(TIMESTAMP)
    texts = pa.array([v if isinstance(v, str) else None for v in values], pa.string()).cast(TIMESTAMP)
    parsed = texts.cast(pa.int64()).to_pylist()
    return [p if isinstance(v, str) else v for v, p in zip(values, parsed, strict=True)]


def _moments(values: list[Any], now_us: int) -> npt.NDArray[np.int64]:
    if values[0] is None and set(map(type, values)) == {_NONE}:
        return np.full(len(values), now_us, dtype=np.int64)
    # One moment for all rows is the usual case: parse it once.
    if len(values) > 1 and values.count(values[0]) == len(values) and isinstance(values[0], str):
        return np.repeat(_moments(values[:1], now_us), len(values))
    column = _from_values("at", values, ColumnForm("timestamp", True))
    return _in_range(column.cast(pa.int64()).fill_null(now_us).to_numpy(zero_copy_only=False))


def _in_range(at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if at.size and (at.min() < EARLIEST_AT or at.max() > LATEST_AT):
        raise ContractError("'at' lies outside the years 1900 to 2200: give ISO-8601 with a zone, or microseconds UTC")
    return at


def _check_null(name: str, form: ColumnForm, row: int) -> None:
    if not form.nullable:
        raise ContractError(f"column {name!r} is null or missing in row {row}: its source does not allow that")


def _cast(name: str, column: pa.ChunkedArray, form: ColumnForm) -> pa.Array:
    if column.null_count:
        _check_null(name, form, column.is_null().to_pylist().index(True))
    wanted = ARROW_TYPES[form.dtype]
    _check_kin(name, column.type, form)
    try:
        # Nanoseconds lose their last digits on purpose: raymill's moments are microseconds.
        cast = column.cast(wanted, safe=form.dtype != "timestamp")
    except (pa.ArrowException, OverflowError) as err:
        raise ContractError(f"column {name!r} does not fit {form.dtype}: {_told(err)}") from err
    return cast.combine_chunks() if cast.num_chunks != 1 else cast.chunk(0)


def _told(err: Exception) -> str:
    """What is wrong, without Arrow's advice to whoever calls Arrow."""
    return str(err).partition(". ")[0]


def _check_kin(name: str, given: pa.DataType, form: ColumnForm) -> None:
    given = given.value_type if pa.types.is_dictionary(given) else given
    if not _is_kin(given, form.dtype):
        raise ContractError(f"column {name!r} is {given}: it must be {form.dtype}")


def _is_kin(given: pa.DataType, dtype: str) -> bool:
    t = pa.types
    kin = {
        "string": t.is_string(given) or t.is_large_string(given) or t.is_string_view(given),
        "int64": t.is_integer(given),
        "float64": t.is_floating(given) or t.is_integer(given),
        "bool": t.is_boolean(given),
        "timestamp": t.is_int64(given) or (t.is_timestamp(given) and given.tz is not None),
    }
    return t.is_null(given) or kin[dtype]


def _read_stream(body: bytes, model: ModelSpec) -> pa.Table:
    batches, count = [], 0
    try:
        with pa.ipc.open_stream(body) as reader:
            schema = reader.schema
            for batch in reader:
                count += batch.num_rows
                if count > MAX_REQUEST_ROWS:
                    break
                batch.validate(full=True)
                batches.append(batch)
        check_count(count, model)
        return pa.Table.from_batches(batches, schema)
    except (pa.ArrowException, OSError, EOFError, ValueError, TypeError, KeyError) as err:
        raise RequestError(
            f"the body is not an Arrow IPC stream ({err}): write it with `pyarrow.ipc.new_stream`"
        ) from err
