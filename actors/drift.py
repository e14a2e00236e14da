"""The drift monitor: sees every prediction, waits for the labels, and says in money whether a retrain is worth it.

The alarm is regret: what the live version cost more than the best known alternative on the same rows. Shifted
inputs are told as a diagnosis and start nothing by themselves. Alternatives are the baseline, retired versions, and
a cheap refit on what was predicted and labelled before the period began;
none of them has seen the period's labels.

Invariants: a verdict depends only on what the lake and the ledger hold, so a restarted monitor gives the same one;
rows that come twice count once; a label counts only if it was known at the end of the period.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymill.actors import detectors, scores, sketches
from raymill.actors.alternatives import Program, alternatives, refitted, trained_until
from raymill.actors.evaluate import columns_of, evaluate, moments
from raymill.actors.lake import Lake
from raymill.actors.observed import COLUMNS, NEVER, Observed, Rows, key_texts
from raymill.actors.retrain import CanaryEvidence, worth_it
from raymill.actors.row_refs import table_of
from raymill.runtime.errors import Conflict, ModelError, StoreError
from raymill.runtime.expressions import duration_us
from raymill.runtime.home import Home
from raymill.runtime.messages import Event, Ingested, ModelVersion, Verdict
from raymill.runtime.records import RecordsActor, RemoteRecords
from raymill.runtime.spec import Label, Pipeline
from raymill.runtime.stores import places_of

Floats = NDArray[np.float64]

PREDICTIONS = "predictions"
"""Lake table of the prediction log."""

CANARY_LOOKS = 5
"""Looks at a canary for which its bounds are corrected."""


class DriftMonitor:
    """Watches one pipeline's predictions; safe for several threads."""

    def __init__(
        self,
        home: str | Path,
        pipeline: Pipeline,
        records: RecordsActor | RemoteRecords | None = None,
        since_s: float = 0.0,
        load: Callable[[int], Program] | None = None,
        label_value: Callable[[pa.Table], NDArray[np.float64]] | None = None,
    ) -> None:
        """What to watch, and where.

        Args:
            home: RAYMILL_HOME.
            pipeline: whose predictions.
            records: ledger and registry; absent: the actor of that name.
            since_s: answers given before this wall time are not looked at (a replay goes through the same event
                time as the one before it).
            load: a version's program; absent: the registry's.
            label_value: label of each row of its source; absent: the pipeline's rule.
        """
        self._home = Home(Path(home))
        self._pipeline = pipeline
        self._records = records if records is not None else RemoteRecords()
        self._since_s = since_s
        self._load = load or partial(_load_registered, self._records, pipeline.name)
        self._label_value = label_value or partial(label_values, pipeline.label)
        self._lock = threading.RLock()
        self._segments: set[str] = set()
        self._programs: dict[int, Program] = {}
        self._references: dict[int, sketches.Sketch] = {}
        self._observed = self._empty()

    def start(self) -> None:
        """Rebuild the window from lake and ledger."""
        lake = Lake(places_of(self._home, self._pipeline.stores).lake)
        source = self._pipeline.label.source
        lake.migrate(source)  # the data actor does so too, and may come later
        tables = lake.tables()
        with self._lock:
            self._observed, self._segments = self._empty(), set()
            for event in self._records.events("drift.referenced", pipeline=self._pipeline.name):
                data = event["data"]
                self._references[data["version"]] = sketches.Sketch.from_json(data["sketch"])
            if PREDICTIONS in tables:
                mine = [("model", "=", self._pipeline.name), ("wall_s", ">=", self._since_s)]
                self._observed.add_predictions(lake.read(PREDICTIONS, columns=COLUMNS, where=mine))
            if source.name in tables:
                columns = {*source.key, source.known_at or source.time, *self._pipeline.label.value.columns()}
                self.labels(lake.read(source.name, columns=sorted(columns)))

    def stop(self) -> None:
        """Nothing to close: everything durable lies elsewhere."""

    def health(self) -> bool:
        """Whether it answers."""
        return True

    def reference(
        self, version: int, training_x: NDArray[np.float32], training_p: NDArray[np.float32] | None = None
    ) -> None:
        """Set what `version` was trained on, `training_x` [rows, features], as the reference of its drift.

        `training_p` [rows] is its answer on them; absent: computed. Once set, a version's reference stays.
        """
        if training_p is None:
            training_p = self._program(version)(training_x)
        sketch = sketches.reference(np.column_stack([training_x, training_p]).astype(np.float32))
        data = {"version": version, "sketch": sketch.to_json()}
        self._record("drift.referenced", version, data, at=None, key=f"{version}")
        with self._lock:
            self._references.setdefault(version, sketch)

    def observe(self, segment: str, predictions: pa.Table) -> int:
        """Take in a segment of the prediction log; a segment or an id that was seen before counts once.

        Returns the rows that are looked at: those of this model that answered somebody, sampled as declared.
        """
        with self._lock:
            if segment in self._segments:
                return 0
            mine = pc.and_(
                pc.equal(predictions.column("model"), self._pipeline.name),
                pc.greater_equal(predictions.column("wall_s"), self._since_s),
            )
            kept = self._observed.add_predictions(predictions.filter(mine).select(COLUMNS))
            self._segments.add(segment)
            return kept

    def take(self, done: Ingested) -> None:
        """Take in what the DataActor accepted; rows of other sources than the label's are passed over."""
        if done.source == self._pipeline.label.source.name:
            self.labels(table_of(done.rows_ref))

    def labels(self, rows: pa.Table) -> int:
        """Take in rows of the label's source; returns how many carry a label. Rows may come twice."""
        source = self._pipeline.label.source
        known_at = moments(rows.column(source.known_at or source.time), null=NEVER)
        keys, values = key_texts(rows, source), self._label_value(rows)
        with self._lock:
            return self._observed.add_labels(keys, values, known_at)

    def verdict(self, start_at: int, end_at: int) -> Verdict:
        """What the period cost, against the best known alternative, by the labels known at its end.

        Rows that the live version may have been trained on are left out: nobody is judged by what he has seen.

        Raises:
            Conflict: nothing is live.
        """
        live = self._live()
        fair_from = min(max(start_at, trained_until(live)), end_at)
        period = self._rows(start_at, end_at, end_at)
        judged = period.where(period.at >= fair_from).labelled
        cost = self._cost(self._answers(live, judged), judged, live.threshold)
        found = detectors.paired_regret(
            cost,
            self._alternative_costs(live, judged, fair_from),
            judged.at,
            confidence=self._pipeline.monitor.confidence,
        )
        drift, output = self._drift(live.version, period)
        retrain, reason = worth_it(found, len(judged), drift, self._pipeline.monitor)
        verdict = Verdict(
            model=self._pipeline.name,
            version=live.version,
            start_at=start_at,
            end_at=end_at,
            predictions=len(period),
            labelled=len(judged),
            cost=float(cost.sum()),
            best_alternative=found.alternative,
            best_alternative_cost=found.alternative_cost * len(judged),
            regret=found.regret,
            regret_low=found.low,
            auc=scores.auc(self._answers(live, judged), judged.y),
            input_drift=drift,
            output_drift=output,
            retrain=retrain,
            reason=reason,
        )
        self._record(
            "drift.judged", live.version, asdict(verdict), at=end_at, key=f"{live.version}:{start_at}:{end_at}"
        )
        return verdict

    def canary(self, version: int, start_at: int, end_at: int) -> CanaryEvidence:
        """Canary and live version on the same rows: all that were predicted in the time, whoever answered them.

        Raises:
            Conflict: nothing is live.
        """
        live = self._live()
        rows = self._rows(start_at, end_at, end_at)
        judged = rows.labelled
        broken, not_finite, canary_cost = "", 0, np.zeros(len(judged))
        canary = self._records.get(self._pipeline.name, version)
        try:
            not_finite = _improbable(self._answers(canary, rows))
            canary_cost = self._cost(self._answers(canary, judged), judged, canary.threshold)
        except (ModelError, StoreError) as err:
            broken = err.message
        live_cost = self._cost(self._answers(live, judged), judged, live.threshold)
        low, high = self._bounds(canary_cost - live_cost, judged.at)
        evidence = CanaryEvidence(
            version=version,
            live_version=live.version,
            start_at=start_at,
            end_at=end_at,
            answered=int((rows.version == version).sum()),
            not_finite=not_finite,
            labelled=len(judged),
            canary_cost=_mean(canary_cost),
            live_cost=_mean(live_cost),
            difference=_mean(canary_cost - live_cost),
            low=low,
            high=high,
            broken=broken,
        )
        self._record("canary.looked", version, asdict(evidence), at=end_at, key=f"{version}:{start_at}:{end_at}")
        return evidence

    def figures(self, start_at: int, end_at: int, known_until: int | None = None) -> dict[str, Any]:
        """What the answers of a period really cost, whoever gave them, beside the baseline: for reports.

        `predictions, labelled, auc, usd, by_version {version: predictions}`, with a baseline `baseline_auc,
        baseline_usd`, and `regret_usd`, the cost minus that of the cheapest alternative. Unknown: null. Labels are
        those known at `known_until`; absent: all.
        """
        rows = self._rows(start_at, end_at, NEVER if known_until is None else known_until)
        judged = rows.labelled
        threshold = self._pipeline.monitor.cost.threshold
        cost = self._cost(judged.p, judged, threshold)
        versions, counts = np.unique(rows.version, return_counts=True)
        found: dict[str, Any] = {
            "predictions": len(rows),
            "labelled": len(judged),
            "auc": scores.auc(judged.p, judged.y),
            "usd": float(cost.sum()),
            "by_version": dict(zip(versions.tolist(), counts.tolist(), strict=True)),
            "baseline_auc": math.nan,
            "baseline_usd": math.nan,
        }
        known = self._records.versions(self._pipeline.name)
        baseline = next((v for v in reversed(known) if v.kind == "baseline"), None)
        if baseline is not None and len(judged):
            p = self._answers(baseline, judged)
            found["baseline_auc"] = scores.auc(p, judged.y)
            found["baseline_usd"] = float(self._cost(p, judged, baseline.threshold).sum())
        others = self._alternative_costs(None, judged, start_at)
        cheapest = min((float(c.sum()) for c in others.values()), default=math.nan)
        found["regret_usd"] = found["usd"] - cheapest
        return {k: _or_null(v) for k, v in found.items()}

    def _alternative_costs(self, live: ModelVersion | None, rows: Rows, fair_from: int) -> dict[str, Floats]:
        """Cost per row of everything that could have answered instead, and has not seen these rows."""
        costs: dict[str, Floats] = {}
        if not len(rows):
            return costs
        for version in alternatives(self._records.versions(self._pipeline.name), live, fair_from):
            name = (
                f"baseline (version {version.version})" if version.kind == "baseline" else f"version {version.version}"
            )
            try:
                costs[name] = self._cost(self._answers(version, rows), rows, version.threshold)
            except (ModelError, StoreError):
                continue  # what can not be run is no alternative
        refit = refitted(self._rows(0, fair_from, fair_from).labelled)
        if refit is not None:
            costs["refit"] = self._cost(refit(rows.x), rows, self._pipeline.monitor.cost.threshold)
        return costs

    def _drift(self, version: int, rows: Rows) -> tuple[dict[str, float], float]:
        """PSI by feature of all rows, and of the version's own answers; empty and NaN without reference or rows."""
        with self._lock:
            reference = self._references.get(version)
        if reference is None or not len(rows):
            return {}, math.nan
        own = rows.version == version
        table = np.column_stack([rows.x, np.where(own, rows.p, np.nan)]).astype(np.float32)
        inputs = sketches.psi(reference, reference.of(table))[:-1]
        output = sketches.psi(reference, reference.of(table[own]))[-1] if own.any() else math.nan
        return dict(zip(self._pipeline.feature_names, inputs.tolist(), strict=True)), float(output)

    def _bounds(self, difference: Floats, at: NDArray[np.int64]) -> tuple[float, float]:
        if not len(difference):
            return 0.0, 0.0
        tail = (1 - self._pipeline.monitor.confidence) / CANARY_LOOKS
        low, high = np.quantile(detectors.resampled_means(difference[:, None], at)[:, 0], [tail, 1 - tail])
        return float(low), float(high)

    def _answers(self, version: ModelVersion, rows: Rows) -> NDArray[np.float32]:
        """What the version answered, or would have answered, on the logged vectors."""
        own = rows.version == version.version
        if own.all():
            return rows.p
        p = rows.p.copy()
        p[~own] = self._program(version.version)(rows.x[~own])
        return p

    def _program(self, version: int) -> Program:
        with self._lock:
            if version not in self._programs:
                self._programs[version] = self._load(version)
            return self._programs[version]

    def _cost(self, p: NDArray[np.float32], rows: Rows, threshold: float) -> Floats:
        return detectors.costs(p, rows.y, threshold, self._pipeline.monitor.cost)

    def _rows(self, start_at: int, end_at: int, known_until: int) -> Rows:
        with self._lock:
            return self._observed.rows(start_at, end_at, known_until)

    def _live(self) -> ModelVersion:
        live = self._records.live(self._pipeline.name)
        if live is None:
            raise Conflict(f"model {self._pipeline.name!r} has no live version to watch: promote one first")
        return live

    def _empty(self) -> Observed:
        monitor = self._pipeline.monitor
        return Observed(len(self._pipeline.feature_names), duration_us(monitor.every), sample=monitor.sample)

    def _record(self, kind: str, version: int, data: dict[str, Any], *, at: int | None, key: str) -> None:
        event = Event(
            kind=kind,
            subject=f"{self._pipeline.name}/{version}",
            pipeline=self._pipeline.name,
            at=at,
            wall_s=time.time(),
            data={name: _or_null(value) for name, value in data.items()},
            key=f"{kind}:{self._pipeline.name}:{key}",
        )
        self._records.append([event])


def label_values(label: Label, rows: pa.Table) -> Floats:
    """The label of each row of its source: 0, 1, or NaN where it never comes."""
    dtypes = {name: column.dtype for name, column in label.source.schema.items()}
    return evaluate(label.value, columns_of(rows, label.value.columns(), dtypes), rows.num_rows)


def _load_registered(records: RecordsActor | RemoteRecords, model: str, version: int) -> Program:
    # torch is imported only where a registered program is run.
    from raymill.actors.program import load_program

    return load_program(records.program(records.get(model, version).digest))


def _improbable(p: NDArray[np.float32]) -> int:
    return int((~((p >= 0) & (p <= 1))).sum())


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
