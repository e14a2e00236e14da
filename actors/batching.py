"""The waiting line before a model, pure: no timer; a batch is whatever waits when the model comes free.

Invariants: first come, first served; a request is never split; the line never holds more than `max_rows` rows
(a request longer than that is taken when the line is empty).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sized
from typing import Generic, TypeVar

from raymill.runtime.errors import Overloaded

T = TypeVar("T", bound=Sized)


class WaitingLine(Generic[T]):
    """Requests that wait, each as long as its number of rows."""

    def __init__(self, *, max_batch_rows: int, max_rows: int) -> None:
        self.max_batch_rows = max_batch_rows
        self.max_rows = max_rows
        self._waiting: deque[T] = deque()
        self._rows = 0

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return self._rows

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, request: T) -> None:
        """Put a request at the end.

        Raises:
            Overloaded: the line is full; nothing was taken.
        """
        if self._waiting and self._rows + len(request) > self.max_rows:
            raise Overloaded(
                f"{self._rows} rows wait before the model, {self.max_rows} may: send the request again in a moment"
            )
        self._waiting.append(request)
        self._rows += len(request)

    def take(self, most: float = math.inf) -> list[T]:
        """The next batch: requests from the front while `max_batch_rows` and `most` rows hold them, at least one."""
        batch: list[T] = []
        rows, most = 0, min(most, self.max_batch_rows)
        while self._waiting and (not batch or rows + len(self._waiting[0]) <= most):
            request = self._waiting.popleft()
            rows += len(request)
            batch.append(request)
        self._rows -= rows
        return batch


class Pace:
    """How long a batch takes, learned from those before: says where one is computed and how large it may be.

    Batches are told apart by the power of two of their rows. One of a size never seen is taken to cost per row what
    the nearest smaller size does; if there is none, it is long.
    """

    SHORT_S = 0.003
    """For how long a batch may hold the event loop up: about what one turn of it takes with 100 busy callers."""
    _WEIGHT = 0.1
    _FORGET = 0.01
    """By how much the quickest of a size is less believed after a second of batches: longer than another thread keeps
    Python to itself, as one does that loads a model."""
    _MOST_S = 0.01
    """Up to here a batch counts in full, above it as four times what was known: a pause of the process is not its
    doing."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._rows: dict[int, float] = {}
        self._quickest: dict[int, float] = {}

    def is_short(self, rows: int) -> bool:
        """Whether a batch of so many rows is expected to take less than `SHORT_S`."""
        size = rows.bit_length()
        known = self._seconds.get(size)
        if known is None:
            smaller = max((s for s in self._seconds if s < size), default=None)
            known = math.inf if smaller is None else self._seconds[smaller] * 2 ** (size - smaller)
        return known <= self.SHORT_S

    def note(self, rows: int, cpu_s: float, wall_s: float = 0.0) -> float:
        """A batch of so many rows took so much time on a core, and so much of the wall; returns what it counts for.

        Waiting for a core is not the batch's doing, waiting for a device or another server is: that it does each time.
        So of the wall's time the quickest of late counts.
        """
        size = rows.bit_length()
        quickest = min(wall_s, self._quickest.get(size, wall_s) * (1 + self._FORGET * wall_s))
        self._quickest[size] = quickest
        seconds = max(cpu_s, quickest)
        self._rows[size] = self._rows.get(size, rows) + self._WEIGHT * (rows - self._rows.get(size, rows))
        before = self._seconds.get(size, seconds)
        self._seconds[size] = before + self._WEIGHT * (min(seconds, max(self._MOST_S, 4 * before)) - before)
        return seconds

    def rows_within(self, seconds: float) -> float:
        """Rows that are expected to take no longer together: at least 1, infinitely many before anything is known.

        It goes from the largest size that does, in a straight line to the next larger one that is known; where none is,
        each further row is taken to cost as much as one of those, or twice as many rows are tried: with a cost a batch,
        however few its rows, they may take hardly longer.
        """
        fitting = [size for size, took in self._seconds.items() if took <= seconds]
        if not fitting:
            return 1 if self._seconds else math.inf
        size = max(fitting)
        rows, took = self._rows[size], self._seconds[size]
        beyond = min((s for s in self._seconds if s > size), default=None)
        if beyond is None:
            return max(2 * rows, rows * seconds // max(took, 1e-9)) // 1
        more = (self._rows[beyond] - rows) * (seconds - took) / (self._seconds[beyond] - took)
        return max(1, (rows + more) // 1)
