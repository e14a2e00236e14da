"""What was served and what the lake held then: a sample of the prediction log, and the lake's states over time.

Invariants: the sample depends on the log alone, so a check that is made again looks at the same rows; a state of the
lake is how many batches of each source it held, as the ledger's `rows.appended` tell.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors import wire
from raymill.actors.evaluate import Ints, moments
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.rollout import ColumnForm, ModelSpec
from raymill.runtime.lineage import PREDICTIONS

SAMPLE_ROWS = 2_000
"""Served rows of one check."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COLUMNS = ["id", "version", "at", "row", "x", "wall_s"]


@dataclass(frozen=True, slots=True)
class Span:
    """Which predictions are meant; an absent end is open."""

    start_at: int | None = None
    """First event time, µs UTC (inclusive)."""
    end_at: int | None = None
    """Last event time, µs UTC (exclusive)."""
    since_s: float = 0.0
    """Wall time before which what was answered is not meant: an earlier replay asked about the same moments."""


def sample(lake: Lake, model: str, span: Span, rows: int = SAMPLE_ROWS) -> pa.Table:
    """Predictions of a model that answered somebody, each once, evenly over their event times; at most `rows`.

    Columns `id`, `version`, `at`, `row` (JSON), `x`, `wall_s`; those that came as ready vectors are left out.
    """
    if lake.version(PREDICTIONS) is None:
        return pa.schema([(c, pa.null()) for c in _COLUMNS]).empty_table()
    where: list[tuple[str, str, Any]] = [
        ("model", "=", model),
        ("role", "!=", "shadow"),
        ("wall_s", ">=", span.since_s),
    ]
    where += [("at", ">=", instant(span.start_at))] if span.start_at is not None else []
    where += [("at", "<", instant(span.end_at))] if span.end_at is not None else []
    heads = lake.read(PREDICTIONS, columns=["id", "at"], where=where).sort_by(
        [("at", "ascending"), ("id", "ascending")]
    )
    if not heads.num_rows:
        return heads
    chosen = np.unique(np.linspace(0, heads.num_rows - 1, min(heads.num_rows, rows)).astype(np.int64))
    ids = heads["id"].take(pa.array(chosen)).unique()
    found = lake.read(PREDICTIONS, columns=_COLUMNS, where=[*where, ("id", "in", ids.to_pylist())])
    found = found.filter(pc.is_valid(found["row"])).sort_by([("id", "ascending"), ("wall_s", "ascending")])
    names = found["id"].to_numpy()
    first = np.flatnonzero(np.r_[True, names[1:] != names[:-1]]) if len(names) else np.empty(0, np.int64)
    return found.take(pa.array(first))


def request_rows(texts: Sequence[str], plan: FeaturePlan) -> pa.Table:
    """The columns that the plan's features read, of request rows as they stand in the log, at least one.

    Raises:
        ContractError: a row lacks one of them, or it is of another type.
    """
    columns = {c: ColumnForm(t, True) for c, t in plan.row.dtypes.items()}  # type: ignore[arg-type]
    form = ModelSpec(
        name=plan.pipeline, label="", inputs=plan.names, routes=(), columns=columns, required=plan.request_columns
    )
    parts = (texts[i : i + wire.MAX_REQUEST_ROWS] for i in range(0, len(texts), wire.MAX_REQUEST_ROWS))
    return pa.concat_tables(
        wire.read_json(b'{"rows":[' + ",".join(part).encode() + b"]}", form, 0).columns for part in parts
    )


def vectors(x: pa.ChunkedArray, width: int) -> npt.NDArray[np.float32]:
    """Logged vectors [rows, width] of that width, NaN for unknown."""
    flat: npt.NDArray[np.float32] = pc.fill_null(pc.list_flatten(x).cast(pa.float32()), float("nan")).to_numpy()
    return flat.reshape(len(x), width)


def events_of(lake: Lake, plan: FeaturePlan, source: str, version: int, last_at: int, since: int | None) -> pa.Table:
    """Rows of a source that the features need, of one version of the lake, with event times in [since, last_at]."""
    time = plan.sources[source].time
    where: list[tuple[str, str, Any]] = [(time, "<=", instant(last_at))]
    where += [(time, ">=", instant(since))] if since is not None else []
    return lake.read(source, version=version, columns=list(plan.source_columns(source)), where=where)


def reach(plan: FeaturePlan, source: str, first_at: int) -> int | None:
    """Event time before which rows of a source matter to no feature at `first_at` or later; None: all matter."""
    kept = [v.kept_us for v in plan.kept_views if v.source.name == source]
    return None if min(kept, default=0) < 0 else first_at - max(kept, default=0)


class LakeStates:
    """How many batches of each source the lake held at a moment, and which version that was."""

    def __init__(self, appended: Iterable[Mapping[str, Any]], pinned: Mapping[str, int]) -> None:
        """`appended` are the ledger's events `rows.appended`; `pinned` is source → version of the present."""
        self.pinned = dict(pinned)
        self._batches: dict[str, list[tuple[int, float, str]]] = {s: [] for s in pinned}
        for event in appended:
            if event["subject"] in self._batches and event["data"].get("accepted", 1):
                told = (int(event["data"]["lake_version"]), float(event["wall_s"]), str(event["data"].get("batch_id")))
                self._batches[event["subject"]].append(told)
        for batches in self._batches.values():
            batches.sort()

    def at(self, wall_s: float) -> tuple[int, ...]:
        """The state at a moment of wall time: batches of each source, in the order of `pinned`."""
        return tuple(bisect_right([b[1] for b in found], wall_s) for found in self._batches.values())

    def before(self, state: tuple[int, ...], steps: int) -> tuple[int, ...] | None:
        """The state so many batches of every source earlier; None: there is none, all of them had come to nothing."""
        if steps > max(state, default=0):
            return None
        return tuple(max(n - steps, 0) for n in state)

    def versions(self, state: tuple[int, ...]) -> dict[str, int | None]:
        """Source → version of its table in a state; None: it had no rows. What the ledger does not tell is present."""
        return {
            source: (batches[n - 1][0] if n else None) if batches else self.pinned[source]
            for (source, batches), n in zip(self._batches.items(), state, strict=True)
        }

    def batch(self, source: str, state: tuple[int, ...], steps: int) -> str:
        """Id of the batch that was the first one missing so many steps before a state; empty: there is none."""
        n = state[list(self._batches).index(source)] - steps
        batches = self._batches[source]
        return batches[n][2] if 0 <= n < len(batches) else ""


def instant(us: int) -> datetime:
    """µs UTC as the datetime that an Arrow filter compares with."""
    return _EPOCH + timedelta(microseconds=us)


def at_of(rows: pa.Table) -> Ints:
    """Event time of predictions, µs UTC."""
    return moments(rows["at"], 0)
