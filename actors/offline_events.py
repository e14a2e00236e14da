"""What the offline join reads: the rows that ask, and a source's events, block by block where they are stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.entities import Numbered, key_hashes, number
from raymill.actors.evaluate import Ints
from raymill.actors.feature_plan import SourcePlan, ViewPlan
from raymill.actors.parts import Block, Parts, Rows
from raymill.runtime.errors import ContractError

LARGE = 1 << 18
"""Events from which on several threads pay."""
MOST = 2**31 - 1
"""Events of one join; they are numbered by 31 bits."""
NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Asked:
    """The rows that want features."""

    rows: pa.Table
    at: Ints
    """Moment of each."""
    order: Ints
    """Their numbers in the order of the moments."""


class Events:
    """A source's events: times and entities block by block, values as far as they are needed."""

    def __init__(self, rows: pa.Table | Parts, source: SourcePlan, pool: ThreadPoolExecutor, threads: int) -> None:
        self.rows: Rows | Parts = Rows(rows) if isinstance(rows, pa.Table) else rows
        self.source = source
        self.blocks = [b for b in self.rows.blocks() if b.rows]
        self.firsts = list(accumulate((b.rows for b in self.blocks), initial=0))
        if len(self) > MOST:
            raise ContractError(f"{len(self)} rows of source {source.name!r} are too many for one join: use `stream`")
        self.threads = threads if len(self) >= LARGE else 1
        self._pool = pool
        self.rows.check([source.time, *([source.known_at] if source.known_at else [])])
        self.time = self._moments(source.time)
        self.known = self._moments(source.known_at) if source.known_at else self.time
        self._hashes = NONE
        self._hashed = np.zeros(0, dtype=np.bool_)

    time: list[Ints]
    """Event time of every block's events, NEVER for null; where it is stored, on no 8-byte boundary."""
    known: list[Ints]
    """Known-at of every block's events, NEVER for null; the event time for a source without."""

    def _moments(self, name: str) -> list[Ints]:
        return self.at_once(lambda b: self.rows.numbers(b, name), self.blocks)

    def __len__(self) -> int:
        return self.firsts[-1]

    def numbered(self, view: ViewPlan, rows: pa.Table) -> Numbered:
        """Entities of the events and of the rows that ask."""
        return number(view, self.rows, rows)

    def hashes_of(self, tied: npt.NDArray[np.bool_]) -> Ints:
        """Hashes of the keys of the events marked, 0 for others that no view asked for."""
        if not len(self._hashes):
            self._hashes = np.zeros(len(self), dtype=np.int64)
            self._hashed = np.zeros(len(self), dtype=np.bool_)
        chosen = np.flatnonzero(tied & ~self._hashed)
        for block in self.blocks:
            a, b = np.searchsorted(chosen, [block.first, block.first + block.rows])
            if a < b:
                keys = self.rows.take(block, self.source.key, chosen[a:b])
                self._hashes[chosen[a:b]] = key_hashes(keys, self.source.key, self.source.dtypes)
        self._hashed[chosen] = True
        return self._hashes

    def at_once(self, work: Callable[[Any], Any], parts: Iterable[Any]) -> list[Any]:
        """The work on every part, several at a time; the work itself must not call it again."""
        parts = list(parts)
        alone = len(parts) < 2 or self.threads < 2
        return [work(p) for p in parts] if alone else list(self._pool.map(work, parts))

    def ahead(self, work: Callable[[Block], Any]) -> Iterator[Any]:
        """The work on every block, in order, no more ahead of who asks than there are threads."""
        blocks = deque(self.blocks)
        if len(blocks) < 2 or self.threads < 2:
            yield from map(work, blocks)
            return
        waiting: deque[Future[Any]] = deque()
        while blocks or waiting:
            while blocks and len(waiting) <= self.threads:
                waiting.append(self._pool.submit(work, blocks.popleft()))
            yield waiting.popleft().result()
