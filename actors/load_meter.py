"""What a replica tells of its last seconds, for `scaling`: how long rows waited in line, and how much it worked.

Cheap on the hot path: an entry in a ring per batch; everything else is done when somebody asks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from raymill.actors.scaling import Load

Clock = Callable[[], float]

WINDOW_S = 3.0
"""What counts as the last seconds."""
_MOST = 2048
"""Batches of the window that are looked at, the newest."""
_LEAST_S = 0.25
"""Shortest time over which the share of work is taken."""


class LoadMeter:
    """Of one replica, all its lanes together."""

    def __init__(
        self, now: Callable[[], float] = time.monotonic, work: Callable[[], float] = time.process_time
    ) -> None:
        """`now` and `work` give seconds: of a clock, and of CPU that this process has used."""
        self._now, self._work = now, work
        self._batches: deque[tuple[float, float, int]] = deque(maxlen=_MOST)
        self._taken: deque[float] = deque(maxlen=_MOST)
        self._asked_s = now()
        self._mark = (self._asked_s, work())
        self._busy = 0.0

    def waited(self, seconds: float, rows: int) -> None:
        """A batch begins; the first of its rows stood in line for so long."""
        self._asked_s = self._now()
        self._batches.append((self._asked_s, seconds, rows))

    def took(self, seconds: float) -> None:
        """A batch was computed in so long."""
        self._taken.append(seconds)

    def reading(self) -> Load:
        """What there is to tell."""
        now, work = self._now(), self._work()
        since_s, before = self._mark
        if now - since_s >= _LEAST_S:
            self._busy = (work - before) / (now - since_s)
            self._mark = (now, work)
        batches = [b for b in self._batches if b[0] > now - WINDOW_S]
        waits = sorted(seconds for _, seconds, _ in batches)
        taken = list(self._taken)
        span = min(WINDOW_S, now - batches[0][0]) if len(batches) == _MOST else WINDOW_S
        return Load(
            delay_s=waits[int(0.95 * (len(waits) - 1))] if waits else 0.0,
            service_s=sum(taken) / len(taken) if taken else 0.0,
            rows_per_s=sum(rows for _, _, rows in batches) / max(span, 1e-3),
            busy=self._busy,
            idle_s=now - self._asked_s,
        )


def as_stats(load: Load) -> dict[str, float]:
    """The form in which Serve carries it: numbers by name."""
    return {name: float(getattr(load, name)) for name in Load.__dataclass_fields__}


def from_stats(stats: dict[str, Any]) -> Load:
    """The load that `as_stats` was made of.

    Raises:
        KeyError: a number is missing.
    """
    return Load(**{name: float(stats[name]) for name in Load.__dataclass_fields__})
