"""The ledger: one append-only, hash-chained record of what happened, in SQLite.

Invariants
- An event that `append` returned for survives kill -9 and power loss (WAL, `synchronous=FULL`); a batch is one
  transaction: all of it is there or none.
- `seq` counts 1, 2, 3 … without gaps; each hash covers the event, its seq and the hash before it, and the newest
  (seq, hash) is kept apart, so that a changed, removed or cut-off event is found by `verify`.
- A key is written once: a retried append doubles nothing.
- One opener: a file lock refuses the second, and goes away with the process that holds it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymill.runtime.errors import ContractError, StoreError
from raymill.runtime.messages import Event

GENESIS = "0" * 64
"""The hash before the first event."""

SCHEMA_VERSION = 1
"""Layout of the database; a newer one is refused, not guessed at."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
  seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, subject TEXT NOT NULL, pipeline TEXT NOT NULL, run TEXT NOT NULL,
  at INTEGER, wall_s REAL NOT NULL, data TEXT NOT NULL, key TEXT NOT NULL, hash TEXT NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS events_key ON events (key) WHERE key <> '';
CREATE INDEX IF NOT EXISTS events_kind ON events (kind, seq);
CREATE INDEX IF NOT EXISTS events_subject ON events (subject, seq);
CREATE TABLE IF NOT EXISTS head (one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER NOT NULL, hash TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS events_are_not_changed BEFORE UPDATE ON events
  BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS events_are_not_removed BEFORE DELETE ON events
  BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""
# The second condition is what lets SQLite use the partial index; without it every append reads the whole table.
_KEY_KNOWN = "SELECT 1 FROM events WHERE key = ? AND key <> ''"
_COLUMNS = ("seq", "kind", "subject", "pipeline", "run", "at", "wall_s", "data", "key", "hash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a walk over the whole chain found."""

    events: int
    """Events that are sound, from the first on."""
    broken_seq: int | None
    """First seq at which the chain does not hold; null: it is whole."""
    reason: str
    """What is wrong there; empty: nothing."""


class Ledger:
    """The open ledger. Threads may share it: one connection behind one lock."""

    def __init__(self, path: str | Path, *, lock_wait_s: float = 0.0) -> None:
        """Open the database at `path`, made if it is not there.

        Args:
            path: the SQLite file; its folder is made.
            lock_wait_s: how long to wait for another opener to go away.

        Raises:
            StoreError: another process has it open, or the file is damaged.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mutex = threading.RLock()
        self._lock_fd = _take_lock(self.path, lock_wait_s)
        try:
            self._db = _connect(self.path)
        except StoreError:
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        """Give file and lock back; may be called twice."""
        with self._mutex:
            if self._lock_fd >= 0:
                self._db.close()
                os.close(self._lock_fd)
                self._lock_fd = -1

    def append(self, events: Sequence[Event]) -> int:
        """Write a batch in one transaction; how many of them were new.

        NaN and infinities inside `data` become null: JSON has neither.

        Raises:
            ContractError: an event's `data` holds something that is not JSON; nothing was written.
            StoreError: the disk is full or the file damaged; nothing was written.
        """
        if not events:
            return 0
        with self.transaction() as db:
            return self.insert(db, events)

    def insert(self, db: sqlite3.Connection, events: Sequence[Event]) -> int:
        """`append` inside a transaction that is open already, so that it commits with what else is in there."""
        seq, previous = _head(db)
        first = seq
        for event in events:
            if event.key and db.execute(_KEY_KNOWN, (event.key,)).fetchone():
                continue
            seq += 1
            row = _row(event, seq)
            previous = _chain(previous, row)
            db.execute("INSERT INTO events VALUES (?,?,?,?,?,?,?,?,?,?)", (*row, previous))
        db.execute("INSERT OR REPLACE INTO head VALUES (1, ?, ?)", (seq, previous))
        return seq - first

    def events(
        self,
        kind: str | None = None,
        *,
        subject: str | None = None,
        pipeline: str | None = None,
        run: str | None = None,
        since_seq: int = 0,
        limit: int | None = None,
    ) -> list[dict[str, Any]]:
        """Events in order, as dicts of Event's fields with `seq` and `hash`.

        Args:
            kind: exact, or with a star: `lease.*`.
            subject: exact.
            pipeline: exact.
            run: exact.
            since_seq: only later ones (exclusive).
            limit: at most so many, the oldest first.
        """
        wanted: list[tuple[str, Any]] = [("seq > ?", since_seq)]
        if kind is not None:
            wanted.append(("kind GLOB ?" if "*" in kind else "kind = ?", kind))
        for column, value in (("subject", subject), ("pipeline", pipeline), ("run", run)):
            if value is not None:
                wanted.append((f"{column} = ?", value))
        query = f"SELECT * FROM events WHERE {' AND '.join(w for w, _ in wanted)} ORDER BY seq LIMIT ?"
        with self.reading() as db:
            rows = db.execute(query, (*(v for _, v in wanted), -1 if limit is None else limit)).fetchall()
        return [_as_dict(row) for row in rows]

    def verify(self) -> Verification:
        """Walk the chain from the first event and say where it breaks first."""
        previous, good = GENESIS, 0
        with self.reading() as db:
            head_seq, head_hash = _head(db)
            for row in db.execute("SELECT * FROM events ORDER BY seq"):
                if row[0] != good + 1:
                    return Verification(events=good, broken_seq=good + 1, reason=f"event {good + 1} is missing")
                if _chain(previous, row[:-1]) != row[-1]:
                    return Verification(events=good, broken_seq=row[0], reason="the event is not what was written")
                previous, good = row[-1], row[0]
        if (good, previous) != (head_seq, head_hash):
            return Verification(events=good, broken_seq=good + 1, reason=f"the end is cut off: {head_seq} were written")
        return Verification(events=good, broken_seq=None, reason="")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One write transaction: committed at the end, rolled back by any exception."""
        with self.reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for this thread alone; SQLite's errors leave as StoreError."""
        with self._mutex:
            if self._lock_fd < 0:
                raise StoreError(f"ledger {self.path} is closed: start the `records` actor again")
            try:
                yield self._db
            except sqlite3.Error as err:
                raise StoreError(
                    f"ledger {self.path}: {err}; nothing of this call was written. Check the disk with `raymill doctor`"
                ) from err


def _take_lock(path: Path, wait_s: float) -> int:
    fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            if time.monotonic() >= end:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                raise StoreError(
                    f"ledger {path} is open in another process (pid {holder}): only one may write it; "
                    "ask the `records` actor, or stop that process"
                ) from err
            time.sleep(0.02)
        else:
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
            return fd


def _connect(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        os.chmod(path, 0o600)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            db.close()
            raise StoreError(
                f"ledger {path} has layout {version}, this raymill knows {SCHEMA_VERSION}: upgrade raymill"
            )
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    except sqlite3.Error as err:
        raise StoreError(f"ledger {path} can not be opened: {err}; restore it from a copy, or move it away") from err
    return db


def _head(db: sqlite3.Connection) -> tuple[int, str]:
    found = db.execute("SELECT seq, hash FROM head").fetchone()
    return (found[0], found[1]) if found else (0, GENESIS)


def _row(event: Event, seq: int) -> tuple[Any, ...]:
    try:
        data = canonical(event.data)
    except TypeError as err:
        raise ContractError(f"event {event.kind} of {event.subject}: {err}; give JSON values") from err
    at = None if event.at is None else int(event.at)
    return (seq, event.kind, event.subject, event.pipeline, event.run, at, float(event.wall_s), data, event.key)


def _chain(previous: str, row: Sequence[Any]) -> str:
    body = dict(zip(_COLUMNS, row, strict=False))
    body["previous"] = previous
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def _as_dict(row: Sequence[Any]) -> dict[str, Any]:
    found = dict(zip(_COLUMNS, row, strict=True))
    found["data"] = json.loads(found["data"])
    return found


def canonical(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no blanks, non-finite numbers null.

    Raises:
        TypeError: it holds something that has no JSON form.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return _plain(value.item())
    raise TypeError(f"{type(value).__name__} is not JSON")
