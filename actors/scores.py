"""How good probabilities are against truths: pure, the same for training, gate and monitor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_CLIP = 1e-6
"""Probabilities are kept this far from 0 and 1 in the log-loss: one overconfident row must not decide alone."""


def log_losses(p: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-loss per row [rows], natural logarithm; an answer that is not finite counts as certain and wrong."""
    right = np.where(y > 0.5, p, 1 - p).astype(np.float64)
    return np.asarray(-np.log(np.clip(np.nan_to_num(right, nan=0.0), _CLIP, 1 - _CLIP)), np.float64)


def log_loss(p: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Mean of `log_losses`; NaN without rows."""
    return float(log_losses(p, y).mean()) if len(p) else float("nan")


def auc(p: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Area under the ROC curve, ties counted half; NaN if a class is missing or an answer is not finite."""
    positive = y > 0.5
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg or not np.isfinite(p).all():
        return float("nan")
    _, place, count = np.unique(p, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    return float((rank[place][positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))
