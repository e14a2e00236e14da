"""What else could have answered: the versions that the live one is compared with, and a cheap refit. Pure.

Invariant: an alternative never saw the rows it is judged on. A version trained on labels known after the rows'
first moment is left out; a refit gets only rows that were labelled before it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from raymill.actors.observed import Rows
from raymill.runtime.messages import ModelVersion, Stage

Program = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""[rows, features] float32, NaN: unknown → probability [rows] float32."""

MAX_RETIRED = 3
"""Retired versions that are compared, newest first: each more widens the bounds of all."""

REFIT_MIN_ROWS = 500
"""Fewer labelled rows than this make no refit."""

REFIT_MAX_ROWS = 20_000
"""Newest rows that a refit is made of, so that it takes a fraction of a second."""


def alternatives(versions: list[ModelVersion], live: ModelVersion | None, fair_from: int) -> list[ModelVersion]:
    """The newest baseline and the newest retired versions that have seen nothing from `fair_from` on.

    `live` is what they are alternatives to; None: to whatever answered, so the live version is one of them.
    """
    fair = [v for v in versions if (live is None or v.version != live.version) and trained_until(v) <= fair_from]
    baselines = [v for v in fair if v.kind == "baseline" and v.stage is not Stage.REJECTED]
    served = (Stage.RETIRED, Stage.LIVE)
    retired = [v for v in fair if v.kind != "baseline" and v.stage in served]
    return baselines[-1:] + retired[-MAX_RETIRED:]


def trained_until(version: ModelVersion) -> int:
    """Moment up to which the version may have seen labels, µs UTC; 0 for one registered by hand."""
    return version.manifest.known_until if version.manifest is not None else 0


def refitted(rows: Rows) -> Program | None:
    """A logistic regression on the newest labelled rows; None if they are too few to fit one."""
    if len(rows) < REFIT_MIN_ROWS or len(np.unique(rows.y)) < 2:
        return None
    from sklearn.linear_model import LogisticRegression

    newest = rows.where(np.lexsort((rows.id, rows.at))[-REFIT_MAX_ROWS:])
    known = np.isfinite(newest.x)
    filled = np.where(known, newest.x, np.nan).astype(np.float64)
    some = known.any(axis=0)
    mean, spread = np.zeros(filled.shape[1]), np.ones(filled.shape[1])
    mean[some], spread[some] = np.nanmean(filled[:, some], axis=0), np.nanstd(filled[:, some], axis=0)
    spread[spread == 0] = 1

    def inputs(x: NDArray[np.float32]) -> NDArray[np.float64]:
        known = np.isfinite(x)
        scaled = np.clip((np.where(known, x, mean) - mean) / spread, -10, 10)
        return np.hstack([scaled, ~known])

    fitted = LogisticRegression(max_iter=200, tol=1e-3).fit(inputs(newest.x), newest.y)
    return lambda x: fitted.predict_proba(inputs(x))[:, 1].astype(np.float32) if len(x) else np.zeros(0, np.float32)
