"""The notebook's client: HTTP and Arrow; imports neither ray nor torch nor numpy.

    from raymill.runtime import connect
    rows = [{"carrier": "UA", "origin": "EWR", "dest": "IAH"}]
    answers = connect().predict("flight-delay", rows, at="2013-05-01T06:00Z")

Invariant: every row has an id before it is first sent, so a request that is sent again, because a replica was killed
or the queue was full, gets the same answer and is logged once.
"""

from __future__ import annotations

import json
import os
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

import httpx
import pyarrow as pa

from raymill.runtime import errors
from raymill.runtime.api_keys import CA_FILE_VARIABLE, check_key, key_of_environment
from raymill.runtime.errors import Overloaded, RaymillError, RequestError, Unavailable
from raymill.runtime.ids import new_ids

URL_VARIABLE = "RAYMILL_URL"
DEFAULT_URL = "http://127.0.0.1:8000"
ARROW_STREAM = "application/vnd.apache.arrow.stream"
CHUNK_ROWS = 4096
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_READ_DEADLINE_S = 5.0  # an actor that does not run stays away longer than a reader likes to wait
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FINAL_CODES = ("model_error", "training_error", "spec_error")  # sent again they would fail again

Rows = Any
"""A list of dicts, a `pyarrow.Table`, or a `pandas.DataFrame`."""
Moment = str | int | datetime | None
"""ISO-8601 with a zone, microseconds UTC, or a datetime with a zone; None: now."""


def connect(
    url: str | None = None, *, key: str | None = None, ca: str | None = None, deadline_s: float = 60.0
) -> Client:
    """A client of the endpoint at `url`, else at `RAYMILL_URL`, else on this machine.

    Args:
        url: the endpoint, `https://…` from another host.
        key: API key, `rm_…`; absent: `RAYMILL_API_KEY`, else the file (mode 0600) that `RAYMILL_API_KEY_FILE` names.
        ca: PEM file of who signed the endpoint's certificate; absent: `RAYMILL_CA_FILE`, else those of the system.
        deadline_s: how long a call goes on trying.

    Raises:
        RequestError: there is no key in what should hold one, others may read the file, or the key would go over the
            network in the clear.
    """
    found = check_key(key, "key=") if key is not None else key_of_environment()
    ca = ca or os.environ.get(CA_FILE_VARIABLE)
    return Client(url or os.environ.get(URL_VARIABLE) or DEFAULT_URL, key=found, ca=ca, deadline_s=deadline_s)


class Client:
    """Safe for several threads."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        ca: str | None = None,
        deadline_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Args as of `connect`, nothing taken from the environment; `transport` stands for the network."""
        self.url = url.rstrip("/")
        headers = {} if key is None else {"authorization": f"Bearer {_not_in_the_clear(key, self.url)}"}
        self.retried = 0
        """Requests that had to be sent again, each counted once per time."""
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._http = httpx.Client(
            base_url=self.url, timeout=deadline_s, transport=transport, headers=headers, verify=_trust(ca)
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def predict(
        self,
        model: str,
        rows: Rows,
        at: Moment = None,
        ids: Sequence[str] | None = None,
        *,
        version: int | None = None,
    ) -> pa.Table:
        """Probabilities of rows, in their order.

        Args:
            model: name of the model.
            rows: list of dicts, Arrow table or data frame; may have columns `id` and `at`.
            at: moment of all rows that name none.
            ids: names of the predictions; absent: fresh ones.
            version: version that is to answer; absent: as the weights say.

        Returns:
            Columns `id` string, `version` int64, `p` float32; of a model with k > 1 numbers a row lists of k float32.

        Raises:
            RaymillError: of the kind that the endpoint told; `Unavailable` if it could not be reached in time.
        """
        headers = {} if version is None else {"x-raymill-version": str(version)}
        parts = [self._arrow("POST", f"/predict/{model}", headers, chunk) for chunk in _chunks(rows, at, ids)]
        return pa.concat_tables(parts) if parts else _NO_ANSWERS.empty_table()

    def features(self, model: str, rows: Rows, at: Moment = None, *, ages: bool = False) -> pa.Table:
        """Feature vectors of rows as of `at`: `id`, `at`, and a float32 column a feature (NaN: unknown).

        With `ages` features are null where unknown, and there is a column `age_us:<view>` for each view: µs from its
        newest event to the row's moment, null where the online store has none.
        """
        path = f"/raymill/features/{model}" + ("?ages=1" if ages else "")
        parts = [self._arrow("POST", path, {}, c) for c in _chunks(rows, at, None)]
        if not parts:
            raise RequestError("there are no rows: send at least one")
        return pa.concat_tables(parts)

    def catalogue(self, text: str = "", *, tag: str = "", owner: str = "", column: str = "") -> list[dict[str, Any]]:
        """Registered features for which all that is given holds: definition, columns, pipelines, models that use them.

        Args:
            text: stands in name, description or tags.
            tag: one of the feature's tags.
            owner: its owner.
            column: a source column that it stands on, `source.column` or the column alone.
        """
        given = {"text": text, "tag": tag, "owner": owner, "column": column}
        return list(self._json("/raymill/features", {k: v for k, v in given.items() if v}))

    def feature(self, name: str) -> list[dict[str, Any]]:
        """Every version of a feature, newest last, with its `statistics`: in training sets, and as served.

        Raises:
            UnknownFeature: no pipeline ever registered it.
        """
        return list(self._json("/raymill/features", {"name": name}))

    def feature_lineage(self, *, column: str = "", model: str = "", version: int | None = None) -> Any:
        """What stands on a source column (`breaks`: live versions that need it), or what a model stands on."""
        given = {"column": column, "model": model, "version": "" if version is None else str(version)}
        return self._json("/raymill/feature-lineage", {k: v for k, v in given.items() if v})

    def freshness(self, model: str | None = None, at: str | None = None) -> list[dict[str, Any]]:
        """Age of the newest event of each source in the lake and each view online, when a model was last asked.

        Args:
            model: only this one.
            at: another moment to measure at: ISO-8601 with a zone, or `now`.
        """
        given = {"model": model, "at": at}
        return list(self._json("/raymill/freshness", {k: v for k, v in given.items() if v is not None}))

    def consistency(self, model: str | None = None) -> list[dict[str, Any]]:
        """The checks of served vectors against the lake so far, oldest first: mismatches with cause, `alert`."""
        return list(self._json("/raymill/consistency", {} if model is None else {"model": model}))

    def models(self, model: str | None = None) -> list[dict[str, Any]]:
        """Every version of every model, or of one: stage, kind, metrics, history."""
        return list(self._json("/raymill/models", {} if model is None else {"model": model}))

    def drift(self, model: str | None = None) -> list[dict[str, Any]]:
        """The monitor's verdicts so far, oldest first."""
        return list(self._json("/raymill/drift", {} if model is None else {"model": model}))

    def cost(self) -> dict[str, Any]:
        """What was spent, by purpose."""
        return dict(self._json("/raymill/cost"))

    def lineage(self, prediction: str) -> dict[str, Any]:
        """The way back from a prediction to its model, training, features and source rows."""
        return dict(self._json(f"/raymill/lineage/{prediction}"))

    def status(self) -> dict[str, Any]:
        """The pool: leases, and the queue with its reasons."""
        return dict(self._json("/raymill/status"))

    def _json(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        return self._send("GET", path, min(self._deadline_s, _READ_DEADLINE_S), params=dict(query or {})).json()

    def _arrow(self, method: str, path: str, headers: dict[str, str], chunk: tuple[str, bytes]) -> pa.Table:
        content_type, body = chunk
        headers = {**headers, "content-type": content_type, "accept": ARROW_STREAM}
        answer = self._send(method, path, self._deadline_s, content=body, headers=headers)
        with pa.ipc.open_stream(answer.content) as reader:
            return reader.read_all().replace_schema_metadata(None)

    def _send(self, method: str, path: str, deadline_s: float, **parts: Any) -> httpx.Response:
        """Send until answered; again after what may pass, with growing pauses, until the deadline."""
        end_s = time.monotonic() + deadline_s
        pause_s = _FIRST_PAUSE_S
        while True:
            wait_s = pause_s
            try:
                answer = self._http.request(method, path, **parts)
                if answer.status_code == 200:
                    return answer
                error: RaymillError = _error_of(answer)
                may_pass = answer.status_code >= 500 or isinstance(error, Unavailable | Overloaded)
                if not may_pass or error.code in _FINAL_CODES:
                    raise error
                wait_s = max(wait_s, _retry_after_s(answer))
            except httpx.TransportError as err:
                _raise_distrust(err, self.url)
                error = Unavailable(
                    f"the endpoint at {self.url} does not answer ({type(err).__name__}: {err}): `raymill status` says "
                    f"what runs"
                )
            if time.monotonic() + wait_s >= end_s:
                raise error
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            with self._lock:
                self.retried += 1


_NO_ANSWERS = pa.schema([("id", pa.string()), ("version", pa.int64()), ("p", pa.float32())])


def _chunks(rows: Rows, at: Moment, ids: Sequence[str] | None) -> Iterator[tuple[str, bytes]]:
    """(content type, body) of at most `CHUNK_ROWS` rows each, every row with an id and a moment."""
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        rows = pa.Table.from_pandas(rows, preserve_index=False)
    if isinstance(rows, pa.RecordBatch):
        rows = pa.Table.from_batches([rows])
    if ids is not None and len(ids) != len(rows):
        raise RequestError(f"{len(ids)} ids for {len(rows)} rows: give each row its own")
    moment = _moment_us(at) if at is not None and not isinstance(at, str) else at
    if isinstance(rows, pa.Table):
        yield from _table_chunks(rows, moment, ids)
        return
    names = list(ids) if ids is not None else new_ids(len(rows))
    # As of one moment, however long a retry takes.
    moment = _moment_us(datetime.now(UTC)) if moment is None else moment
    for start in range(0, len(rows), CHUNK_ROWS):
        part = [
            {"id": name, **row} if ids is None else {**row, "id": name}
            for name, row in zip(names[start : start + CHUNK_ROWS], rows[start : start + CHUNK_ROWS], strict=True)
        ]
        yield "application/json", _as_json({"rows": part, "at": moment})


def _as_json(document: dict[str, Any]) -> bytes:
    try:
        return json.dumps(document, default=_plain, allow_nan=False).encode()
    except ValueError:  # a NaN, as data frames have where a value is unknown; JSON has none
        known = [{k: None if _is_nan(v) else v for k, v in row.items()} for row in document["rows"]]
    try:
        return json.dumps({**document, "rows": known}, default=_plain, allow_nan=False).encode()
    except ValueError as err:
        raise RequestError(f"a row holds infinity, which JSON can not carry ({err}): send rows as Arrow") from err


def _is_nan(value: object) -> bool:
    return (isinstance(value, float) or getattr(value, "shape", None) == ()) and bool(value != value)


def _table_chunks(rows: pa.Table, at: str | int | None, ids: Sequence[str] | None) -> Iterator[tuple[str, bytes]]:
    if ids is not None or "id" not in rows.column_names:
        names = pa.array(list(ids) if ids is not None else new_ids(rows.num_rows), pa.string())
        rows = rows.drop_columns(["id"]) if "id" in rows.column_names else rows
        rows = rows.append_column("id", names)
    if "at" not in rows.column_names:
        try:
            given = pa.scalar(_moment_us(datetime.now(UTC)) if at is None else at)
            moment = given.cast(pa.timestamp("us", "UTC"))
        except pa.ArrowInvalid as err:
            raise RequestError(f"at={at!r} is no moment ({err}): give ISO-8601 with a zone, or µs UTC") from err
        rows = rows.append_column("at", pa.repeat(moment, rows.num_rows))
    for start in range(0, rows.num_rows, CHUNK_ROWS):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows.slice(start, CHUNK_ROWS))
        yield ARROW_STREAM, sink.getvalue().to_pybytes()


def _moment_us(at: int | datetime) -> int:
    if isinstance(at, datetime):
        if at.tzinfo is None:
            raise RequestError(f"{at!r} has no zone: give it one, e.g. tzinfo=datetime.UTC")
        return round(at.timestamp() * 1e6)
    return at


def _plain(value: object) -> Any:
    if isinstance(value, datetime):
        return _moment_us(value)
    if isinstance(value, date):
        return value.isoformat()
    if hasattr(value, "item"):  # a numpy scalar
        return value.item()
    raise RequestError(f"a row holds {value!r}, which JSON can not carry: use numbers, strings and datetimes")


def _not_in_the_clear(key: str, url: str) -> str:
    """The key, if it may be sent to that address.

    Raises:
        RequestError: it would go to another host without TLS.
    """
    parsed = httpx.URL(url)
    if parsed.scheme != "https" and parsed.host not in _LOOPBACK:
        raise RequestError(f"the API key is not sent to {url} in the clear: use https://")
    return key


def _trust(ca: str | None) -> ssl.SSLContext | bool:
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=os.path.expanduser(ca))
    except OSError as err:
        raise RequestError(f"the certificates in {ca} can not be read ({err}): give a PEM file") from err


def _raise_distrust(err: BaseException, url: str) -> None:
    """Trying again helps nobody whose trust in the certificate is missing."""
    cause: BaseException | None = err
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise RequestError(
                f"the certificate of {url} is not trusted ({cause.verify_message}): name who signed it, by "
                f"connect(ca=FILE) or {CA_FILE_VARIABLE}"
            ) from err
        cause = cause.__cause__ or cause.__context__


def _retry_after_s(answer: httpx.Response) -> float:
    text = answer.headers.get("retry-after", "")
    return min(float(text), 5.0) if text.isdigit() else 0.0


def _known_errors() -> dict[str, type[RaymillError]]:
    found = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, RaymillError)]
    return {cls("").code: cls for cls in found}


def _error_of(answer: httpx.Response) -> RaymillError:
    """The error that the endpoint told, as our own class; by status where a proxy answered in its stead."""
    try:
        told = answer.json()
        message, code = str(told["error"]), told.get("code", "")
    except (ValueError, KeyError, TypeError):
        message, code = f"HTTP {answer.status_code}: {answer.text.strip()[:500]}", ""
    if answer.status_code == 404 and not code:  # Serve's proxy, while no application is deployed behind it
        return Unavailable(
            f"nothing is deployed at {answer.url.copy_with(path='/')} ({message}): `raymill run` does it"
        )
    by_status = {401: errors.Unauthenticated, 403: errors.Forbidden, 413: errors.TooLarge, 429: Overloaded}
    fallback = Unavailable if answer.status_code >= 500 else by_status.get(answer.status_code, RequestError)
    return _known_errors().get(code, fallback)(message)
