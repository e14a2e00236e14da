"""Recorded rows cut into history and days, and each day's rows turned into requests: pure, no clock, no cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors.data import SEEDED
from raymill.actors.keys import first_alike
from raymill.runtime.errors import SpecError
from raymill.runtime.source_spec import parents_first
from raymill.runtime.spec import Pipeline, Replay, Source

DAY_US = 86_400_000_000


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one source and one day."""

    source: str
    """Source they belong to."""
    batch_id: str
    """Idempotency key: the same rows always get the same."""
    rows: pa.Table
    """The rows."""


class Recording:
    """All recorded rows of a pipeline's sources, sorted by event time, cut by UTC day."""

    def __init__(self, pipeline: Pipeline, tables: dict[str, pa.Table]) -> None:
        """Sort the tables once.

        Args:
            pipeline: its sources and its `replay`.
            tables: source → its recorded rows.

        Raises:
            SpecError: the pipeline declares no replay, or a date in it is none.
        """
        if pipeline.replay is None:
            raise SpecError(f"pipeline {pipeline.name!r} has no replay: add replay=Replay(history_until=...)")
        self.replay: Replay = pipeline.replay
        self.pipeline = pipeline
        self._tables = {s.name: tables[s.name].sort_by(_order(s)) for s in pipeline.sources}
        self._times = {s.name: _times(self._tables[s.name], s) for s in pipeline.sources}
        self.start = moment(self.replay.history_until)
        ends = [int(t[-1]) for t in self._times.values() if len(t)]
        self.end = (
            moment(self.replay.until) if self.replay.until else (max(ends, default=self.start) // DAY_US + 1) * DAY_US
        )
        self._seeded = self.replay.drills.bad_rows() if self.replay.drills.bad_rows else []

    def days(self, since: int | None = None) -> list[int]:
        """Starts of the days to replay, µs UTC, from `since` on."""
        return list(range(self.start if since is None else since, self.end, DAY_US))

    def history(self) -> Iterator[Batch]:
        """What is known before the replay begins, one batch a source; what others refer to comes first."""
        for source in parents_first(self.pipeline.sources):
            yield Batch(
                source.name,
                f"{source.name}/until-{self.replay.history_until}",
                self._between(source.name, None, self.start),
            )

    def batches(self, day: int) -> Iterator[Batch]:
        """The day's rows of every source that has some; faulty ones that were mixed in come as batches of their own."""
        text = iso_date(day)
        for source in parents_first(self.pipeline.sources):
            rows = self._between(source.name, day, day + DAY_US)
            if rows.num_rows:
                yield Batch(source.name, f"{source.name}/{text}", rows)
        for number, (name, on, rows) in enumerate(self._seeded):
            if on == text:
                yield Batch(name, f"{SEEDED}{number}/{name}/{text}", rows)

    def requests(self, day: int, run: str) -> Iterator[pa.Table]:
        """The day's label rows as requests, in event time order: `id`, `at`, the key, and what the features read.

        Of a row that was corrected the first version asks.
        """
        source = self.pipeline.label.source
        rows = self._between(source.name, day, day + DAY_US)
        if source.corrected:
            first = first_alike(rows.select(list(source.key)))
            rows = rows.filter(pa.array(first == np.arange(len(first))))
        columns = {c: rows.column(c) for c in dict.fromkeys([*source.key, *self.pipeline.request_columns])}
        ids = [f"{run}-{iso_date(day)}-{i:05d}" for i in range(rows.num_rows)]
        table = pa.table({"id": pa.array(ids), "at": rows.column(source.time), **columns})
        for begin in range(0, table.num_rows, self.replay.rows_per_request):
            yield table.slice(begin, self.replay.rows_per_request)

    def _between(self, source: str, start: int | None, end: int) -> pa.Table:
        times = self._times[source]
        first = 0 if start is None else int(np.searchsorted(times, start))
        return self._tables[source].slice(first, int(np.searchsorted(times, end)) - first)


def moment(text: str) -> int:
    """Start of an event date (YYYY-MM-DD, UTC), µs.

    Raises:
        SpecError: the text is no such date.
    """
    try:
        day = date.fromisoformat(text)
    except ValueError as err:
        raise SpecError(f"{text!r} is no event date: write YYYY-MM-DD") from err
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1_000_000


def iso_date(at: int) -> str:
    """Event date of a moment, YYYY-MM-DD, UTC."""
    return datetime.fromtimestamp(at / 1e6, UTC).date().isoformat()


def _order(source: Source) -> list[tuple[str, str]]:
    versions = [source.known_at] if source.corrected and source.known_at else []
    return [(column, "ascending") for column in (source.time, *versions)]


def _times(table: pa.Table, source: Source) -> np.ndarray:
    return pc.cast(table.column(source.time), pa.int64()).to_numpy()
