"""May a candidate go on? Decided by evidence on the newest labelled slice, against the live model and the baseline.

Accepted iff, by the paired bootstrap, the candidate is not worse than a stated tolerance in log-loss AND in money
against BOTH opponents, and better than zero in at least one of the two against the live version (against the
baseline while nothing else is live). Differences are candidate minus opponent, per row: negative is better.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymill.actors import detectors, scores
from raymill.runtime.errors import ContractError
from raymill.runtime.spec import Cost, Monitor

METRICS = ("log_loss", "money")


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRules:
    """What the gate asks for."""

    cost: Cost
    """Costs of wrong predictions."""
    unit: str = "USD"
    """Currency, for the words."""
    confidence: float = 0.95
    """Of each bound, one-sided."""
    money_tolerance: float = 0.25
    """Money per row that the candidate may be worse."""
    log_loss_tolerance: float = 0.01
    """Log-loss that the candidate may be worse."""
    min_rows: int = 1000
    """Fewer labelled rows than this are no evidence."""
    min_class_rows: int = 30
    """Fewer rows than this of either outcome are none either."""
    seed: int = 0
    """Of the bootstrap: the same facts give the same decision."""

    @classmethod
    def of(cls, monitor: Monitor) -> GateRules:
        """The rules that a pipeline's monitor states."""
        return cls(
            cost=monitor.cost,
            unit=monitor.unit,
            confidence=monitor.confidence,
            money_tolerance=monitor.tolerance,
            min_rows=min(monitor.min_labels, 1000),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The gate's answer."""

    accept: bool
    """Whether the candidate may become a canary."""
    reason: str
    """Why, in words with figures."""
    figures: dict[str, Any] = field(default_factory=dict)
    """JSON values: `rows`, `candidate {auc, log_loss, money}`, and by opponent
    and metric `{difference, low, high, better}`."""


def judge(
    candidate_p: NDArray[np.float32],
    live_p: NDArray[np.float32] | None,
    baseline_p: NDArray[np.float32],
    y: NDArray[np.float32],
    rules: GateRules,
    at: NDArray[np.int64] | None = None,
) -> Decision:
    """Whether the candidate goes on, from the answers of all on the same rows (all arrays [rows]).

    `live_p` is None while nothing, or nothing but the baseline, is live; `at` is the rows' event time, µs UTC: with
    it, rows of one hour count as one piece of evidence.

    Raises:
        ContractError: the arrays differ in length.
    """
    opponents = {"baseline": baseline_p} if live_p is None else {"live": live_p, "baseline": baseline_p}
    if any(len(p) != len(y) for p in (candidate_p, *opponents.values())):
        raise ContractError("the gate needs the answers of every version on the same rows: their lengths differ")
    lack = _lack(candidate_p, y, rules)
    if lack:
        return Decision(accept=False, reason=lack, figures={"rows": len(y)})
    figures: dict[str, Any] = {"rows": len(y), "candidate": _scores(candidate_p, y, rules)}
    for name, p in opponents.items():
        figures[name] = _compared(candidate_p, p, y, rules, at)
    return _decided(figures, list(opponents), rules)


def _lack(p: NDArray[np.float32], y: NDArray[np.float32], rules: GateRules) -> str:
    positives = int((y > 0.5).sum())
    rare = min(positives, len(y) - positives)
    if len(y) < rules.min_rows:
        return f"no evidence: {len(y)} labelled rows, {rules.min_rows} are needed"
    if rare < rules.min_class_rows:
        return f"no evidence: only {rare} rows of the rarer outcome, {rules.min_class_rows} are needed"
    wrong = int((~((p >= 0) & (p <= 1))).sum())
    return f"the candidate answers nonsense: {wrong} of {len(y)} answers are no probability" if wrong else ""


def _scores(p: NDArray[np.float32], y: NDArray[np.float32], rules: GateRules) -> dict[str, float]:
    return {
        "auc": scores.auc(p, y),
        "log_loss": float(scores.log_losses(p, y).mean()),
        "money": float(detectors.costs(p, y, rules.cost.threshold, rules.cost).mean()),
    }


def _compared(
    p: NDArray[np.float32],
    other: NDArray[np.float32],
    y: NDArray[np.float32],
    rules: GateRules,
    at: NDArray[np.int64] | None,
) -> dict[str, Any]:
    threshold = rules.cost.threshold
    difference = np.column_stack(
        [
            scores.log_losses(p, y) - scores.log_losses(other, y),
            detectors.costs(p, y, threshold, rules.cost) - detectors.costs(other, y, threshold, rules.cost),
        ]
    )
    draws = detectors.resampled_means(difference, at, seed=rules.seed)
    high = np.quantile(draws, rules.confidence, axis=0)
    low = np.quantile(draws, 1 - rules.confidence, axis=0)
    found: dict[str, Any] = {"scores": _scores(other, y, rules)}
    for i, metric in enumerate(METRICS):
        found[metric] = {
            "difference": float(difference[:, i].mean()),
            "low": float(low[i]),
            "high": float(high[i]),
            "better": bool(high[i] < 0),
        }
    return found


def _decided(figures: dict[str, Any], opponents: list[str], rules: GateRules) -> Decision:
    tolerance = {"log_loss": rules.log_loss_tolerance, "money": rules.money_tolerance}
    rows, confidence = figures["rows"], f"{rules.confidence:.0%}"
    for name in opponents:
        for metric in METRICS:
            found = figures[name][metric]
            if found["high"] > tolerance[metric]:
                reason = (
                    f"not shown to be as good as {name}: {_worded(metric, found, rules)}, "
                    f"up to {found['high']:+.4g} at {confidence} where {tolerance[metric]:g} is tolerated ({rows} rows)"
                )
                return Decision(accept=False, reason=reason, figures=figures)
    first = figures[opponents[0]]
    won = [metric for metric in METRICS if first[metric]["better"]]
    words = " and ".join(_worded(metric, first[metric], rules) for metric in (won or METRICS))
    against = " and no worse than the baseline" if "live" in opponents else ""
    if not won:
        reason = f"no proof that it is better than {opponents[0]}: {words} ({rows} rows, {confidence})"
        return Decision(accept=False, reason=reason, figures=figures)
    reason = f"better than {opponents[0]}: {words}{against} ({rows} rows, {confidence})"
    return Decision(accept=True, reason=reason, figures=figures)


def _worded(metric: str, found: dict[str, Any], rules: GateRules) -> str:
    if metric == "log_loss":
        return f"log-loss {found['difference']:+.4f}"
    return f"{found['difference']:+.2f} {rules.unit} a row"
