"""Small batches through XGBoost's trees without XGBoost, whose call costs 100 µs before it looks at a tree.

The trees lie level by level, left child beside right child; a leaf is its own left child and asks a column of zeros,
so that every walk of a tree takes the same number of steps and no branch has to be foreseen. A step waits for the one
before it: eight rows go through a tree together, of fewer than eight each goes through four trees at a time.

Invariant: answers are XGBoost's own to the last bit: the same float32 sums in the same order, the C library's `expf`.
`walk_of` tries it on values around the trees' own thresholds, and gives None for whatever is not so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import float32, int32, njit, types, void

F32 = npt.NDArray[np.float32]

FEW_ROWS = 512
"""Up to so many the walk is faster than XGBoost, which takes whole blocks of rows through one tree after the other."""
_TOGETHER = 8
_MOST_STEPS = 16
"""Deepest tree that is walked: one step costs each leaf the same, however near the root it is."""
_MOST_BYTES = 64 << 20
_TRIAL_ROWS = 256
_THRESHOLD, _LEFT, _COLUMN, _LEAF = range(4)
_MISSING_LEFT = 1 << 24
_MOST_COLUMNS = _MISSING_LEFT - 2
_LEAST, _MOST = np.float32(1e-6), np.float32(1 - 1e-6)
"""Bounds that XGBoost sets to the share it starts from."""

_expf = types.ExternalFunction("expf", float32(float32))
_logf = types.ExternalFunction("logf", float32(float32))
_ROWS = types.Array(float32, 2, "C", readonly=True)


class Trees:
    """The trees of one model: a node of 16 bytes, so that a step reads one line of the cache, and [trees] arrays."""

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
        is_leaf_node = np.array(feature) == width
        value = np.array(threshold, np.float32)
        self.nodes = np.zeros((len(feature), 4), np.int32)
        """Threshold (float32), left child, column with `_MISSING_LEFT` added, value of a leaf (float32)."""
        self.floats = self.nodes.view(np.float32)
        self.floats[:, _THRESHOLD] = np.where(is_leaf_node, np.float32(1), value)
        self.nodes[:, _LEFT] = left
        self.nodes[:, _COLUMN] = np.array(feature) + _MISSING_LEFT * np.array(missing)
        self.floats[:, _LEAF] = np.where(is_leaf_node, value, np.float32(0))
        self.columns = np.array(feature)[~is_leaf_node]
        """Column of each node that compares."""
        self.thresholds = value[~is_leaf_node]


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
    if columns > _MOST_COLUMNS:
        return None
    found = Trees(trees, columns)
    if found.steps.max() > _MOST_STEPS:
        return None
    logistic = objective == "binary:logistic"
    start = np.float32(learner["learner_model_param"]["base_score"].strip("[]"))
    base = np.float32(_margin(min(max(start, _LEAST), _MOST))) if logistic else start

    def walk(x: F32) -> F32:
        out = np.empty(len(x), np.float32)
        _walk(x, found.roots, found.steps, found.nodes, found.floats, base, out)
        if logistic:
            _to_share(out)
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
    for j in range(columns):
        known = trees.thresholds[trees.columns == j]
        if len(known):
            picked = random.choice(known, _TRIAL_ROWS)
            x[:, j] = np.where(random.random(_TRIAL_ROWS) < 0.5, picked, np.nextafter(picked, np.float32(-np.inf)))
    holes = x.copy()
    holes[random.random(x.shape) < 0.2] = np.nan
    return [x, holes, x[:1], holes[:1], x[:13], holes[:13]]


@njit(float32(float32), cache=True)
def _margin(share: float) -> Any:
    return -_logf(float32(1) / share - float32(1))


@njit(inline="always")
def _next(row: F32, nodes: Any, floats: F32, node: int) -> Any:
    column = nodes[node, _COLUMN]
    value = row[column & (_MISSING_LEFT - 1)]
    is_left = (value < floats[node, _THRESHOLD]) | ((value != value) & (column >= _MISSING_LEFT))  # NaN is no number
    return nodes[node, _LEFT] + int32(not is_left)


@njit(inline="always")
def _eight_rows(x: F32, roots: Any, steps: Any, nodes: Any, floats: F32, base: float, out: F32) -> None:
    out[:] = base
    for t in range(len(roots)):
        a = b = c = d = e = f = g = h = roots[t]
        for _ in range(steps[t]):
            a, b = _next(x[0], nodes, floats, a), _next(x[1], nodes, floats, b)
            c, d = _next(x[2], nodes, floats, c), _next(x[3], nodes, floats, d)
            e, f = _next(x[4], nodes, floats, e), _next(x[5], nodes, floats, f)
            g, h = _next(x[6], nodes, floats, g), _next(x[7], nodes, floats, h)
        out[0] += floats[a, _LEAF]
        out[1] += floats[b, _LEAF]
        out[2] += floats[c, _LEAF]
        out[3] += floats[d, _LEAF]
        out[4] += floats[e, _LEAF]
        out[5] += floats[f, _LEAF]
        out[6] += floats[g, _LEAF]
        out[7] += floats[h, _LEAF]


@njit(inline="always")
def _one_row(row: F32, roots: Any, steps: Any, nodes: Any, floats: F32, base: float) -> Any:
    total, trees = base, len(roots)
    last = trees - 1
    for t in range(0, trees, 4):
        a, b, c, d = roots[t], roots[min(t + 1, last)], roots[min(t + 2, last)], roots[min(t + 3, last)]
        for _ in range(max(steps[t], steps[min(t + 1, last)], steps[min(t + 2, last)], steps[min(t + 3, last)])):
            a, b = _next(row, nodes, floats, a), _next(row, nodes, floats, b)
            c, d = _next(row, nodes, floats, c), _next(row, nodes, floats, d)
        total += floats[a, _LEAF]
        if t + 1 < trees:
            total += floats[b, _LEAF]
        if t + 2 < trees:
            total += floats[c, _LEAF]
        if t + 3 < trees:
            total += floats[d, _LEAF]
    return total


@njit(
    void(_ROWS, int32[::1], int32[::1], int32[:, ::1], float32[:, ::1], float32, float32[::1]), cache=True, nogil=True
)
def _walk(x: F32, roots: Any, steps: Any, nodes: Any, floats: F32, base: float, out: F32) -> None:
    """Sums of the trees for every row, in the trees' order."""
    rows, width = x.shape
    padded = np.zeros((_TOGETHER, width + 1), np.float32)
    whole = rows // _TOGETHER * _TOGETHER
    for first in range(0, whole, _TOGETHER):
        padded[:, :width] = x[first : first + _TOGETHER]
        _eight_rows(padded, roots, steps, nodes, floats, base, out[first : first + _TOGETHER])
    for r in range(whole, rows):
        padded[0, :width] = x[r]
        out[r] = _one_row(padded[0], roots, steps, nodes, floats, base)


@njit(void(float32[::1]), cache=True, nogil=True)
def _to_share(margins: F32) -> None:
    for r in range(len(margins)):
        margins[r] = float32(1) / (_expf(min(-margins[r], float32(88.7))) + float32(1))
