"""Where a join that is larger than memory is cut in time, and which events must be kept for later; pure.

Invariant: what a moment after the cut can need of the events before it is kept, so that the slices together answer what
the whole would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import boolean, int64, njit, types, void

from raymill.actors.evaluate import Ints
from raymill.actors.windows import NEVER

_INTS = types.Array(int64, 1, "C", readonly=True)


@dataclass(frozen=True)
class Span:
    """Events that lie together in a file."""

    first_us: int
    """Their smallest event time."""
    last_us: int
    """Their largest."""
    size_bytes: float
    """What they take in memory while they are joined."""


def cut(moments: Ints, spans: Sequence[Span], since: int, most_rows: int, most_bytes: float) -> list[int]:
    """Ends of the slices, ascending, the last one the last moment: slice k goes from after end k − 1 to its own.

    Args:
        moments: of the rows that ask, sorted.
        spans: the events; taken as evenly spread between their first and last.
        since: events before are not read.
        most_rows: rows that ask, of one slice.
        most_bytes: events of one slice.
    """
    last = int(moments[-1])
    ends = {last, *moments[most_rows - 1 :: most_rows].tolist()}
    first, end = np.array([(s.first_us - 1, s.last_us) for s in spans], dtype=np.int64).reshape(-1, 2).T
    steepness = np.array([s.size_bytes for s in spans]) / (end - first)
    edges = np.unique(np.concatenate([first, end, [last]]))
    slope = np.zeros(len(edges))
    np.add.at(slope, np.searchsorted(edges, first), steepness)
    np.add.at(slope, np.searchsorted(edges, end), -steepness)
    # How much lies up to each edge; between edges it grows in a straight line.
    below = np.concatenate([[0.0], np.cumsum(np.cumsum(slope)[:-1] * np.diff(edges))])
    begun = float(np.interp(since, edges, below))
    marks = np.arange(begun + most_bytes, float(np.interp(last, edges, below)), most_bytes)
    ends |= {int(t) for t in np.interp(marks, below, edges)}
    return sorted(t for t in ends if since < t <= last)


@njit(void(_INTS, int64, _INTS, _INTS, int64, int64, boolean[::1]), cache=True, nogil=True)
def keep_needed(codes: Ints, groups: int, time: Ints, known: Ints, cutoff: int, kept_us: int, keep: np.ndarray) -> None:
    """Mark the events that a moment after `cutoff` can need.

    Those with event time > cutoff − `kept_us`; of a view of newest values without max age (`kept_us` is negative then,
    as in `windows.prune`) also those not older than their entity's newest that is known at `cutoff`.

    Args:
        codes: entity of each event, −1 for none.
        groups: how many there are.
        time: event times.
        known: known-at, NEVER for never.
        cutoff: see there.
        kept_us: `ViewPlan.kept_us`.
        keep: set for those needed.
    """
    newest = np.full(groups, NEVER, np.int64)
    if kept_us < 0:
        kept_us = -kept_us - 1
        for i in range(len(codes)):
            g = codes[i]
            if g >= 0 and max(time[i], known[i]) <= cutoff and (newest[g] == NEVER or time[i] > newest[g]):
                newest[g] = time[i]
        unbounded = True
    else:
        unbounded = False
    for i in range(len(codes)):
        g = codes[i]
        if g >= 0 and known[i] != NEVER:
            old = unbounded and newest[g] != NEVER and time[i] < newest[g]
            if time[i] > cutoff - kept_us or (unbounded and not old):
                keep[i] = True
