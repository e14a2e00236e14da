"""The actor `records`: ledger and registry, opened by this process alone; and the value others reach it by.

`RecordsActor` is a plain class that works without Ray. `RemoteRecords` has the same methods, is picklable, finds
the actor by name at each call and outlives its restarts: every call may be repeated without doing anything twice.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import ObjectLostError

from raymill.runtime.api_keys import ApiKey
from raymill.runtime.errors import Unavailable
from raymill.runtime.home import Home
from raymill.runtime.key_registry import KeyRegistry
from raymill.runtime.ledger import Ledger, Verification
from raymill.runtime.messages import Event, Manifest, ModelVersion
from raymill.runtime.registry import Registry
from raymill.runtime.shared_programs import SharedPrograms, put_bytes
from raymill.runtime.spawn import Remote, ask, in_short

NAME = "records"
"""The actor's name in Ray."""

_LOCK_WAIT_S = 10.0
"""How long a restarted actor waits for the process before it to be gone."""


class RecordsActor:
    """Ledger and registry of one RAYMILL_HOME."""

    def __init__(self, home: str | Path) -> None:
        self._home = Home(Path(home))
        self._ledger: Ledger | None = None
        self._registry: Registry | None = None
        self._keys: KeyRegistry | None = None
        self._shared = SharedPrograms(lambda digest: self.registry.program(digest), put_bytes)

    def start(self) -> None:
        """Open the database.

        Raises:
            StoreError: another process has it open, or it is damaged.
        """
        if self._ledger is None:
            self._ledger = Ledger(self._home.record, lock_wait_s=_LOCK_WAIT_S)
            self._registry = Registry(self._ledger, self._home.models)
            self._keys = KeyRegistry(self._ledger)

    def stop(self) -> None:
        """Close the database."""
        if self._ledger is not None:
            self._ledger.close()
        self._ledger = self._registry = self._keys = None

    def health(self) -> bool:
        """Whether the database is open."""
        return self._ledger is not None

    @property
    def ledger(self) -> Ledger:
        """The open ledger."""
        if self._ledger is None:
            raise Unavailable("the actor `records` is not started: call start() first")
        return self._ledger

    @property
    def registry(self) -> Registry:
        """The open registry."""
        if self._registry is None:
            raise Unavailable("the actor `records` is not started: call start() first")
        return self._registry

    @property
    def keys(self) -> KeyRegistry:
        """The open table of API keys."""
        if self._keys is None:
            raise Unavailable("the actor `records` is not started: call start() first")
        return self._keys

    def create_key(self, key: ApiKey) -> ApiKey:
        """Let an API key in; idempotent by digest."""
        return self.keys.create(key)

    def revoke_key(self, name: str, reason: str) -> ApiKey:
        """Have an API key be worth nothing from now on."""
        return self.keys.revoke(name, reason)

    def api_keys(self) -> list[ApiKey]:
        """Every API key there ever was, oldest first."""
        return self.keys.every()

    def keys_changed_since(self, stamp: int) -> tuple[int, list[ApiKey]] | None:
        """The API keys that are not revoked and a stamp; None: nothing changed since that stamp."""
        return self.keys.changed_since(stamp)

    def append(self, events: Sequence[Event]) -> None:
        """Write events, all or none; those whose key is known already are left out."""
        self.ledger.append(events)

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
        """Events in order, as dicts of Event's fields with `seq` and `hash`; `kind` may hold a star."""
        return self.ledger.events(kind, subject=subject, pipeline=pipeline, run=run, since_seq=since_seq, limit=limit)

    def verify(self) -> Verification:
        """Walk the whole chain."""
        return self.ledger.verify()

    def register(
        self,
        model: str,
        kind: str,
        program: bytes,
        manifest: Manifest | None,
        training_id: str,
        metrics: dict[str, float],
        threshold: float,
        *,
        at: int | None = None,
    ) -> ModelVersion:
        """A new candidate; idempotent by training and kind."""
        return self.registry.register(model, kind, program, manifest, training_id, metrics, threshold, at=at)

    def models(self) -> list[str]:
        """Names of all models."""
        return self.registry.models()

    def versions(self, model: str) -> list[ModelVersion]:
        """All versions of a model, oldest first."""
        return self.registry.versions(model)

    def get(self, model: str, version: int) -> ModelVersion:
        """One version."""
        return self.registry.get(model, version)

    def live(self, model: str) -> ModelVersion | None:
        """The live version, if there is one."""
        return self.registry.live(model)

    def program(self, digest: str) -> bytes:
        """A program's bytes, their hash checked."""
        return self.registry.program(digest)

    def program_ref(self, digest: str) -> list[Any]:
        """The program in the object store, as a list of one reference: Ray would resolve a bare one.

        Raises:
            StoreError: as `program`.
        """
        return [self._shared.ref(digest)]

    def start_canary(self, model: str, version: int, *, reason: str, at: int | None = None) -> ModelVersion:
        """Candidate → canary."""
        return self.registry.start_canary(model, version, reason=reason, at=at)

    def reject(self, model: str, version: int, *, reason: str, at: int | None = None) -> ModelVersion:
        """Candidate, canary or retired → rejected."""
        return self._freed(self.registry.reject(model, version, reason=reason, at=at))

    def promote(self, model: str, version: int, *, reason: str, at: int | None = None) -> ModelVersion:
        """Candidate, canary or retired → live; the live one retires."""
        return self._freed(self.registry.promote(model, version, reason=reason, at=at))

    def rollback(self, model: str, *, reason: str, at: int | None = None, version: int | None = None) -> ModelVersion:
        """Live (`version`, if given) → retired; live again what it had replaced."""
        return self._freed(self.registry.rollback(model, reason=reason, at=at, version=version))

    def _freed(self, changed: ModelVersion) -> ModelVersion:
        """Let go of the programs of versions that are retired or rejected now."""
        self._shared.keep(self.registry.digests_in_use())
        return changed


class RemoteRecords(Remote):
    """The actor `records` by name, as a plain object with its methods; picklable; also what others take as `record`.

    It outlives the actor's restarts: a call that is made again does nothing twice.
    """

    def __init__(self, name: str = NAME, patience_s: float = 60.0) -> None:
        super().__init__(name, patience_s)

    def __call__(self, events: Sequence[Event]) -> None:
        """`append`."""
        self.append(events)

    def append(self, events: Sequence[Event]) -> None:
        """Write events; one without a key gets one, so that a call that is made again writes nothing twice."""
        self._call("append", [e if e.key else replace(e, key=uuid.uuid4().hex) for e in events])

    def events(self, kind: str | None = None, **narrowed: Any) -> list[dict[str, Any]]:
        """As the actor's."""
        found: list[dict[str, Any]] = self._call("events", kind, **narrowed)
        return found

    def live(self, model: str) -> ModelVersion | None:
        """As the actor's."""
        found: ModelVersion | None = self._call("live", model)
        return found

    def program(self, digest: str) -> memoryview:
        """A program's bytes where they lie in this node's object store; they stay while somebody holds the view.

        Raises:
            StoreError: as the actor's.
            Unavailable: the actor, or the object, can not be had in time.
        """
        end_s = time.monotonic() + self._patience_s
        while True:
            (ref,) = self._call("program_ref", digest)
            try:
                return memoryview(ask(ref, timeout_s=self._patience_s))
            except ObjectLostError as err:  # the actor ended, and what it had put there with it
                if time.monotonic() >= end_s:
                    raise Unavailable(f"program {digest} is lost on its way to this node ({in_short(err)})") from err

    def rollback(self, model: str, *, reason: str, at: int | None = None, version: int | None = None) -> ModelVersion:
        """As the actor's; without `version` the one that is live now is meant, however often the call is made."""
        if version is None:
            current = self.live(model)
            version = None if current is None else current.version
        found: ModelVersion = self._call("rollback", model, reason=reason, at=at, version=version)
        return found
