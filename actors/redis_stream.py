"""A Redis stream's consumer group as a `Stream`: at least once from Redis, once in the lake.

Invariants
- A consumer has at most one batch pending: it works off what is pending before it reads anew. One read gives a run of
  entries, and what is pending of it stays that run, so a batch that is given again has the same first and last entry,
  which are its id.
- Entries are acknowledged when the lake holds them, never before.
- What a dead consumer had pending is claimed whole, as the batch that it was.

Redis keeps what it has acknowledged only as well as it is told to: `appendonly yes`. After a loss entries come again
in other batches; then their keys keep them from being doubled.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pyarrow as pa

from raymill.actors.incoming import Batch
from raymill.runtime.errors import StoreError
from raymill.runtime.spec import RedisStream, Source
from raymill.runtime.stores import redis_secrets, shown

MAX_ROWS = 8192
"""Entries of one batch; what comes faster waits in Redis."""
CLAIM_AFTER_S = 30.0
"""A consumer that was not heard of for so long is dead, and what it had pending is another one's."""
_TIMEOUT_S = 10.0
_ALONE = "json"
"""An entry with this one field holds the row as a JSON object."""


class RedisGroup:
    """One consumer of a group; a `Stream`."""

    def __init__(
        self,
        source: Source,
        declared: RedisStream,
        consumer: str,
        *,
        max_rows: int = MAX_ROWS,
        claim_after_s: float = CLAIM_AFTER_S,
    ) -> None:
        """Nothing is reached yet.

        Args:
            source: what the rows are.
            declared: where they come from.
            consumer: this process's name in the group: the same after a restart, another one's never.
            max_rows: entries of one batch.
            claim_after_s: when a consumer that says nothing is dead.
        """
        self._source, self._declared, self._consumer = source, declared, consumer
        self._max_rows, self._claim_after_s = max_rows, claim_after_s
        self._client: Any = None
        self._is_clean = False
        """Whether nothing is pending of this consumer for certain."""
        self._claimed_s = 0.0
        self._given: Batch | None = None

    def open(self) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as err:
            raise StoreError(
                f"source {self._source.name!r} reads from {shown(self._declared.url)}, which needs the redis package: "
                f"pip install 'redis[hiredis]'"
            ) from err
        self.close()
        self._client = redis.Redis.from_url(
            self._declared.url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            protocol=2,
            retry=Retry(NoBackoff(), 0),  # a read that is made again unseen would leave two batches pending
            **redis_secrets(self._declared.url),
        )
        with self._as_store_error():
            self._make_group()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client, self._given, self._is_clean = None, None, False

    def next(self, wait_s: float) -> Batch | None:
        if self._given is not None:
            return self._given
        if self._client is None:
            self.open()
        with self._as_store_error():
            entries = [] if self._is_clean else self._pending()
            if not entries and time.monotonic() - self._claimed_s > self._claim_after_s / 2:
                entries = self._claim()
                self._claimed_s = time.monotonic()
            if not entries:
                entries = self._read(wait_s)
        self._given = self._batch(entries) if entries else None
        return self._given

    def acknowledge(self, batch: Batch) -> None:
        with self._as_store_error():
            self._client.xack(self._declared.stream, self._declared.group, *batch.position)
        self._given, self._is_clean = None, True

    def waiting(self) -> int | None:
        with self._as_store_error():
            groups = self._client.xinfo_groups(self._declared.stream)
        mine = next(g for g in groups if g["name"] == self._declared.group.encode())
        behind = mine.get("lag")  # servers before 7.0 do not tell, nor does one after entries were deleted
        return None if behind is None else int(behind) + int(mine["pending"])

    def _make_group(self) -> None:
        import redis

        try:
            self._client.xgroup_create(self._declared.stream, self._declared.group, id="0", mkstream=True)
        except redis.ResponseError as err:
            if "BUSYGROUP" not in str(err):
                raise

    def _pending(self) -> list[Any]:
        return self._of_group("0", None, None)

    def _read(self, wait_s: float) -> list[Any]:
        self._is_clean = False  # whatever becomes of the answer, Redis may count its entries as delivered
        entries = self._of_group(">", self._max_rows, max(1, int(wait_s * 1000)))
        self._is_clean = not entries
        return entries

    def _of_group(self, position: str, count: int | None, block_ms: int | None) -> list[Any]:
        found = self._client.xreadgroup(
            self._declared.group, self._consumer, {self._declared.stream: position}, count=count, block=block_ms
        )
        return found[0][1] if found else []

    def _claim(self) -> list[Any]:
        """Take over what one dead consumer of the group had pending."""
        stream, group, silent_ms = self._declared.stream, self._declared.group, int(self._claim_after_s * 1000)
        for other in self._client.xinfo_consumers(stream, group):
            name = other["name"].decode()
            if name == self._consumer or not other["pending"] or other["idle"] < silent_ms:
                continue
            left = self._client.xpending_range(
                stream, group, min="-", max="+", count=other["pending"], consumername=name
            )
            ids = [entry["message_id"] for entry in left]
            self._is_clean = False
            self._client.xclaim(stream, group, self._consumer, silent_ms, ids, justid=True)
            if entries := self._pending():  # another one may have been first
                return entries
        return []

    def _batch(self, entries: list[Any]) -> Batch:
        ids = [entry_id for entry_id, _ in entries]
        rows, rejected = rows_of(entries, self._source)
        return Batch(
            batch_id=f"{self._declared.stream}/{ids[0].decode()}-{ids[-1].decode()}",
            rows=rows,
            rejected=rejected,
            is_live=True,
            position=ids,
        )

    @contextmanager
    def _as_store_error(self) -> Iterator[None]:
        import redis

        try:
            yield
        except redis.ResponseError as err:
            self.close()  # with the server's memory the group may have gone: `open` makes it again
            raise StoreError(f"stream {self._declared.stream!r} on {shown(self._declared.url)}: {err}") from err
        except redis.RedisError as err:
            self.close()
            raise StoreError(
                f"stream {self._declared.stream!r} on {shown(self._declared.url)} can not be reached: {err}; is the "
                f"server up, and its password in RAYMILL_REDIS_PASSWORD?"
            ) from err


def rows_of(entries: list[tuple[bytes, dict[bytes, bytes]]], source: Source) -> tuple[pa.Table, Any]:
    """Entries as rows, all text, since the contract parses; and those that can not be rows, with the reason.

    Reasons: `entry:gone` (trimmed before it was taken), `entry:columns` (a field that the source does not declare),
    `entry:text` (no UTF-8), `entry:json` (the field `json` holds no object).
    """
    rows: list[dict[str, str | None]] = []
    rejected: list[tuple[str, str]] = []
    for entry_id, fields in entries:
        found = _row_of(fields, source)
        if isinstance(found, str):
            told = {k.decode(errors="replace"): v.decode(errors="replace") for k, v in fields.items()}
            rejected.append((orjson.dumps({"entry": entry_id.decode(), "fields": told}).decode(), found))
        else:
            rows.append(found)
    schema = pa.schema([(name, pa.string()) for name in source.schema])
    return pa.Table.from_pylist(rows, schema), tuple(rejected)


def _row_of(fields: dict[bytes, bytes], source: Source) -> dict[str, str | None] | str:
    """The row, or the reason why it is none."""
    if not fields:
        return "entry:gone"
    try:
        texts: dict[str, str | None] = {k.decode(): v.decode() for k, v in fields.items()}
    except UnicodeDecodeError:
        return "entry:text"
    if set(texts) == {_ALONE} and _ALONE not in source.schema:
        try:
            row = orjson.loads(texts[_ALONE] or "")
        except orjson.JSONDecodeError:
            return "entry:json"
        if not isinstance(row, dict):
            return "entry:json"
        texts = {k: v if v is None or isinstance(v, str) else orjson.dumps(v).decode() for k, v in row.items()}
    return texts if texts.keys() <= source.schema.keys() else "entry:columns"
