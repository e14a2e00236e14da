"""Was what was served what the lake gives? Decides, cell by cell, whether two vectors differ and why.

A cell is one feature of one served row. It agrees when served and recomputed value are the same float32, bit for bit
(two unknown values agree). One that does not has exactly one cause:

- `late row`: it is what the lake gave when the row was served; a row that was known by then reached the lake later.
- `stale`: it is what the lake gave before some earlier batch; the online store lagged behind the lake.
- `code`: no state of the lake gives it; another definition, or another record in the online store, made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
"""[rows, features], NaN for unknown."""
Codes = npt.NDArray[np.int8]
"""0 where the values agree, else the number of the cause (`number`)."""

TOLERANCE = 0.001
"""Share of a feature's rows that may differ before it is an alarm."""


class Cause(StrEnum):
    """Why a served value is not what the lake gives now."""

    LATE_ROW = "late row"
    STALE = "stale"
    CODE = "code"
    UNEXAMINED = "unexamined"
    """There were more states of the lake to look at than one check may take."""


CAUSES = tuple(Cause)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFinding:
    """How one feature did."""

    feature: str
    """`<view>.<feature>`."""
    rows: int
    """Served rows that were recomputed."""
    mismatches: int
    """Of them, those with another value."""
    causes: dict[str, int]
    """Cause → mismatches; those that there are."""
    why: str
    """One of the mismatches in words: values, moment, what explains it; empty: there is none."""

    @property
    def rate(self) -> float:
        """Share of rows with another value."""
        return self.mismatches / self.rows if self.rows else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Consistency:
    """What a check of served vectors found."""

    model: str
    """Model whose predictions were looked at."""
    start_at: int
    """Event time of the first row of the sample, µs UTC."""
    end_at: int
    """Event time of the last one, µs UTC."""
    rows: int
    """Rows of the sample."""
    mismatched: int
    """Rows with at least one value that differs, and rows of another width."""
    lake_versions: dict[str, int]
    """Source → version of its lake table that was recomputed from."""
    features: tuple[FeatureFinding, ...]
    """Features with mismatches, most first."""
    tolerance: float
    """Share of a feature's rows that may differ."""
    alert: bool
    """Whether a feature is above it."""
    reason: str
    """What was found, in words with figures."""

    def to_json(self) -> dict[str, Any]:
        """JSON values; each feature with its `rate`."""
        features = [{**asdict(f), "rate": f.rate} for f in self.features]
        return {**asdict(self), "features": features}


def agree(a: Vectors, b: Vectors) -> npt.NDArray[np.bool_]:
    """Cells [rows, features] whose values are the same bits; any two NaNs are."""
    a, b = (np.ascontiguousarray(v, dtype=np.float32) for v in (a, b))
    same: npt.NDArray[np.bool_] = (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))
    return same


@dataclass(frozen=True, slots=True, eq=False)
class Explained:
    """Cells [rows, features] with what explains them."""

    codes: Codes
    """The cause of each; 0: the values agree."""
    steps: npt.NDArray[np.int16]
    """Of those that are stale: which of the earlier states has the value, 1 for the nearest; else 0."""


def explain(served: Vectors, now: Vectors, then: Vectors, earlier: Iterable[Vectors]) -> Explained:
    """The cause of every cell that differs.

    Args:
        served: what was served.
        now: recomputed from the lake as it is.
        then: recomputed from the lake as it was when the rows were served.
        earlier: recomputed from states of the lake before that, nearest first; no more are taken than are needed.
    """
    codes = np.where(agree(served, now), 0, number(Cause.CODE)).astype(np.int8)
    codes[(codes > 0) & agree(served, then)] = number(Cause.LATE_ROW)
    steps = np.zeros(codes.shape, np.int16)
    states = enumerate(earlier, start=1)
    while (open_ := codes == number(Cause.CODE)).any() and (found := next(states, None)) is not None:
        stale = open_ & agree(served, found[1])
        codes[stale], steps[stale] = number(Cause.STALE), found[0]
    return Explained(codes, steps)


def number(cause: Cause) -> int:
    """How a cause is written in `Codes`."""
    return CAUSES.index(cause) + 1


def judge(
    cells: Mapping[str, Codes], whys: Mapping[str, str], rows: int, tolerance: float = TOLERANCE
) -> tuple[tuple[FeatureFinding, ...], bool, str]:
    """Findings of the features that differ, most mismatches first; whether that is an alarm; and why.

    Args:
        cells: feature → codes of its rows.
        whys: feature → one of its mismatches in words.
        rows: rows of the sample.
        tolerance: share of a feature's rows that may differ.
    """
    findings = []
    for name, codes in cells.items():
        counts = {str(c): int((codes == number(c)).sum()) for c in CAUSES}
        wrong = sum(counts.values())
        if wrong:
            told = {c: n for c, n in counts.items() if n}
            findings.append(
                FeatureFinding(feature=name, rows=len(codes), mismatches=wrong, causes=told, why=whys.get(name, ""))
            )
    findings.sort(key=lambda f: (-f.mismatches, f.feature))
    loud = [f for f in findings if f.rate > tolerance]
    return tuple(findings), bool(loud), _reason(rows, findings, loud, tolerance)


def _reason(rows: int, findings: Sequence[FeatureFinding], loud: Sequence[FeatureFinding], tolerance: float) -> str:
    if not rows:
        return "nothing was served that could be recomputed"
    if not findings:
        return f"{rows} rows recomputed from the lake, every value the same"
    told = "; ".join(f"{f.feature} {f.mismatches} of {f.rows} ({', '.join(f.causes)})" for f in (loud or findings)[:3])
    more = len(loud or findings) - 3
    told += f"; and {more} features more" if more > 0 else ""
    return f"{told}: {'above' if loud else 'within'} the tolerance of {tolerance:.2%}"
