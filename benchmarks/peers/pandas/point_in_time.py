"""pandas: `merge_asof`; windows as differences of running totals, each found by `merge_asof`.

Stored form: Parquet for the join (10 columns of doubles; Arrow's IPC form, mapped, was slower by the copy), read by
pyarrow into NumPy columns.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))
from answering import answer

HOUR = 3_600_000_000


def read(path: str, columns: list[str] | None = None) -> pd.DataFrame:
    # `split_blocks` spares the copy into one matrix, which `merge_asof` does not need.
    return pq.read_table(path, columns=columns).to_pandas(split_blocks=True, self_destruct=True)


def latest(told: dict[str, Any]) -> Any:
    columns = ["at", "entity", *told["columns"]]
    events, labels = read(told["events"], columns), read(told["labels"])
    if not told["sorted"]:
        events = events.sort_values("at", kind="stable")
    found = pd.merge_asof(labels, events, on="at", by="entity")
    return lambda: found[told["columns"]].to_numpy(np.float32)


def windows(told: dict[str, Any]) -> Any:
    events, labels = read(told["events"], ["at", "known", "entity", "x0"]), read(told["labels"])
    labels["at"] = labels["at"].astype("int64")
    time = events["at"].astype("int64").to_numpy()
    arrive = np.maximum(time, events["known"].astype("int64").to_numpy())
    fixed = np.rint(events["x0"].to_numpy() * 2**20).astype(np.int64)
    entity = events["entity"].to_numpy()
    in_n, in_sum = totals(labels, entity, arrive, fixed)
    out = []
    for width in (6 * HOUR, 168 * HOUR):
        leaves = arrive < time + width
        out_n, out_sum = totals(labels, entity[leaves], (time + width)[leaves], fixed[leaves])
        n = in_n - out_n
        out += [np.where(n > 0, (in_sum - out_sum) / 2**20 / np.maximum(n, 1), np.nan), n]
    return lambda: np.stack([out[0], out[2], out[1], out[3]], axis=1)


def totals(labels: pd.DataFrame, entity: Any, moment: Any, fixed: Any) -> tuple[Any, Any]:
    """Running count and sum of each label's entity at its moment."""
    frame = pd.DataFrame({"entity": entity, "at": moment, "sum": fixed})
    frame = frame.sort_values("at", kind="stable")
    by = frame.groupby("entity", sort=False)
    frame["n"], frame["sum"] = by.cumcount() + 1, by["sum"].cumsum()
    found = pd.merge_asof(labels, frame, on="at", by="entity")
    return (found[c].fillna(0).to_numpy().astype(np.int64) for c in ("n", "sum"))  # type: ignore[return-value]


answer({"latest": latest, "windows": windows})
