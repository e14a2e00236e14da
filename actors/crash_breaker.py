"""Whether a program is loaded whose load may end the process (a crash in native code, no memory left); pure.

Such a load raises nothing that could be caught, and the next replica would be told to do it again. What is left is a
note of who began it and is no more. One note is no proof: a replica may be killed for a hundred reasons while it
happens to load. So a suspect is tried alone first, in a process that nobody needs: it comes through, and is loaded, or
it has shown what it is, and costs no second replica.

Invariants
- A program that has ended nobody is loaded at once.
- After a death it is loaded by no process that callers need before it has come through alone.
- One that comes through alone and ends a process all the same is held back, each time for twice as long.
- Nothing is refused for ever: after its time it may try again, alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

HOLD_S = 600.0
"""For how long a program is refused that did not come through alone: it may have been the memory of that moment."""
LONGEST_HOLD_S = 24 * 3600.0
"""For how long at most, however often it has ended a process."""


@dataclass(frozen=True, slots=True)
class Death:
    """A process that began to load the program and is no more."""

    began_s: float
    """When it began, wall time."""
    who: str
    """The process, in words."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How the program did alone, the last time."""

    at_s: float
    """When, wall time."""
    end: str
    """What ended the process; empty: nothing did."""
    deaths: int
    """How many deaths there were by then."""
    passed: int
    """How often it has come through alone."""


class Step(StrEnum):
    """What is to be done with the program."""

    LOAD = "load"
    TRY_ALONE = "try_alone"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done, and why not to load it."""

    step: Step
    why: str = ""


def decide(deaths: Sequence[Death], trial: Trial | None, now_s: float) -> Decision:
    """What to do with a program that is to be loaded.

    Args:
        deaths: what is known of processes that its load ended, on this host.
        trial: how it did alone; None: it was not tried.
        now_s: wall time.
    """
    if trial is None:
        return Decision(Step.TRY_ALONE if deaths else Step.LOAD)
    if not trial.end and len(deaths) <= trial.deaths:
        return Decision(Step.LOAD)
    if trial.end:
        since_s, hold_s = trial.at_s, HOLD_S
        why = f"{_told(deaths)}, and the one in which it was tried alone: {trial.end}"
    else:
        since_s = max(d.began_s for d in deaths)
        hold_s = min(HOLD_S * 2.0 ** (trial.passed - 1), LONGEST_HOLD_S)
        why = f"{_told(deaths)}, though alone it came through"
    left_s = hold_s - (now_s - since_s)
    if not 0 < left_s <= hold_s:  # it is over; or the clock was set back, and nobody knows
        return Decision(Step.TRY_ALONE)
    return Decision(Step.REFUSE, f"{why}; it may try again in {left_s / 60:.0f} min")


def tried(before: Trial | None, deaths: Sequence[Death], end: str, now_s: float) -> Trial:
    """What is known once the program was tried alone, with that end (empty: it came through)."""
    passed = (before.passed if before is not None else 0) + (not end)
    return Trial(at_s=now_s, end=end, deaths=len(deaths), passed=passed)


def _told(deaths: Sequence[Death]) -> str:
    if not deaths:
        return "it has ended a process"
    last = max(deaths, key=lambda d: d.began_s)
    return f"its load has ended {last.who}" + (f" and {len(deaths) - 1} others before" if len(deaths) > 1 else "")
