"""The waiting line before a model, pure: no timer; a batch is whatever waits when the model comes free.

Invariants: first come, first served; a request is never split; the line never holds more than `max_rows` rows
(a request longer than that is taken when the line is empty).
"""

from __future__ import annotations

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

    def take(self) -> list[T]:
        """The next batch: requests from the front while they fit `max_batch_rows`, at least one if any waits."""
        batch: list[T] = []
        rows = 0
        while self._waiting and (not batch or rows + len(self._waiting[0]) <= self.max_batch_rows):
            request = self._waiting.popleft()
            rows += len(request)
            batch.append(request)
        self._rows -= rows
        return batch
