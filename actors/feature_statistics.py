"""What a feature's values are like: count, share of nulls, mean, spread and quantiles; and who was never seen.

Pure: matrices and tables in, JSON values out. Means are over all rows; quantiles over at most `QUANTILE_ROWS` of them,
evenly spaced, which moves a decile by less than half a percentage point of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors import sketches
from raymill.actors.entities import column_of, entity_codes
from raymill.actors.evaluate import Ints, moments
from raymill.actors.feature_plan import FeaturePlan, ViewPlan
from raymill.actors.point_in_time import with_lookups
from raymill.actors.windows import NEVER

QUANTILE_ROWS = 20_000
"""Rows that quantiles are taken of, at most."""


def describe(x: npt.NDArray[np.float32], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Statistics of feature vectors `x` [rows, features], NaN for unknown, at least one row.

    Returns:
        Feature → `count` of known values, `null_share`, `mean` and `std` (null where nothing is known), and
        `quantiles`: smallest value, the nine deciles between, largest value (of the rows they are taken of).
    """
    thinned = x[np.unique(np.linspace(0, len(x) - 1, min(len(x), QUANTILE_ROWS)).astype(np.int64))]
    edges = sketches.reference(thinned).edges
    found = {}
    for j, name in enumerate(names):
        column = np.ascontiguousarray(x[:, j])
        known = column[np.isfinite(column)].astype(np.float64)
        found[name] = {
            "count": len(known),
            "null_share": 1 - len(known) / len(x),
            "mean": float(known.mean()) if len(known) else None,
            "std": float(known.std()) if len(known) else None,
            "quantiles": _quantiles(edges[j]) if len(known) else None,
        }
    return found


def unseen_shares(plan: FeaturePlan, events: Mapping[str, pa.Table], rows: pa.Table, at: Ints) -> dict[str, float]:
    """View → share of the rows whose entity had no event yet that was known at the row's moment.

    Args:
        plan: the features.
        events: source → its rows.
        rows: request rows with the plan's `request_columns`, at least one.
        at: moment of each, µs UTC.
    """
    rows = with_lookups(rows, plan, events, at)
    return {v.name: float(unseen(v, events[v.source.name], rows, at).mean()) for v in plan.event_views}


def unseen(view: ViewPlan, events: pa.Table, rows: pa.Table, at: Ints) -> npt.NDArray[np.bool_]:
    """Bool [rows]: whether the view knew no event of the row's entity at its moment; so is one without a key."""
    codes, asked, groups = entity_codes(view, events, rows)
    known = moments(column_of(events, view.source.time), NEVER)
    if view.source.known_at is not None:
        known = np.maximum(known, moments(column_of(events, view.source.known_at), NEVER))
    first = np.full(groups, NEVER)
    has = codes >= 0
    np.minimum.at(first, codes[has], known[has])
    there = np.flatnonzero(asked >= 0)
    out = np.ones(len(rows), np.bool_)
    out[there] = first[asked[there]] > at[there]
    return out


def _quantiles(edges: npt.NDArray[np.float32]) -> list[float]:
    lowest = np.nextafter(edges[0], np.float32(np.inf))  # a sketch's first bin ends just below its smallest value
    return [float(lowest), *(float(e) for e in edges[1:])]
