"""Fixed-quantile histograms of a model's inputs and outputs: small, mergeable, exact to merge.

Invariants: the counts of two sketches with the same edges add up to the sketch of all their rows, in any order;
every row of a column falls into exactly one bin, and an unknown value (NaN) has a bin of its own, so that a
feature that goes missing shows as drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymill.runtime.errors import ContractError

QUANTILES = 10
"""Bins of about equal share between the smallest and largest reference value."""

_SMOOTHING = 0.5
"""Rows added to each bin, so that an empty one gives a large finite index instead of an infinite one."""


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """Histograms of several columns.

    Bin 0 holds values below the smallest reference value, bin i those in (edge i-1, edge i], the last but one those
    above the largest, the last one unknown values. A repeated edge (a column of few distinct values) is an empty bin.
    """

    edges: NDArray[np.float32]
    """[columns, edges], ascending; NaN where the reference held no known value at all."""
    counts: NDArray[np.int64]
    """[columns, edges + 2] rows per bin."""

    @property
    def rows(self) -> int:
        """Rows that were counted."""
        return int(self.counts[0].sum()) if len(self.counts) else 0

    def of(self, x: NDArray[np.float32]) -> Sketch:
        """The sketch of other rows, `x` [rows, columns], in these bins.

        Raises:
            ContractError: `x` has another number of columns.
        """
        if x.ndim != 2 or x.shape[1] != len(self.edges):
            raise ContractError(
                f"rows of shape {x.shape} do not fit a sketch of {len(self.edges)} columns: set the reference anew"
            )
        return Sketch(self.edges, _counted(x, self.edges))

    def merged(self, other: Sketch) -> Sketch:
        """The sketch of the rows of both.

        Raises:
            ContractError: their bins differ.
        """
        if not np.array_equal(self.edges, other.edges, equal_nan=True):
            raise ContractError("sketches with different bins can not be merged: use those of one reference")
        return Sketch(self.edges, self.counts + other.counts)

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads back exactly."""
        edges = [[None if np.isnan(e) else float(e) for e in row] for row in self.edges]
        return {"edges": edges, "counts": self.counts.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Sketch:
        """The sketch that `to_json` wrote."""
        edges = np.array([[np.nan if e is None else e for e in row] for row in value["edges"]], np.float32)
        return cls(edges, np.array(value["counts"], np.int64))


def reference(x: NDArray[np.float32], quantiles: int = QUANTILES) -> Sketch:
    """Sketch of reference rows `x` [rows, columns], whose quantiles become the bins.

    Raises:
        ContractError: there are no rows, or `x` is not two-dimensional.
    """
    if x.ndim != 2 or not len(x):
        raise ContractError(f"a reference of shape {x.shape} has no rows to take quantiles of: give the training set")
    edges = np.full((x.shape[1], quantiles + 1), np.nan, np.float32)
    shares = np.linspace(0, 1, quantiles + 1)
    for column, values in enumerate(np.ascontiguousarray(x.T, np.float32)):
        known = values[np.isfinite(values)]
        if len(known):
            edges[column] = np.quantile(known, shares, method="inverted_cdf")
            edges[column, 0] = np.nextafter(edges[column, 0], np.float32(-np.inf))
    return Sketch(edges, _counted(x, edges))


def psi(expected: Sketch, actual: Sketch) -> NDArray[np.float64]:
    """Population stability index [columns] of `actual` against `expected`; by custom 0.1 is some, 0.25 much drift."""
    p, q = (_shares(sketch.counts) for sketch in (expected, actual))
    return np.asarray(((q - p) * np.log(q / p)).sum(axis=1), np.float64)


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    smooth = counts + _SMOOTHING
    return np.asarray(smooth / smooth.sum(axis=1, keepdims=True), np.float64)


def _counted(x: NDArray[np.float32], edges: NDArray[np.float32]) -> NDArray[np.int64]:
    counts = np.zeros((len(edges), edges.shape[1] + 2), np.int64)
    for column, values in enumerate(np.ascontiguousarray(x.T, np.float32)):
        # One comparison per edge gives the cumulative counts and is several times faster than a search per value.
        above = [np.count_nonzero(values > edge) for edge in edges[column]]
        unknown = np.count_nonzero(np.isnan(values))
        counts[column] = [*-np.diff([len(values) - unknown, *above, 0]), unknown]
    return counts
