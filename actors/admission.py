"""Which requests are refused at once because they could not be answered in time; pure.

A line that is long for a moment does no harm: it empties. One that stays long makes everybody late, however short the
line was before. So nothing is refused before callers have waited for `MARGIN` times the latency they are promised, all
through `PATIENCE` times that latency (the standing queue of CoDel: Nichols and Jacobson, "Controlling queue delay",
ACM Queue 10(5), 2012). From then on the line may hold what is worked off in time (Little's law, by the pace of the
turns themselves, reading and writing included), and who has waited too long already leaves it, from the front. It is
over when nobody was refused for a while.

Invariant: nobody is refused while the line is empty, nor before `LEAST_TURNS` turns were late one after the other,
for `LEAST_PATIENCE_S`.
"""

from __future__ import annotations

import math

MARGIN = 2.0
"""Times the latency promised: later than this, callers are told to come again instead, if it lasts."""
PATIENCE = 5.0
"""Times the latency promised, for which it must last."""
LEAST_PATIENCE_S = 0.25
"""At least so long: a pause of the process is no overload."""
LEAST_TURNS = 5
"""Nor are a few slow turns, as when a model computes for the first time."""
FEW_TURNS = 4
"""For large requests, and slow models: a latency that nobody can have is no reason to send nearly all away."""
CALM = 4.0
"""Times as long nobody must have been refused, until it is over: to find out anew makes callers late again."""
SHARE = 0.95
"""Of the latency promised, what is given out: a line that just fits leaves no room for a slow turn."""
MOST_RETRY_AFTER_S = 30
_MEMORY_S = 0.5
"""Over how long the pace is averaged."""


class Admission:
    """To the line before one model; times are of any clock that goes on evenly, in seconds."""

    def __init__(self, target_s: float = math.inf) -> None:
        self.target_s = target_s
        """Latency that callers are promised."""
        self.is_overloaded = False
        self.most_rows = math.inf
        """Rows that may wait: where more would, `refuses` says whether they may."""
        self.patience_s = math.inf
        """Who has waited for longer can not be answered in time."""
        self.retry_after_s = 1
        """When who is refused is to come again: when those who were refused lately could have been answered."""
        self._late_since_s = self._refused_s = -math.inf
        self._refused_rows, self._second_s = 0, -math.inf
        self._rows = self._seconds = self._turns = 0.0
        """Of turns of the last half second, the older the less."""
        self._late_turns = 0

    def turned(self, now_s: float, rows: int, seconds: float, waited_s: float) -> None:
        """A turn is over: so many rows were answered in so long, the first caller among them after `waited_s`."""
        if not self.is_overloaded and waited_s <= MARGIN * self._in_time_s(seconds):  # nearly always
            self._late_since_s = -math.inf
            return
        if self._late_since_s == -math.inf:
            self._late_since_s = now_s
            self._forget()
        kept = max(0.0, 1 - seconds / _MEMORY_S)
        self._rows, self._turns = kept * self._rows + rows, kept * self._turns + 1
        self._seconds = kept * self._seconds + max(seconds, 1e-9)
        if not self.is_overloaded:
            self._late_turns += 1
            if now_s - self._late_since_s < self._lasts_s or self._late_turns < LEAST_TURNS:
                return
            self.is_overloaded, self._refused_s = True, now_s
        elif now_s - self._refused_s > CALM * self._lasts_s:
            self._end()
            return
        self.patience_s = self._in_time_s(self._seconds / self._turns)
        self.most_rows = max(self._rows / self._seconds * SHARE * self.patience_s - rows, 1)

    def refuses(self, now_s: float, rows: int) -> bool:
        """Whether a request of so many rows, more than `most_rows` with those that wait, has to come again."""
        if now_s - self._refused_s > CALM * self._lasts_s:
            self._end()
            return False
        self._refused_s = now_s
        if now_s - self._second_s > 1:
            owed_s = self._refused_rows * self._seconds / max(self._rows, 1) if now_s - self._second_s < 2 else 0
            self.retry_after_s = min(max(math.ceil(owed_s), 1), MOST_RETRY_AFTER_S)
            self._refused_rows, self._second_s = 0, now_s
        self._refused_rows += rows
        return True

    def _in_time_s(self, turn_s: float) -> float:
        """Where a turn alone takes longer than callers are promised, they may wait for a few."""
        return self.target_s if turn_s <= self.target_s else FEW_TURNS * turn_s

    @property
    def _lasts_s(self) -> float:
        return max(PATIENCE * self.target_s, LEAST_PATIENCE_S)

    def _end(self) -> None:
        self.is_overloaded, self._late_since_s = False, -math.inf
        self.most_rows = self.patience_s = math.inf
        self.retry_after_s = 1

    def _forget(self) -> None:
        self._rows = self._seconds = self._turns = 0.0
        self._late_turns = 0
