"""The callers of a replayed day: send its requests, count and time them."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa

from raymill.jobs.run import Progress, Run
from raymill.jobs.world import World
from raymill.runtime.errors import RaymillError

LATENCIES_KEPT = 20_000
"""Latencies that a run keeps for its percentiles; beyond, each second one is dropped."""


class Asking:
    """Sends requests one after another; the client repeats one under the same ids while a replica is down."""

    def __init__(self, world: World, run: Run) -> None:
        self._client, self._model = world.client, world.pipeline.name
        counts = run.progress.requests
        self.served = counts.get("served", 0)
        self._failed = counts.get("failed", 0)
        self._retried_before = counts.get("retried", 0)
        self._rows = counts.get("rows", 0)
        self._ms: list[float] = list(counts.get("ms", []))
        self._errors: list[str] = list(counts.get("errors", []))

    def ask(self, request: pa.Table) -> None:
        """One request; one that fails for good is counted, and told in the report."""
        began = time.perf_counter()
        try:
            answers = self._client.predict(self._model, request)
        except RaymillError as error:
            self._failed += 1
            self._errors = [*self._errors, f"{error.code}: {error.message}"][:20]
            return
        self._ms.append(round((time.perf_counter() - began) * 1e3, 3))
        self.served += 1
        self._rows += answers.num_rows
        if len(self._ms) > LATENCIES_KEPT:
            self._ms = self._ms[::2]

    def note(self, progress: Progress) -> None:
        """Put counts and latencies into the progress."""
        p50, p99 = np.percentile(self._ms, [50, 99]) if self._ms else (None, None)
        progress.requests = {
            "served": self.served,
            "failed": self._failed,
            "retried": self._retried_before + self._client.retried,
            "rows": self._rows,
            "p50_ms": None if p50 is None else round(float(p50), 3),
            "p99_ms": None if p99 is None else round(float(p99), 3),
            "ms": self._ms,
            "errors": self._errors,
        }
