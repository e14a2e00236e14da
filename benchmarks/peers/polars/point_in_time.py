"""polars: `join_asof`; windows as differences of running totals, each found by `join_asof`. Stored form: Parquet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).parents[1]))
from answering import answer

HOUR = 3_600_000_000


def latest(told: dict[str, Any]) -> Any:
    events = pl.scan_parquet(told["events"]).select("at", "entity", *told["columns"])
    if not told["sorted"]:
        events = events.sort("at")
    events = events.set_sorted("at")
    labels = pl.scan_parquet(told["labels"]).set_sorted("at")
    found = labels.join_asof(events, on="at", by="entity", check_sortedness=False).collect()
    return lambda: found.select(pl.col(told["columns"]).cast(pl.Float32)).to_numpy()


def windows(told: dict[str, Any]) -> Any:
    events = pl.scan_parquet(told["events"]).select(
        pl.col("at").dt.epoch("us").alias("time"),
        pl.max_horizontal(pl.col("at"), pl.col("known")).dt.epoch("us").alias("arrive"),
        "entity",
        (pl.col("x0") * 2**20).round(mode="half_to_even").cast(pl.Int64).alias("sum"),
    )
    labels = pl.scan_parquet(told["labels"]).select(pl.col("at").dt.epoch("us"), "entity")
    joined = totals(labels, events.rename({"arrive": "at"}).sort("at"), "in")
    for hours in (6, 168):
        leaves = events.with_columns((pl.col("time") + hours * HOUR).alias("at")).filter(
            pl.col("arrive") < pl.col("at")
        )
        leaves = leaves if told["sorted"] else leaves.sort("at")
        joined = totals(joined, leaves, f"out{hours}")
    n = {h: pl.col("in_n") - pl.col(f"out{h}_n") for h in (6, 168)}
    total = {h: pl.col("in_sum") - pl.col(f"out{h}_sum") for h in (6, 168)}
    means = [pl.when(n[h] > 0).then(total[h] / 2**20 / n[h]).alias(f"mean{h}") for h in (6, 168)]
    found = joined.select(*means, *(n[h].alias(f"n{h}") for h in (6, 168))).collect()
    return lambda: found.cast(pl.Float32).fill_null(np.nan).to_numpy()


def totals(labels: pl.LazyFrame, events: pl.LazyFrame, name: str) -> pl.LazyFrame:
    """The labels with the running count and sum of their entity at their moment."""
    running = events.select(
        pl.col("at"),
        "entity",
        pl.int_range(1, pl.len() + 1, dtype=pl.Int64).over("entity").alias(f"{name}_n"),
        pl.col("sum").cum_sum().over("entity").alias(f"{name}_sum"),
    ).set_sorted("at")
    joined = labels.set_sorted("at").join_asof(running, on="at", by="entity", check_sortedness=False)
    return joined.with_columns(pl.col(f"{name}_n", f"{name}_sum").fill_null(0))


answer({"latest": latest, "windows": windows})
