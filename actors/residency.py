"""Which models leave a replica's memory: the one that was not asked for longest first; pure.

Invariants: a busy model stays, and so does the one that is coming in; nothing leaves that need not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A model whose programs are in memory."""

    name: str
    size_bytes: int
    """What its programs take."""
    used_s: float
    """When it was last asked, on any clock."""
    busy: bool
    """Whether callers wait for it."""


def to_unload(residents: Iterable[Resident], *, budget_bytes: int, coming_bytes: int = 0, keep: str = "") -> list[str]:
    """Names of the models to unload, so that what is coming fits the budget; all that may go, if it does not.

    Args:
        residents: what is in memory.
        budget_bytes: what may be.
        coming_bytes: what is about to be loaded.
        keep: the model that it is loaded for.
    """
    residents = list(residents)
    over = sum(r.size_bytes for r in residents) + coming_bytes - budget_bytes
    found = []
    for r in sorted(residents, key=lambda r: r.used_s):
        if over <= 0:
            break
        if not r.busy and r.name != keep and r.size_bytes > 0:
            found.append(r.name)
            over -= r.size_bytes
    return found
