"""The online store in Redis, for many machines: what `OnlineStore` and `OnlineReader` need of LMDB, by the same names.

A view's records are one hash, so that one command reads many and one drops all; progress and horizon are another one.

Invariants
- What a transaction writes goes out in one MULTI/EXEC: a reader sees all of it or nothing.
- A writer that another one overtook since it began writes nothing (`Overtaken`), and begins anew.
- What is asked for at once by `fetch` is of one state of the store.
- A connection that broke is made anew once, at once; a server that is away is `Unavailable`, within seconds.

Whether an acknowledged write outlives the server is the server's to say: `appendonly yes`, `appendfsync always`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from raymill.runtime.errors import RaymillError, StoreError, Unavailable
from raymill.runtime.stores import REDIS_PASSWORD, redis_secrets, shown

_DIGEST = 16
"""Hex digits that name a view."""
_OF_VIEWS = (b"v", b"n", b"s")
"""First letters of records that a view has by the thousand: events, newest values, texts of a lookup."""
_CONNECT_S = 2.0
_READ_S = 2.0
_WRITE_S = 60.0
"""A view that is filled anew goes out in one command."""


class Overtaken(Exception):
    """Another writer was first."""


class RedisEnvironment:
    """One pipeline's records on one server; threads may share it."""

    def __init__(self, url: str, name: str) -> None:
        self.url = shown(url)
        """The server's, as it may be shown."""
        self.prefix = f"raymill:{name}:".encode()
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as err:
            raise StoreError(f"online store {self.url} needs the redis package: pip install 'redis[hiredis]'") from err
        self._errors = redis.exceptions
        options = {"retry": Retry(NoBackoff(), 1), "socket_connect_timeout": _CONNECT_S, "protocol": 2}
        options |= redis_secrets(url)
        self.client = redis.Redis.from_url(url, socket_timeout=_READ_S, **options)
        self.writer = redis.Redis.from_url(url, socket_timeout=_WRITE_S, **options)

    def begin(self, *, write: bool = False, buffers: bool = False) -> RedisTransaction:
        """A transaction, as a context."""
        return RedisTransaction(self, write)

    def exists(self) -> bool:
        """Whether a writer was here."""
        with self.as_our_error():
            return bool(self.client.exists(self.prefix + b"meta"))

    def reader_check(self) -> None:
        """Nothing: readers leave no traces."""

    def close(self) -> None:
        """Give the connections back."""
        self.client.close()
        self.writer.close()

    @contextmanager
    def as_our_error(self) -> Iterator[None]:
        """The client's errors as ours."""
        try:
            yield
        except self._errors.RedisError as err:
            raise self._told(err) from err

    def _told(self, err: Exception) -> RaymillError | Overtaken:
        kinds = self._errors
        if isinstance(err, kinds.WatchError):
            return Overtaken()
        refused = (kinds.AuthenticationError, kinds.AuthorizationError, kinds.NoPermissionError)
        if isinstance(err, refused):
            return StoreError(
                f"online store {self.url} refuses us ({err}): set {REDIS_PASSWORD} where `raymill up` runs "
                "and on every host of the cluster"
            )
        if isinstance(err, kinds.ConnectionError | kinds.TimeoutError):
            return Unavailable(f"online store {self.url} does not answer ({err}): is the server up, is this its URL?")
        return StoreError(f"online store {self.url}: {err}; look at the server's log")


class RedisTransaction:
    """Reads what it is told to fetch at once; writes at the end, all or nothing."""

    def __init__(self, env: RedisEnvironment, write: bool) -> None:
        self._env = env
        self._write = write
        self._read: dict[bytes, bytes | None] = {}
        self._written: dict[bytes, bytes | None] = {}
        self._cleared: list[bytes] = []
        self._pipe: Any = None

    def __enter__(self) -> RedisTransaction:
        if self._write:
            with self._env.as_our_error():
                self._pipe = self._env.writer.pipeline(transaction=True)
                self._pipe.watch(self._env.prefix + b"epoch")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pipe is None:
            return
        try:
            if kind is None:
                self._commit()
        finally:
            self._pipe.reset()

    def get(self, name: bytes, default: bytes | None = None) -> bytes | None:
        """One record."""
        if name in self._written:
            found = self._written[name]
        elif any(name.startswith(prefix) for prefix in self._cleared):
            found = None
        else:
            if name not in self._read:
                self.fetch([name])
            found = self._read[name]
        return default if found is None else found

    def fetch(self, names: Sequence[bytes]) -> None:
        """Read records of one state of the store, for `get` to give."""
        hashes: dict[bytes, list[bytes]] = {}
        for name in dict.fromkeys(names):
            hashes.setdefault(self._hash(name), []).append(name)
        with self._env.as_our_error():
            if self._pipe is not None:  # watched: commands are answered at once, and what they say holds at the end
                answers = [self._pipe.hmget(h, self._fields(some)) for h, some in hashes.items()]
            elif len(hashes) == 1:
                [(h, some)] = hashes.items()
                answers = [self._env.client.hmget(h, self._fields(some))]
            else:
                pipe = self._env.client.pipeline(transaction=True)
                for h, some in hashes.items():
                    pipe.hmget(h, self._fields(some))
                answers = pipe.execute() if hashes else []
        for some, answer in zip(hashes.values(), answers, strict=True):
            self._read.update(zip(some, answer, strict=True))

    def put(self, name: bytes, value: Any) -> None:
        """Write a record."""
        self._written[name] = bytes(value)

    def delete(self, name: bytes) -> None:
        """Take a record away."""
        self._written[name] = None

    def clear(self, prefix: bytes) -> None:
        """Take all records of a view away."""
        self._cleared.append(prefix)
        self._written = {n: v for n, v in self._written.items() if not n.startswith(prefix)}

    def _commit(self) -> None:
        pipe = self._pipe
        pipe.multi()
        for prefix in self._cleared:
            pipe.unlink(self._hash(prefix))
        puts: dict[bytes, dict[bytes, bytes]] = {}
        for name, value in self._written.items():
            if value is None:
                pipe.hdel(self._hash(name), *self._fields([name]))
            else:
                puts.setdefault(self._hash(name), {})[self._fields([name])[0]] = value
        for h, records in puts.items():
            pipe.hset(h, mapping=records)
        pipe.incr(self._env.prefix + b"epoch")
        with self._env.as_our_error():
            pipe.execute()

    def _hash(self, name: bytes) -> bytes:
        return self._env.prefix + (name[: 1 + _DIGEST] if name[:1] in _OF_VIEWS else b"meta")

    @staticmethod
    def _fields(names: Sequence[bytes]) -> list[bytes]:
        return [n[1 + _DIGEST :] if n[:1] in _OF_VIEWS else n for n in names]
