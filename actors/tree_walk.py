"""Small batches through XGBoost's trees without XGBoost, whose call costs 100 µs before it looks at a tree.

The trees lie level by level in flat arrays, left child beside right child; a leaf is its own left child and asks a
column of zeros, so that every walk of a tree takes the same number of steps and no branch has to be foreseen.

Invariant: answers are XGBoost's own to the last bit: the same float32 sums in the same order, the C library's `expf`.
`walk_of` tries it on values around the trees' own thresholds, and gives None for whatever is not so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import bool_, float32, int32, njit, types, void

F32 = npt.NDArray[np.float32]

FEW_ROWS = 32
"""Up to so many the walk is faster: XGBoost takes whole blocks of rows through one tree after the other."""
_MOST_STEPS = 16
"""Deepest tree that is walked: one step costs each leaf the same, however near the root it is."""
_MOST_BYTES = 64 << 20
_TRIAL_ROWS = 256
_LEAST, _MOST = np.float32(1e-6), np.float32(1 - 1e-6)
"""Bounds that XGBoost sets to the share it starts from."""

_expf = types.ExternalFunction("expf", float32(float32))
_logf = types.ExternalFunction("logf", float32(float32))
_ROWS = types.Array(float32, 2, "C", readonly=True)


class Trees:
    """The trees of one model; [nodes] arrays, and [trees] of roots and depths."""

    def __init__(self, trees: list[dict[str, Any]], width: int) -> None:
        self.roots = np.zeros(len(trees), np.int32)
        self.steps = np.zeros(len(trees), np.int32)
        feature: list[int] = []
        threshold: list[float] = []
        left: list[int] = []
        missing: list[bool] = []
        for number, tree in enumerate(trees):
            root, depth = len(feature), 0
            level = [0]
            while level:  # the children of a level follow it, in its order
                child = len(feature) + len(level)
                following: list[int] = []
                for node in level:
                    low, high = tree["left_children"][node], tree["right_children"][node]
                    is_leaf = low < 0
                    feature.append(width if is_leaf else tree["split_indices"][node])
                    threshold.append(tree["split_conditions"][node])
                    missing.append(bool(tree["default_left"][node]) and not is_leaf)
                    left.append(len(left) if is_leaf else child + len(following))
                    following += [] if is_leaf else [low, high]
                depth += bool(following)
                level = following
            self.roots[number], self.steps[number] = root, depth
        self.feature, self.left = np.array(feature, np.int32), np.array(left, np.int32)
        self.missing_left = np.array(missing, np.bool_)
        value = np.array(threshold, np.float32)
        is_leaf_node = self.feature == width
        self.threshold = np.where(is_leaf_node, np.float32(1), value).astype(np.float32)
        self.leaf = np.where(is_leaf_node, value, np.float32(0)).astype(np.float32)


def walk_of(booster: Any, predict: Callable[[F32], F32]) -> Callable[[F32], F32] | None:
    """The walk of a booster's trees, [rows, n] float32 C-contiguous → [rows] float32, or None.

    Args:
        booster: `xgboost.Booster`, loaded.
        predict: XGBoost's own answer.
    """
    text = booster.save_raw("json")
    if len(text) > _MOST_BYTES:
        return None
    learner = json.loads(bytes(text))["learner"]
    trees = learner["gradient_booster"].get("model", {}).get("trees", [])
    objective = learner["objective"]["name"]
    if not _is_plain(learner, trees) or objective not in ("binary:logistic", "reg:squarederror"):
        return None
    columns = int(learner["learner_model_param"]["num_feature"])
    found = Trees(trees, columns)
    if found.steps.max() > _MOST_STEPS:
        return None
    logistic = objective == "binary:logistic"
    start = np.float32(learner["learner_model_param"]["base_score"].strip("[]"))
    base = np.float32(_margin(min(max(start, _LEAST), _MOST))) if logistic else start

    def walk(x: F32) -> F32:
        out = np.empty(len(x), np.float32)
        _walk(
            x, found.roots, found.steps, found.feature, found.threshold, found.left, found.missing_left, found.leaf,
            base, logistic, out,
        )  # fmt: skip
        return out

    return walk if all(np.array_equal(walk(x), predict(x)) for x in _trials(found, columns)) else None


def _is_plain(learner: dict[str, Any], trees: list[dict[str, Any]]) -> bool:
    """Whether it is a sum of trees that compare numbers, one number a row."""
    sizes = learner["learner_model_param"]
    return (
        learner["gradient_booster"]["name"] == "gbtree"
        and int(sizes["num_class"]) <= 1
        and int(sizes.get("num_target", 1)) == 1
        and "," not in sizes["base_score"]
        and bool(trees)
        and all(not any(t["split_type"]) and t["tree_param"]["size_leaf_vector"] in ("0", "1") for t in trees)
    )


def _trials(trees: Trees, columns: int) -> list[F32]:
    """Rows at, next to and between thresholds, some of them unknown; and ordinary ones."""
    random = np.random.default_rng(0)
    x = random.normal(size=(_TRIAL_ROWS, columns)).astype(np.float32)
    inner = np.flatnonzero(trees.feature < columns)
    for j in range(columns):
        known = trees.threshold[inner[trees.feature[inner] == j]]
        if len(known):
            picked = random.choice(known, _TRIAL_ROWS)
            x[:, j] = np.where(random.random(_TRIAL_ROWS) < 0.5, picked, np.nextafter(picked, np.float32(-np.inf)))
    holes = x.copy()
    holes[random.random(x.shape) < 0.2] = np.nan
    return [x, holes, x[:1], holes[:1]]


@njit(float32(float32), cache=True)
def _margin(share: float) -> Any:
    return -_logf(float32(1) / share - float32(1))


@njit(int32(float32, float32, int32, bool_), inline="always")
def _next(value: float, threshold: float, left: int, missing_left: bool) -> Any:
    return left + int32(not ((value < threshold) | ((value != value) & missing_left)))  # NaN is itself to nobody


@njit(
    void(
        _ROWS, int32[::1], int32[::1], int32[::1], float32[::1], int32[::1], bool_[::1], float32[::1],
        float32, bool_, float32[::1],
    ),
    cache=True, nogil=True,
)  # fmt: skip
def _walk(
    x: F32,
    roots: Any,
    steps: Any,
    feature: Any,
    threshold: F32,
    left: Any,
    missing: Any,
    leaf: F32,
    base: float,
    logistic: bool,
    out: F32,
) -> None:
    """Every row through every tree, four trees at a time, since a step waits for the one before it."""
    rows, width = x.shape
    trees = len(roots)
    row = np.zeros(width + 1, np.float32)
    for r in range(rows):
        row[:width] = x[r]
        total = base
        for t in range(0, trees, 4):
            last = trees - 1
            a, b, c, d = roots[t], roots[min(t + 1, last)], roots[min(t + 2, last)], roots[min(t + 3, last)]
            for _ in range(max(steps[t], steps[min(t + 1, last)], steps[min(t + 2, last)], steps[min(t + 3, last)])):
                a = _next(row[feature[a]], threshold[a], left[a], missing[a])
                b = _next(row[feature[b]], threshold[b], left[b], missing[b])
                c = _next(row[feature[c]], threshold[c], left[c], missing[c])
                d = _next(row[feature[d]], threshold[d], left[d], missing[d])
            total += leaf[a]
            if t + 1 < trees:
                total += leaf[b]
            if t + 2 < trees:
                total += leaf[c]
            if t + 3 < trees:
                total += leaf[d]
        out[r] = float32(1) / (_expf(min(-total, float32(88.7))) + float32(1)) if logistic else total
