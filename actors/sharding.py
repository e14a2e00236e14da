"""How a join is divided among shards, and which shard does what next; pure.

Invariants
- A piece is one shard's share of the views of one entity: the rows whose entity's hash falls to it. Each row is in
  exactly one piece of each group of views, so the pieces together are the whole answer, each value once.
- A shard has no more than `IN_FLIGHT` pieces at a time: what is not sent waits here, not in its memory.
- A piece whose shard died is sent again, to whichever is free; one that went down with `ATTEMPTS` shards is given up.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from raymill.actors.entities import key_hashes
from raymill.actors.evaluate import Ints
from raymill.actors.feature_plan import FeaturePlan, RequestPlan, ViewPlan
from raymill.runtime.errors import StoreError

IN_FLIGHT = 2
"""Pieces of a shard at a time: one that it works at, and the next."""
ATTEMPTS = 3
"""Shards that a piece may bring down."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A share of a join."""

    views: tuple[str, ...]
    """Views of one source and entity."""
    share: int
    """Which share of their rows."""
    of: int
    """How many there are."""


def divide(plan: FeaturePlan, of: int) -> list[Piece]:
    """Pieces of a plan's event views, `of` shares each."""
    if plan.lookups:
        return [Piece(tuple(v.name for v in plan.event_views), share, of) for share in range(of)]
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for view in plan.event_views:
        groups.setdefault((view.source.name, view.entity), []).append(view.name)
    return [Piece(tuple(views), share, of) for views in groups.values() for share in range(of)]


def part_of(plan: FeaturePlan, views: Sequence[str]) -> tuple[FeaturePlan, Ints]:
    """The plan of some of its views, and the numbers of their features in the whole."""
    chosen = [(v, first) for v, first in plan.places if v.name in views]
    columns = [c for v, first in chosen for c in range(first, first + len(v.features))]
    of_events = any(isinstance(v, ViewPlan) for v, _ in chosen)
    part = replace(plan, views=tuple(v for v, _ in chosen), lookups=plan.lookups if of_events else ())
    return part, np.array(columns, dtype=np.int64)


def of_requests(plan: FeaturePlan) -> list[str]:
    """Names of the views that are computed from the rows alone."""
    return [v.name for v in plan.views if isinstance(v, RequestPlan)]


def rows_of(piece: Piece, plan: FeaturePlan, rows: pa.Table) -> Ints:
    """Numbers of the piece's rows, ascending; where entities are looked up first, every so many of them."""
    view = next(v for v in plan.event_views if v.name in piece.views)
    if piece.of == 1 or plan.lookups:
        return np.arange(piece.share, len(rows), piece.of)
    hashes = key_hashes(rows.select(list(view.entity)), view.entity, view.source.dtypes)
    return np.flatnonzero((hashes % piece.of) == piece.share)


class Dispatch:
    """Which shard has which pieces; what to send next."""

    def __init__(self, pieces: Sequence[Piece], shards: int) -> None:
        self._waiting = deque(pieces)
        self._working: list[list[Piece]] = [[] for _ in range(shards)]
        self._lost: Counter[Piece] = Counter()

    @property
    def finished(self) -> bool:
        """Whether all pieces are done."""
        return not self._waiting and not any(self._working)

    def next(self) -> list[tuple[int, Piece]]:
        """Shard and piece of what to send now; taken as sent."""
        sent = []
        for depth in range(1, IN_FLIGHT + 1):  # everybody has one before anybody has two
            for shard, working in enumerate(self._working):
                if self._waiting and len(working) < depth:
                    piece = self._waiting.popleft()
                    working.append(piece)
                    sent.append((shard, piece))
        return sent

    def done(self, shard: int, piece: Piece) -> None:
        """A piece is done."""
        self._working[shard].remove(piece)

    def lost(self, shard: int) -> None:
        """A shard died with what it had; another one may be in its place.

        Raises:
            StoreError: a piece has brought down too many.
        """
        for number, piece in enumerate(self._working[shard]):
            self._lost[piece] += number == 0  # the first was under way, the others only waited
            if self._lost[piece] >= ATTEMPTS:
                raise StoreError(
                    f"share {piece.share} of {piece.of} of views {', '.join(piece.views)} was under way on "
                    f"{ATTEMPTS} shards that died: give the join more shards or memory (see `raymill doctor`)"
                )
        self._waiting.extendleft(reversed(self._working[shard]))
        self._working[shard] = []
