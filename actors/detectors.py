"""What predictions cost, and how sure one can be that one version costs more than another: pure functions.

Versions are compared on the same rows (paired), by the bootstrap. Rows of one hour share weather and congestion,
so whole hours are drawn where there are enough of them: drawing single rows would claim more evidence than there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymill.runtime.spec import Cost

Floats = NDArray[np.float64]

RESAMPLES = 1000
"""Draws of the bootstrap; a bound at 99 % then rests on the ten most extreme ones."""

GROUP_US = 3_600_000_000
"""Rows whose event time lies in the same hour are drawn together."""

MIN_GROUPS = 30
"""With fewer hours than this single rows are drawn: a bootstrap of a handful of groups means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """What the live version cost more than the best alternative, per row."""

    alternative: str
    """The cheapest alternative; empty: there is none."""
    alternative_cost: float
    """What it would have cost per row; NaN if there is none."""
    regret: float
    """Cost per row of the live version minus that; negative: live was the cheapest."""
    low: float
    """Lower bound of it, at the wanted confidence over all alternatives together."""


def costs(p: NDArray[np.float32], y: NDArray[np.float32], threshold: float, cost: Cost) -> Floats:
    """Money lost per row [rows] by acting where `p > threshold`; an answer that is not finite acts on nothing."""
    acted = np.nan_to_num(p, nan=-np.inf) > threshold
    positive = y > 0.5
    return np.where(positive & ~acted, cost.missed, 0.0) + np.where(~positive & acted, cost.false_alarm, 0.0)


def resampled_means(
    values: Floats, at: NDArray[np.int64] | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Floats:
    """Means of `values` [rows, k] over bootstrap draws of the same rows for every column: [resamples, k].

    Poisson bootstrap: each group is drawn Poisson(1) times. `at` [rows] is the event time that groups rows by the
    hour; without it, or with fewer than `MIN_GROUPS` hours, each row is a group.
    """
    sums, sizes = _grouped(values, at)
    totals = np.column_stack([sums, sizes])
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, 2_000_000 // max(1, len(totals)))
    for begin in range(0, resamples, step):
        shape = (min(step, resamples - begin), len(totals))
        # Poisson(1) by a table of 2¹⁶ entries: ten times as fast as numpy's own for a small mean.
        weights = _POISSON[rng.integers(0, 1 << 16, shape, np.uint16)]
        drawn = weights @ totals
        means[begin : begin + shape[0]] = drawn[:, :-1] / np.maximum(drawn[:, -1:], 1)
    return means


def paired_regret(
    live: Floats, alternatives: dict[str, Floats], at: NDArray[np.int64], *, confidence: float, seed: int = 0
) -> Regret:
    """Regret of the live version from its costs and those of the alternatives on the same rows.

    The bound holds for all alternatives at once (Bonferroni): the cheapest of several looks cheap by luck too, so
    the bound of each is taken at 1 − (1 − confidence)/k, and the highest of them is a bound of the regret.
    """
    if not alternatives or not len(live):
        return Regret(alternative="", alternative_cost=float("nan"), regret=0.0, low=0.0)
    names = list(alternatives)
    difference = live[:, None] - np.column_stack([alternatives[n] for n in names])
    means = difference.mean(axis=0)
    best = int(means.argmax())
    draws = resampled_means(difference, at, seed=seed)
    lows = np.quantile(draws, (1 - confidence) / len(names), axis=0)
    return Regret(
        alternative=names[best],
        alternative_cost=float(alternatives[names[best]].mean()),
        regret=float(means[best]),
        low=float(lows.max()),
    )


def _grouped(values: Floats, at: NDArray[np.int64] | None) -> tuple[Floats, Floats]:
    if at is not None:
        hours, group = np.unique(at // GROUP_US, return_inverse=True)
        if len(hours) >= MIN_GROUPS:
            sums = [np.bincount(group, column, minlength=len(hours)) for column in values.T]
            return np.column_stack(sums), np.bincount(group, minlength=len(hours)).astype(np.float64)
    return values, np.ones(len(values))


def _poisson_table() -> NDArray[np.float64]:
    mass, table, k = np.exp(-1.0), np.zeros(1 << 16), 0
    cumulative = mass
    while cumulative * len(table) < len(table) - 0.5 and k < 12:
        table[round(cumulative * len(table)) :] = k + 1
        k += 1
        mass /= k
        cumulative += mass
    return table


_POISSON = _poisson_table()
