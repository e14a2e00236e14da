"""Which parts of a table are merged, and which files nobody needs any more: facts in, decision out.

Invariants
- Merging keeps every row once; parts are merged with those of about their own size, so that a row is written again
  a few times in its life and not at every merge.
- A file is unneeded only if no version that is kept refers to it, and it is older than the grace.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

MERGED_ROWS = 1 << 20
"""Most rows of a merged part: one row group, each column of it one page."""
MERGED_BYTES = 256 << 20
"""Most bytes of a merged part."""
FEWEST = 8
"""Parts of about one size that are worth a merge; each such size is this many times the one below."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stored file of a version."""

    path: str
    """Below the table."""
    rows: int
    """How many."""
    size: int
    """Bytes."""
    order: Any
    """Where it belongs among the parts: its least event time, or when it was written."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a table."""

    number: int
    """Its number."""
    made_ms: int
    """When it was committed, wall time."""
    removes: bool
    """Whether its commit took parts away from the version before."""


def merges(parts: Iterable[Part], *, fewest: int = FEWEST) -> list[list[Part]]:
    """Groups of parts, each to become one, in the order of their rows.

    Args:
        parts: what a version consists of.
        fewest: parts of about one size that are merged; 2: whatever fits together, of any size.
    """
    small = [p for p in parts if 2 * p.rows <= MERGED_ROWS and 2 * p.size <= MERGED_BYTES]
    by_hand = fewest <= 2
    small.sort(key=lambda p: (0 if by_hand else _magnitude(p.rows), p.order, p.path))
    found = []
    for _, alike in groupby(small, key=lambda p: 0 if by_hand else _magnitude(p.rows)):
        together = list(alike)
        if len(together) >= fewest:
            found += [group for group in _packed(together) if len(group) > 1]
    return found


def _magnitude(rows: int) -> int:
    magnitude = 0
    while rows >= FEWEST:
        rows //= FEWEST
        magnitude += 1
    return magnitude


def _packed(parts: Sequence[Part]) -> list[list[Part]]:
    groups: list[list[Part]] = []
    rows = size = 0
    for part in parts:
        if not groups or rows + part.rows > MERGED_ROWS or size + part.size > MERGED_BYTES:
            groups.append([])
            rows = size = 0
        groups[-1].append(part)
        rows, size = rows + part.rows, size + part.size
    return groups


def kept_versions(versions: Iterable[Version], pins: Collection[int], since_ms: int) -> list[int]:
    """Versions whose files cover those of every version to keep: pinned, newest, or current since `since_ms`.

    Where no commit between two versions took parts away, the later one has all files of the earlier one.
    """
    ordered = sorted(versions, key=lambda v: v.number)
    ends = [after.made_ms for after in ordered[1:]]
    kept: list[int] = []
    for version, end in zip(ordered, [*ends, None], strict=True):
        if version.removes or not kept:
            kept.append(-1)
        if end is None or end >= since_ms or version.number in pins:
            kept[-1] = version.number
    return [v for v in kept if v >= 0]


def unneeded(files: Mapping[str, int], needed: Collection[str], before_ms: int) -> list[str]:
    """Files, by path and time of writing, that no kept version refers to and that were written before `before_ms`.

    A younger file may belong to a commit that is on its way.
    """
    return sorted(path for path, written_ms in files.items() if path not in needed and written_ms < before_ms)
