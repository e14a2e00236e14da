"""The table of API keys, in the ledger's database: digests, tenants, rights.

Invariants
- A key's row and the ledger's event of its creation or revocation commit together.
- A revoked key stays revoked, and its row stays; every change may be asked for again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from raymill.runtime.api_keys import ApiKey, Right
from raymill.runtime.errors import UnknownKey
from raymill.runtime.ledger import Ledger
from raymill.runtime.messages import Event

CREATED, REVOKED = "key.created", "key.revoked"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS api_keys (
  digest TEXT PRIMARY KEY, tenant TEXT NOT NULL, rights TEXT NOT NULL, created_s REAL NOT NULL, expires_s REAL,
  revoked_s REAL);
"""
_ALL = "SELECT digest, tenant, rights, created_s, expires_s, revoked_s FROM api_keys"
_STAMP = "SELECT coalesce(max(seq), 0) FROM events WHERE kind IN (?, ?)"


class KeyRegistry:
    """API keys over an open ledger."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.time) -> None:
        self._ledger, self._clock = ledger, clock
        with ledger.reading() as db:
            db.executescript(_SCHEMA)

    def create(self, key: ApiKey) -> ApiKey:
        """Let a key in; one whose digest is known is left as it is."""
        with self._ledger.transaction() as db:
            found = db.execute(f"{_ALL} WHERE digest = ?", (key.digest,)).fetchone()
            if found:
                return _key(found)
            row = (key.digest, key.tenant, ",".join(key.rights), key.created_s, key.expires_s, None)
            db.execute("INSERT INTO api_keys VALUES (?,?,?,?,?,?)", row)
            data: dict[str, Any] = {"tenant": key.tenant, "rights": list(key.rights), "expires_s": key.expires_s}
            self._ledger.insert(db, [_event(CREATED, key, self._clock(), data)])
            return key

    def revoke(self, name: str, reason: str) -> ApiKey:
        """Have a key be worth nothing from now on; one that is revoked already is left as it is.

        Raises:
            UnknownKey: no key, or more than one, has a digest that begins so.
        """
        with self._ledger.transaction() as db:
            rows = db.execute(_ALL).fetchall() if name else []
            found = [k for k in map(_key, rows) if k.digest.startswith(name)]
            if len(found) != 1:
                raise UnknownKey(f"{len(found)} API keys have an id that begins with {name!r}")
            key, now = found[0], self._clock()
            if key.revoked_s is None:
                db.execute("UPDATE api_keys SET revoked_s = ? WHERE digest = ?", (now, key.digest))
                self._ledger.insert(db, [_event(REVOKED, key, now, {"tenant": key.tenant, "reason": reason})])
            return _key(db.execute(f"{_ALL} WHERE digest = ?", (key.digest,)).fetchone())

    def every(self) -> list[ApiKey]:
        """Every key there ever was, oldest first."""
        with self._ledger.reading() as db:
            return [_key(row) for row in db.execute(f"{_ALL} ORDER BY created_s, digest")]

    def changed_since(self, stamp: int) -> tuple[int, list[ApiKey]] | None:
        """The keys that are not revoked, with a new stamp; None: nothing changed since that stamp."""
        with self._ledger.reading() as db:
            newest = db.execute(_STAMP, (CREATED, REVOKED)).fetchone()[0]
            if newest == stamp:
                return None
            return newest, [_key(row) for row in db.execute(f"{_ALL} WHERE revoked_s IS NULL")]


def _key(row: tuple[str, str, str, float, float | None, float | None]) -> ApiKey:
    digest, tenant, rights, created_s, expires_s, revoked_s = row
    return ApiKey(
        digest=digest,
        tenant=tenant,
        rights=tuple(map(Right, rights.split(","))),
        created_s=created_s,
        expires_s=expires_s,
        revoked_s=revoked_s,
    )


def _event(kind: str, key: ApiKey, wall_s: float, data: dict[str, Any]) -> Event:
    return Event(kind=kind, subject=f"key/{key.id}", wall_s=wall_s, data=data, key=f"{kind} {key.digest}")
