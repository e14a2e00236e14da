"""The model registry: versions, their stages and programs, in the ledger's database.

Invariants
- A model has at most one live version (a unique index, not a convention).
- A stage changes in `_move` only, along TRANSITIONS; version, history and ledger event commit together.
- A program's file is on disk before the row that names it; its name is its hash, which is checked when it is read.
- Every change may be asked for again: the second time it finds itself done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raymill.runtime.errors import Conflict, StoreError, UnknownModel, UnknownVersion
from raymill.runtime.ledger import Ledger
from raymill.runtime.messages import Event, Manifest, ModelVersion, Stage
from raymill.runtime.whole_files import sync_folder

TRANSITIONS: dict[Stage, frozenset[Stage]] = {
    Stage.CANDIDATE: frozenset({Stage.CANARY, Stage.LIVE, Stage.REJECTED}),
    Stage.CANARY: frozenset({Stage.LIVE, Stage.REJECTED}),
    Stage.LIVE: frozenset({Stage.RETIRED}),
    Stage.RETIRED: frozenset({Stage.LIVE, Stage.REJECTED}),
    Stage.REJECTED: frozenset(),
}
"""Stage → the stages that may follow it."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
  model TEXT NOT NULL, version INTEGER NOT NULL, stage TEXT NOT NULL, kind TEXT NOT NULL, digest TEXT NOT NULL,
  manifest TEXT, training_id TEXT NOT NULL, metrics TEXT NOT NULL, threshold REAL NOT NULL, created_s REAL NOT NULL,
  PRIMARY KEY (model, version));
CREATE UNIQUE INDEX IF NOT EXISTS versions_one_live ON versions (model) WHERE stage = 'live';
CREATE UNIQUE INDEX IF NOT EXISTS versions_training ON versions (model, training_id, kind) WHERE training_id <> '';
CREATE TABLE IF NOT EXISTS history (
  id INTEGER PRIMARY KEY, model TEXT NOT NULL, version INTEGER NOT NULL, stage TEXT NOT NULL, action TEXT NOT NULL,
  wall_s REAL NOT NULL, at INTEGER, reason TEXT NOT NULL,
  FOREIGN KEY (model, version) REFERENCES versions (model, version));
"""
_WRITING = ".program-"
"""Begins the name of a program's file that is not whole yet."""
_DIGEST = re.compile(r"^[0-9a-f]{64}$")


class Registry:
    """Model versions over an open ledger; `models` is the folder of the programs."""

    def __init__(self, ledger: Ledger, models: Path, clock: Callable[[], float] = time.time) -> None:
        self._ledger, self._models, self._clock = ledger, models, clock
        with ledger.reading() as db:
            db.executescript(_SCHEMA)
        for unfinished in models.glob(
            f"{_WRITING}*"
        ):  # of a process that was killed: the ledger's lock says it is gone
            unfinished.unlink(missing_ok=True)

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
        """A new candidate; the same training and kind (or, by hand, the same program) give the version there is.

        Raises:
            StoreError: the program can not be written.
        """
        digest = self._keep(program)
        with self._ledger.transaction() as db:
            same, value = ("training_id", training_id) if training_id else ("digest", digest)
            found = db.execute(
                f"SELECT version FROM versions WHERE model = ? AND kind = ? AND {same} = ?", (model, kind, value)
            ).fetchone()
            if found:
                return _load(db, model, found[0])
            version = db.execute(
                "SELECT coalesce(max(version), 0) + 1 FROM versions WHERE model = ?", (model,)
            ).fetchone()[0]
            made = None if manifest is None else json.dumps(asdict(manifest))
            now = self._clock()
            db.execute(
                "INSERT INTO versions VALUES (?,?,?,?,?,?,?,?,?,?)",
                (model, version, Stage.CANDIDATE, kind, digest, made, training_id, json.dumps(metrics), threshold, now),
            )
            _remember(db, (model, version, Stage.CANDIDATE, "register", now, at, "registered"))
            data = {"kind": kind, "digest": digest, "training_id": training_id, "metrics": metrics}
            self._ledger.insert(db, [_event("model.registered", model, version, now, at, data)])
            return _load(db, model, version)

    def models(self) -> list[str]:
        """Names of all models, sorted."""
        with self._ledger.reading() as db:
            return [r[0] for r in db.execute("SELECT DISTINCT model FROM versions ORDER BY model")]

    def versions(self, model: str) -> list[ModelVersion]:
        """All versions of a model, oldest first; empty if there is no such model."""
        with self._ledger.reading() as db:
            found = db.execute("SELECT version FROM versions WHERE model = ? ORDER BY version", (model,)).fetchall()
            return [_load(db, model, v) for (v,) in found]

    def get(self, model: str, version: int) -> ModelVersion:
        """One version.

        Raises:
            UnknownModel, UnknownVersion: there is none.
        """
        with self._ledger.reading() as db:
            return _load(db, model, version)

    def live(self, model: str) -> ModelVersion | None:
        """The live version; None before the first promotion."""
        with self._ledger.reading() as db:
            found = _live_version(db, model)
            return None if found is None else _load(db, model, found)

    def program(self, digest: str) -> bytes:
        """A program's bytes.

        Raises:
            StoreError: the file is missing, or its content is not what its name says.
        """
        path = self._path(digest)
        try:
            program = path.read_bytes()
        except OSError as err:
            raise StoreError(f"program {path}: {err.strerror}; restore the file, or train again") from err
        if hashlib.sha256(program).hexdigest() != digest:
            raise StoreError(f"program {path} is damaged (its hash differs): restore the file, or train again")
        return program

    def digests_in_use(self) -> list[str]:
        """Programs of every version that is not retired or rejected."""
        gone = (Stage.RETIRED, Stage.REJECTED)
        with self._ledger.reading() as db:
            return [d for (d,) in db.execute("SELECT DISTINCT digest FROM versions WHERE stage NOT IN (?, ?)", gone)]

    def start_canary(self, model: str, version: int, *, reason: str, at: int | None = None) -> ModelVersion:
        """Candidate → canary.

        Raises:
            Conflict: its stage does not allow it.
        """
        return self._change(model, version, Stage.CANARY, ("canary", reason, at))

    def reject(self, model: str, version: int, *, reason: str, at: int | None = None) -> ModelVersion:
        """Candidate, canary or retired → rejected, for good.

        Raises:
            Conflict: it is live (roll back first).
        """
        return self._change(model, version, Stage.REJECTED, ("reject", reason, at))

    def promote(self, model: str, version: int, *, reason: str, at: int | None = None) -> ModelVersion:
        """Candidate, canary or retired → live; the live version retires in the same transaction.

        Raises:
            Conflict: it was rejected.
        """
        return self._change(model, version, Stage.LIVE, ("promote", reason, at))

    def rollback(self, model: str, *, reason: str, at: int | None = None, version: int | None = None) -> ModelVersion:
        """Live → retired, and live again what it had replaced. Gives the version that is live then.

        A version that was itself rolled back is never come back to, so repeated roll backs go ever further back.

        Args:
            model: name of the model.
            reason: why, for the history.
            at: event time, µs UTC.
            version: the version to roll back from. With it a retry is safe: if another is live, that one is given.

        Raises:
            UnknownModel: there is none of that name.
            Conflict: nothing is live, or it replaced nothing.
        """
        with self._ledger.transaction() as db:
            current = _live_version(db, model)
            if current is None:
                _known_versions(db, model)
                raise Conflict(f"model {model!r} has no live version to roll back: promote one")
            if version is not None and version != current:
                return _load(db, model, current)
            previous = _replaced_last(db, model)
            if previous is None:
                raise Conflict(f"{model}/{current} replaced no version: there is nothing to roll back to")
            self._move(db, (model, current), Stage.RETIRED, ("rollback", reason, at))
            self._move(db, (model, previous), Stage.LIVE, ("rollback", reason, at))
            return _load(db, model, previous)

    def _change(self, model: str, version: int, stage: Stage, why: tuple[str, str, int | None]) -> ModelVersion:
        with self._ledger.transaction() as db:
            if _load(db, model, version).stage is not stage:
                current = _live_version(db, model)
                if stage is Stage.LIVE and current is not None:
                    _allow(_load(db, model, version), stage)
                    action, _, at = why
                    self._move(db, (model, current), Stage.RETIRED, (action, f"replaced by version {version}", at))
                self._move(db, (model, version), stage, why)
            return _load(db, model, version)

    def _move(
        self, db: sqlite3.Connection, which: tuple[str, int], stage: Stage, why: tuple[str, str, int | None]
    ) -> None:
        """The one place that changes a stage; `why` is (action, reason, at)."""
        (model, version), (action, reason, at), now = which, why, self._clock()
        before = _load(db, model, version)
        _allow(before, stage)
        db.execute("UPDATE versions SET stage = ? WHERE model = ? AND version = ?", (stage, model, version))
        _remember(db, (model, version, stage, action, now, at, reason))
        data = {"from": before.stage.value, "to": stage.value, "action": action, "reason": reason}
        self._ledger.insert(db, [_event(f"model.{_PAST[action, stage]}", model, version, now, at, data)])

    def _keep(self, program: bytes) -> str:
        """Write a program under its hash, atomically; nothing to do if it is there and sound."""
        digest = hashlib.sha256(program).hexdigest()
        path = self._path(digest)
        try:
            if path.exists() and path.read_bytes() == program:
                return digest
            self._models.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._models, prefix=_WRITING, delete=False) as file:
                file.write(program)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, path)
            sync_folder(self._models)
        except OSError as err:
            raise StoreError(f"program {path} can not be written: {err}; free some disk space") from err
        return digest

    def _path(self, digest: str) -> Path:
        if not _DIGEST.match(digest):
            raise StoreError(f"{digest!r} is no program's digest: 64 hexadecimal digits are wanted")
        return self._models / f"{digest}.pt2"


_PAST = {
    ("canary", Stage.CANARY): "canary_started",
    ("reject", Stage.REJECTED): "rejected",
    ("promote", Stage.LIVE): "promoted",
    ("promote", Stage.RETIRED): "retired",
    ("rollback", Stage.RETIRED): "rolled_back",
    ("rollback", Stage.LIVE): "restored",
}
"""(action, stage it led to) → the event's verb."""


def _allow(version: ModelVersion, stage: Stage) -> None:
    if stage not in TRANSITIONS[version.stage]:
        allowed = ", ".join(sorted(TRANSITIONS[version.stage])) or "nothing"
        raise Conflict(
            f"{version.model}/{version.version} is {version.stage}, which can become {allowed}, not {stage}: "
            "`raymill models` shows the versions"
        )


def _known_versions(db: sqlite3.Connection, model: str) -> list[int]:
    known = [v for (v,) in db.execute("SELECT version FROM versions WHERE model = ? ORDER BY version", (model,))]
    if not known:
        raise UnknownModel(f"model {model!r} has no version: `raymill models` lists what there is")
    return known


def _load(db: sqlite3.Connection, model: str, version: int) -> ModelVersion:
    row = db.execute("SELECT * FROM versions WHERE model = ? AND version = ?", (model, version)).fetchone()
    if row is None:
        raise UnknownVersion(f"model {model!r} has no version {version}, it has {_known_versions(db, model)}")
    history = db.execute(
        "SELECT stage, wall_s, at, reason FROM history WHERE model = ? AND version = ? ORDER BY id", (model, version)
    )
    return ModelVersion(
        model=model,
        version=version,
        stage=Stage(row[2]),
        kind=row[3],
        digest=row[4],
        manifest=None if row[5] is None else _manifest(json.loads(row[5])),
        training_id=row[6],
        metrics=json.loads(row[7]),
        threshold=row[8],
        created_s=row[9],
        history=tuple({"stage": s, "wall_s": w, "at": a, "reason": r} for s, w, a, r in history),
    )


def _manifest(found: dict[str, Any]) -> Manifest:
    return Manifest(**{**found, "features": tuple(found["features"])})


def _live_version(db: sqlite3.Connection, model: str) -> int | None:
    found = db.execute("SELECT version FROM versions WHERE model = ? AND stage = 'live'", (model,)).fetchone()
    return None if found is None else int(found[0])


def _replaced_last(db: sqlite3.Connection, model: str) -> int | None:
    """The version that was retired last by a promotion (not by a roll back), and still is."""
    found = db.execute(
        "SELECT v.version FROM versions v JOIN history h ON h.id = "
        "(SELECT max(id) FROM history WHERE model = v.model AND version = v.version) "
        "WHERE v.model = ? AND v.stage = 'retired' AND h.action = 'promote' ORDER BY h.id DESC LIMIT 1",
        (model,),
    ).fetchone()
    return None if found is None else int(found[0])


def _remember(db: sqlite3.Connection, row: tuple[str, int, Stage, str, float, int | None, str]) -> None:
    db.execute("INSERT INTO history (model, version, stage, action, wall_s, at, reason) VALUES (?,?,?,?,?,?,?)", row)


def _event(kind: str, model: str, version: int, now: float, at: int | None, data: dict[str, Any]) -> Event:
    return Event(kind=kind, subject=f"{model}/{version}", pipeline=model, at=at, wall_s=now, data=data)
