"""raymill's join of a table that is five times the memory it is given: seconds, and what its process grew by.

`python -m benchmarks.ours.larger_than_memory LAKE LABELS`: a process of its own, so that its peak is its own. Vectors
are added up as they come, and compared with the join at once in the same process, whose peak is stated beside.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.ours.point_in_time_plans import COLUMNS, NEWEST_AND_WINDOWS
from raymill.actors.lake import Lake
from raymill.actors.point_in_time import join
from raymill.actors.stream import stream

SHARE = 5
_FIRST = 1 << 10


def peak_bytes() -> int:
    """Most memory that this process has had, mapped files included."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) << 10


def main(lake: str, labels: str) -> None:
    """Measure; one JSON line."""
    parts, asked = Lake(lake).parts("events", by="at"), pq.read_table(labels)
    table_bytes = len(parts) * 8 * COLUMNS
    memory_bytes = table_bytes // SHARE
    few = parts.take(next(parts.blocks()), parts.column_names, np.arange(_FIRST))
    for _ in stream(asked, NEWEST_AND_WINDOWS, {"events": few}, at="at", memory_bytes=_FIRST * _FIRST):
        break  # whatever is loaded or compiled once is there before the memory is looked at
    before, begun = peak_bytes(), time.perf_counter()
    total, slices = 0.0, 0
    for _, x in stream(asked, NEWEST_AND_WINDOWS, {"events": parts}, at="at", memory_bytes=memory_bytes):
        total += float(np.nansum(x, dtype=np.float64))
        slices += 1
    seconds, grown = time.perf_counter() - begun, peak_bytes() - before
    begun = time.perf_counter()
    whole = join(asked, NEWEST_AND_WINDOWS, {"events": parts}, at="at")
    at_once = time.perf_counter() - begun
    figures = {
        "table_bytes": table_bytes,
        "memory_bytes": memory_bytes,
        "grown_bytes": grown,
        "table_to_grown": table_bytes / max(grown, 1),
        "seconds": seconds,
        "slices": slices,
        "at_once_seconds": at_once,
        "at_once_grown_bytes": peak_bytes() - before,
        "same_total": bool(np.isclose(total, float(np.nansum(whole, dtype=np.float64)), rtol=1e-9)),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
