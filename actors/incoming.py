"""What a stream of rows is here: batches with ids that say what is in them, given again until they are acknowledged.

The interface is small, so that each carrier keeps its own positions where it keeps them best:

    open()              reach the carrier; wrong addresses are told here
    next(wait_s)        the next batch, or None if nothing came within that time
    acknowledge(batch)  the lake holds it: it is never given again
    close()

Invariants of every `Stream`
- A batch that was given and not acknowledged is given again, by this process or the one after it, with the same id
  and the same rows. So whoever takes it in under its id takes it in once, whatever was killed in between.
- One batch at a time: `next` gives the same one until it was acknowledged. That, with `MAX_ROWS`, bounds what is under
  way, and what comes faster waits where it came from.
- An entry that can not become a row is in its batch's `rejected` with the reason, and holds nothing up.

Where the positions are: a Redis group remembers what it has delivered to whom (`redis_stream.py`); of files and
Delta versions the lake is asked whether it has their last batch (`directory.py`, `delta_follow.py`). Kafka remembers
no deliveries, but a committed offset carries a text: commit (first offset, text: last offset) before a batch of one
partition is given, and (last + 1, no text) when it is acknowledged; then a batch can be given again as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

IsTaken = Callable[[str], bool]
"""Batch id → whether the lake has that batch of the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows on their way to the lake."""

    batch_id: str
    """The same for the same rows, always."""
    rows: pa.Table
    """The source's columns, unchecked; may be empty."""
    rejected: tuple[tuple[str, str], ...] = ()
    """What can not become rows: (what it was, as JSON; reason)."""
    origin: str = ""
    """JSON that stands for the whole batch if it does not fit the source; empty: its rows stand for themselves."""
    is_live: bool = False
    """Whether its rows are of now, so that the source's `freshness` is held against the present."""
    position: Any = None
    """What the carrier needs to acknowledge it."""


class Stream(Protocol):
    """One source's rows as they come."""

    def open(self) -> None:
        """Reach the carrier.

        Raises:
            StoreError: it can not be reached, or is not there; trying again is safe.
        """

    def next(self, wait_s: float) -> Batch | None:
        """The batch that is to be taken in; None: nothing new came within `wait_s`.

        Raises:
            StoreError: the carrier can not be reached; trying again is safe.
        """

    def acknowledge(self, batch: Batch) -> None:
        """The lake holds the batch.

        Raises:
            StoreError: the carrier can not be reached; trying again, also with the batch given once more, is safe.
        """

    def waiting(self) -> int | None:
        """Entries, files or versions that are not acknowledged yet, as far as was seen; None: the carrier can not say.

        Raises:
            StoreError: the carrier can not be reached; trying again is safe.
        """

    def close(self) -> None:
        """Give connections back; what was not acknowledged stays so."""
