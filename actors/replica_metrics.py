"""Gauges of a replica beside Serve's own counters, set once a second from what it counts anyway: nothing a request.

Serve has requests, latencies and errors by status (429 and 504 among them); here is what it can not know: how long
rows wait before the model, how large the batches are, what each version does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from raymill.actors.scaling import Load
from raymill.actors.version_health import Tally

EVERY_S = 1.0

OF_REPLICA = {
    "raymill_queue_delay_seconds": "95 of 100 rows of the last seconds waited no longer before their batch began.",
    "raymill_batch_seconds": "Time that a batch took lately, on the average.",
    "raymill_rows_per_second": "Rows that came in the last seconds.",
    "raymill_busy": "Share of the time in which the replica worked: CPU of its process.",
}
OF_VERSION = {
    "raymill_version_batches": "Batches that the version computed in the last minute.",
    "raymill_version_failed": "Of them: it raised, or an answer was not finite.",
    "raymill_version_slow": "Of them: it took longer than half of the model's latency target.",
    "raymill_version_batch_rows": "Rows of its average batch in the last minute.",
    "raymill_version_batch_seconds": "Time of its average batch in the last minute.",
}
Value = tuple[str, dict[str, str], float]
"""Name, labels, value."""


class Gauge(Protocol):
    """As `ray.serve.metrics.Gauge`."""

    def set(self, value: float, tags: dict[str, str]) -> None:
        """What it is now."""


def values(load: Load, tallies: Mapping[str, Mapping[int, Tally]]) -> Iterator[Value]:
    """What the gauges are to say."""
    told = (load.delay_s, load.service_s, load.rows_per_s, load.busy)
    yield from ((name, {}, value) for name, value in zip(OF_REPLICA, told, strict=True))
    for model, versions in tallies.items():
        for version, did in versions.items():
            each = max(did.calls, 1)
            counts = (did.calls, did.failed, did.slow, did.rows / each, did.seconds / each)
            labels = {"model": model, "version": str(version)}
            yield from ((name, labels, float(value)) for name, value in zip(OF_VERSION, counts, strict=True))


@dataclass
class ReplicaMetrics:
    """Sets the gauges; `publish` is called on the event loop, by itself every `EVERY_S` once `start` was."""

    load: Callable[[], Load]
    tallies: Callable[[], Mapping[str, Mapping[int, Tally]]]
    gauge: Callable[[str, str, tuple[str, ...]], Gauge]
    """Makes a gauge of a name, a description and the names of its labels."""
    _gauges: dict[str, Gauge] = field(default_factory=dict)
    _told: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    _timer: Any = None

    def start(self, loop: Any) -> None:
        """Publish now, and again and again on that loop."""
        self.publish()
        self._timer = loop.call_later(EVERY_S, self.start, loop)

    def stop(self) -> None:
        """Publish no more."""
        if self._timer is not None:
            self._timer.cancel()

    def publish(self) -> None:
        """Set every gauge; those of a version that answers no more fall to 0."""
        gone, self._told = self._told, {}
        for name, labels, value in values(self.load(), self.tallies()):
            self._of(name).set(value, labels)
            if labels:
                key = (labels["model"], labels["version"])
                self._told[key] = labels
                gone.pop(key, None)
        for labels in gone.values():
            for name in OF_VERSION:
                self._of(name).set(0.0, labels)

    def _of(self, name: str) -> Gauge:
        found = self._gauges.get(name)
        if found is None:
            labels = ("model", "version") if name in OF_VERSION else ()
            found = self._gauges[name] = self.gauge(name, (OF_REPLICA | OF_VERSION)[name], labels)
        return found
