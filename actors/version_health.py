"""Whether a version errs, is slow, or ends who loads it, and has to go: what replicas tell in, the reason out; pure.

A canary's failure is counted only where the live version answered the same rows, so a caller's strange rows are not
held against it; the bound on its share is then against live already. Being slow is judged against what the other
version took in the same window, on the same cores. Every bound holds with a chance of error of at most `ERROR`,
whatever the number of calls, so that there is no least number to choose: a version that fails always goes after three.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raymill.runtime.errors import DeadlyModel

ERROR = 1e-4
"""Chance that a share is not within its bound; the counts are looked at again and again."""
FAILED_CANARY = 0.01
"""Share of a canary's calls that may fail."""
FAILED_LIVE = 0.05
"""Share of the live version's calls that may fail: going back is a larger step, and nothing is computed beside it."""
ILL = 0.5
"""Share of the live version's calls that may fail before its model counts as not ready: 14 of 14 are enough."""
SLOW = 0.01
"""Share of calls that may be slow, as the target is one for 99 of 100."""
PROBATION_S = 3600.0
"""How long after its promotion a live version is rolled back by itself. Later it is the rows that have changed, and
the version before would get the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What a version did in the window."""

    calls: int = 0
    """Batches that it computed."""
    failed: int = 0
    """Of them: it raised, or an answer was not finite."""
    slow: int = 0
    """Of them: it took longer than `slow_s` says."""
    rows: int = 0
    """Rows of all batches."""
    seconds: float = 0.0
    """Wall time of all batches."""
    why: str = ""
    """The last failure."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            calls=self.calls + other.calls,
            failed=self.failed + other.failed,
            slow=self.slow + other.slow,
            rows=self.rows + other.rows,
            seconds=self.seconds + other.seconds,
            why=other.why or self.why,
        )


def slow_s(p99_ms: float) -> float:
    """Seconds above which a batch is slow: half the target, since a request may wait for the batch before its own."""
    return p99_ms / 2000


def verdict(version: Tally, other: Tally, *, canary: bool) -> str:
    """Why a version has to go, with figures; empty: it stays.

    Args:
        version: what it did.
        other: what the version did that would answer in its place.
        canary: whether it is a canary, not the live version.
    """
    allowed = FAILED_CANARY if canary else FAILED_LIVE
    if at_least(version.failed, version.calls) > allowed:
        return f"it errs: {version.failed} of {version.calls} batches failed; {version.why or 'no reason was given'}"
    limit = max(SLOW, at_most(other.slow, other.calls))
    if at_least(version.slow, version.calls) > limit:
        return (
            f"it is slow: {version.slow} of {version.calls} batches took more than half of the latency target "
            f"({1e3 * version.seconds / version.calls:.1f} ms each), {other.slow} of {other.calls} of the other version"
        )
    return ""


def illness(live: Tally) -> str:
    """Why a live version is ill, with figures; empty: it is well. It stays: nothing may be there to answer for it."""
    if at_least(live.failed, live.calls) <= ILL:
        return ""
    return f"{live.failed} of {live.calls} batches failed; {live.why or 'no reason was given'}"


def at_least(hits: int, of: int) -> float:
    """Lower bound of a share, given `hits` of so many (Chernoff's, which holds for any number)."""
    if hits == 0:
        return 0.0
    share, low, high = hits / of, 0.0, hits / of
    for _ in range(40):
        middle = (low + high) / 2
        if of * _divergence(share, middle) > -math.log(ERROR):
            low = middle
        else:
            high = middle
    return low


def at_most(hits: int, of: int) -> float:
    """Upper bound of a share; 1 if nothing is known."""
    return 1.0 - at_least(of - hits, of)


def _divergence(p: float, q: float) -> float:
    if q <= 0:
        return math.inf
    rest = 0.0 if p == 1 else (1 - p) * math.log((1 - p) / (1 - q))
    return p * math.log(p / q) + rest


def pooled(told: Iterable[Mapping[int, Tally]]) -> dict[int, Tally]:
    """Version → what it did in all replicas."""
    found: dict[int, Tally] = {}
    for replica in told:
        for version, tally in replica.items():
            found[version] = found.get(version, Tally()) + tally
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a replica says of itself, about twice a second and at once after a change."""

    replica: str
    """Serve's id of it."""
    generation: str
    """The configuration that it has applied."""
    failures: Mapping[str, Mapping[int, str]]
    """Model → version → why it could not be loaded; begins with the error's name."""
    roles: Mapping[str, Mapping[int, str]]
    """Model → version that answers → its `Role`."""
    tallies: Mapping[str, Mapping[int, Tally]]
    """Model → version → what it did lately; also of those that answer no more."""
    benched: Mapping[str, Mapping[int, str]]
    """Model → version → why it gets no rows in this replica."""

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads back."""
        return {k: _with_keys(v, str) for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Report:
        """What `to_json` gave."""
        numbered = {k: _with_keys(v, int) for k, v in value.items()}
        tallies = {m: {v: Tally(**t) for v, t in found.items()} for m, found in numbered["tallies"].items()}
        return cls(**{**numbered, "tallies": tallies})


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawal:
    """A version that has to go."""

    model: str
    version: int
    canary: bool
    reason: str


def withdrawals(told: Sequence[Report]) -> list[Withdrawal]:
    """The versions that have to go, by what all replicas say; of a model one at most, its canary before its live.

    What could not be loaded is taken back by whoever told the replicas to, who is told so. Where a load ended one, he
    may have given up before another could tell: such a version goes here, too.
    """
    found: dict[str, Withdrawal] = {}
    for model, version, why in ((m, v, why) for r in told for m, f in r.failures.items() for v, why in f.items()):
        if why.startswith(DeadlyModel.__name__):
            found[model] = Withdrawal(model=model, version=version, canary=False, reason=why)
    for model in sorted({m for r in told for m in r.roles}):
        tallies = pooled(r.tallies.get(model, {}) for r in told)
        roles = {v: role for r in told for v, role in r.roles.get(model, {}).items()}
        benched = {v: why for r in told for v, why in r.benched.get(model, {}).items()}
        live = sum((tallies.get(v, Tally()) for v, role in roles.items() if role == "live"), Tally())
        before = sum((t for v, t in tallies.items() if v not in roles), Tally())
        for version, role in sorted(roles.items(), key=lambda item: item[1] == "live"):
            canary = role != "live"
            other = live if canary else before
            why = benched.get(version) or verdict(tallies.get(version, Tally()), other, canary=canary)
            if why:
                found.setdefault(model, Withdrawal(model=model, version=version, canary=canary, reason=why))
    return list(found.values())


def _with_keys(value: Any, key: type) -> Any:
    return (
        {m: {key(v): x for v, x in found.items()} for m, found in value.items()} if isinstance(value, dict) else value
    )
