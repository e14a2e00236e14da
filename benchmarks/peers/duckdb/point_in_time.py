"""DuckDB: `ASOF JOIN`; windows as a join with a range of times, grouped. Stored form: Parquet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from answering import answer

CONNECTION = duckdb.connect()
CONNECTION.execute("SET preserve_insertion_order = false")


def latest(told: dict[str, Any]) -> Any:
    values = ", ".join(f"e.{c}" for c in told["columns"])
    found = CONNECTION.sql(
        f"SELECT l.row, {values} FROM read_parquet('{told['labels']}') l "
        f"ASOF LEFT JOIN read_parquet('{told['events']}') e ON l.entity = e.entity AND l.at >= e.at"
    ).to_arrow_table()
    return lambda: by_row(found, told["columns"])


def windows(told: dict[str, Any]) -> Any:
    # An integer total is exact whatever the order; of a label without events the left join keeps the row.
    parts = []
    for hours in (6, 168):
        inside = f"FILTER (e.at > l.at - INTERVAL {hours} HOUR)"
        total = f"sum(CAST(round_even(e.x0 * 1048576, 0) AS BIGINT)) {inside}"
        parts.append(f"{total} / 1048576.0 / count(e.x0) {inside} AS mean{hours}, count(e.x0) {inside} AS n{hours}")
    found = CONNECTION.sql(
        f"SELECT l.row, {', '.join(parts)} FROM read_parquet('{told['labels']}') l "
        f"LEFT JOIN read_parquet('{told['events']}') e ON l.entity = e.entity AND e.at <= l.at AND e.known <= l.at "
        f"AND e.at > l.at - INTERVAL 168 HOUR GROUP BY l.row"
    ).to_arrow_table()
    return lambda: by_row(found, ["mean6", "mean168", "n6", "n168"])


def by_row(found: Any, columns: list[str]) -> Any:
    found = found.sort_by("row")
    return np.stack([found.column(c).to_numpy().astype(np.float32) for c in columns], axis=1)


answer({"latest": latest, "windows": windows})
