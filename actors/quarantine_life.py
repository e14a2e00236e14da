"""The life of a quarantined row: what may be done to it, and what it is afterwards; pure.

Invariants
- An entry is changed by `after` alone; its steps are numbered, so a step that is told twice counts once.
- A landed or discarded entry stays so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import orjson

from raymill.runtime.errors import Conflict, ContractError
from raymill.runtime.expressions import digest


class State(StrEnum):
    """Where an entry is in its life."""

    OPEN = "open"
    PENDING = "pending"
    """A reingest took it and has not told its outcome; the next reingest brings that to its end first."""
    REINGESTED = "reingested"
    DISCARDED = "discarded"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing follows."""
        return self in (State.REINGESTED, State.DISCARDED)


class Step(StrEnum):
    """What was done to an entry."""

    FIXED = "fixed"
    BEGUN = "begun"
    REFUSED = "refused"
    LANDED = "landed"
    DISCARDED = "discarded"


_LIFE = {
    (State.OPEN, Step.FIXED): State.OPEN,
    (State.OPEN, Step.BEGUN): State.PENDING,
    (State.OPEN, Step.DISCARDED): State.DISCARDED,
    (State.PENDING, Step.REFUSED): State.OPEN,
    (State.PENDING, Step.LANDED): State.REINGESTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One quarantined row as it now stands."""

    id: str
    """Its name for ever: a hash of where it came from and what it was."""
    source: str
    """Source that refused it."""
    batch_id: str
    """Batch in which it came."""
    row: str
    """The row, JSON: as it came, or as it was fixed since."""
    reason: str
    """Why it was refused, the last time."""
    state: State = State.OPEN
    """Where in its life it is."""
    steps: int = 0
    """How often something was done to it."""
    landing: str = ""
    """Batch of the reingest that has it or had it last."""
    note: str = ""
    """Why it was discarded."""
    wall_s: float
    """When it came, seconds since 1970."""
    at: int | None
    """Event time of its batch, µs UTC."""

    def document(self) -> dict[str, Any]:
        """JSON values, the row as an object."""
        named = {n: getattr(self, n) for n in ("id", "source", "batch_id", "reason", "state", "landing", "note")}
        return named | {"wall_s": self.wall_s, "at": self.at, "row": orjson.loads(self.row)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One step of an entry's life, as the log holds it."""

    id: str
    """Entry."""
    number: int
    """Which step of the entry's life it is, from 1."""
    step: Step
    """What was done."""
    row: str = ""
    """The whole row, JSON, where it was fixed."""
    batch_id: str = ""
    """The reingest's batch, where there is one."""
    reason: str = ""
    """Why it was refused or discarded."""


def after(entry: Entry, done: Done) -> Entry:
    """The entry after a step.

    Raises:
        Conflict: the entry's state does not allow it.
    """
    state = _LIFE.get((entry.state, done.step))
    if state is None:
        raise Conflict(f"quarantined row {entry.id} is {entry.state}: it can not be {done.step}")
    now = replace(entry, state=state, steps=done.number, landing=done.batch_id or entry.landing)
    if done.step is Step.FIXED:
        return replace(now, row=done.row)
    if done.step is Step.REFUSED:
        return replace(now, reason=done.reason)
    return replace(now, note=done.reason) if done.step is Step.DISCARDED else now


def next_step(entry: Entry, step: Step, **facts: str) -> Done:
    """The step as the next one of the entry's life; errors as in `after`."""
    done = Done(id=entry.id, number=entry.steps + 1, step=step, **facts)
    after(entry, done)
    return done


def lived(entries: Iterable[Entry], log: Iterable[Done]) -> list[Entry]:
    """The entries after all that was done to them, in their order."""
    steps: dict[str, dict[int, Done]] = {}
    for done in log:
        steps.setdefault(done.id, {})[done.number] = done
    found = []
    for entry in entries:
        for _, done in sorted(steps.get(entry.id, {}).items()):
            entry = after(entry, done)
        found.append(entry)
    return found


def patched(entry: Entry, changes: Mapping[str, Any], declared: Collection[str] = ()) -> str:
    """The entry's row, JSON, with other values in some columns: its own, and those its source declares by now.

    Raises:
        ContractError: there is no such column.
    """
    row = orjson.loads(entry.row)
    columns = row.keys() | set(declared)
    strange = sorted(changes.keys() - columns)
    if strange:
        raise ContractError(
            f"quarantined row {entry.id} of source {entry.source!r} has no column {strange}: it has {sorted(columns)}"
        )
    return orjson.dumps(row | dict(changes)).decode()


def entry_ids(
    source: str, batch_id: str, pairs: Iterable[tuple[str, str]], held: Counter[tuple[str, str]]
) -> list[str]:
    """Ids of (row, reason) pairs of a batch that holds some of the same already: equal pairs are numbered."""
    seen = held.copy()
    ids = []
    for pair in pairs:
        ids.append(digest(source, batch_id, *pair, seen[pair]))
        seen[pair] += 1
    return ids


def landing_id(entries: Iterable[Entry]) -> str:
    """Batch id of a reingest: the same rows in the same state of their life make the same batch."""
    return f"quarantine-{digest(sorted((e.id, e.steps) for e in entries))}"
