"""Recomputes served vectors from the lake by the point-in-time join, says why some differ, and tells the ledger.

Each row is held against the definitions that its model version was trained with: that is what must have been served.
Whatever differs is looked up in the lake as it was when the row was served, then in the states before that, then under
the pipeline's other definitions. It writes two events, each once for the same sample and lake:

- `consistency.judged`: the `Consistency` as JSON.
- `features.observed`: `{model, feature_hashes, rows, start_at, end_at, features, unseen}`, with the statistics that
  `feature_statistics` gives of each feature's served values and each view's share of rows without a known entity.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymill.actors import consistency
from raymill.actors.consistency import Cause, Codes, Consistency, Vectors, agree, number
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.feature_statistics import describe, unseen_shares
from raymill.actors.lake import Lake
from raymill.actors.mismatches import STATES, Definitions, Mismatches, ServedRows
from raymill.actors.served import SAMPLE_ROWS, LakeStates, Span, at_of, sample
from raymill.runtime.errors import Unavailable, UnknownModel, UnknownVersion
from raymill.runtime.expressions import digest
from raymill.runtime.feature_registry import JUDGED, OBSERVED
from raymill.runtime.messages import Event, ModelVersion
from raymill.runtime.stores import Online


class Records(Protocol):
    """Registry and ledger, as far as a check needs them."""

    def get(self, model: str, version: int) -> ModelVersion:
        """One version."""

    def events(self, kind: str | None = None, *, pipeline: str | None = None) -> list[dict[str, Any]]:
        """Events of a kind, in order."""

    def append(self, events: Sequence[Event]) -> None:
        """Write events."""


@dataclass(slots=True)
class _Found:
    """What a check gathers, part by part."""

    model: str
    known: list[tuple[str, Definitions]]
    """Of every training set of the model: digest of its manifest, and its definitions."""
    cells: dict[str, list[Codes]] = field(default_factory=lambda: defaultdict(list))
    whys: dict[str, str] = field(default_factory=dict)
    mismatched: int = 0
    observed: list[dict[str, Any]] = field(default_factory=list)
    pinned: dict[str, int] = field(default_factory=dict)
    states_left: list[int] = field(default_factory=lambda: [STATES])


class Recompute:
    """Checks served vectors of any model against the lake; holds nothing open."""

    def __init__(self, lake: Lake, records: Records, online: Online | None = None) -> None:
        """`online` is the place of the online store; it is asked only where no state of the lake explains a value."""
        self._lake = lake
        self._records = records
        self._online = online

    def check(
        self,
        model: str,
        span: Span | None = None,
        *,
        rows: int = SAMPLE_ROWS,
        tolerance: float = consistency.TOLERANCE,
        observe: bool = True,
    ) -> Consistency:
        """Judge a sample of the predictions that `span` means, and write it down.

        Without `observe` no statistics are taken, and of the lake only what the sample's moments reach is read.

        Raises:
            Unavailable: no training set of this model is in the ledger, so its definitions are not known.
            SpecError: a definition that answered calls a Python function that is not here, or is another one here.
            StoreError: the lake can not be read.
        """
        served = sample(self._lake, model, span or Span(), rows)
        found = _Found(model, self._definitions(model) if served.num_rows else [])
        for defined, part in self._by_definitions(served, found):
            self._recomputed(defined, part, found, observe)
        at = at_of(served) if served.num_rows else np.zeros(1, np.int64)
        cells = {name: np.concatenate(codes) for name, codes in found.cells.items()}
        findings, alert, reason = consistency.judge(cells, found.whys, served.num_rows, tolerance)
        judged = Consistency(
            model=model,
            start_at=int(at.min()),
            end_at=int(at.max()),
            rows=served.num_rows,
            mismatched=found.mismatched,
            lake_versions=found.pinned,
            features=findings,
            tolerance=tolerance,
            alert=alert,
            reason=reason,
        )
        if served.num_rows:
            self._tell(judged, found.observed, digest(served["id"].to_pylist(), found.pinned, tolerance))
        return judged

    def _definitions(self, model: str) -> list[tuple[str, Definitions]]:
        """(digest of the manifest, definitions) of every training set of the model, oldest first."""
        made = self._records.events("training_set.made", pipeline=model)
        if not made:
            raise Unavailable(f"the ledger knows no training set of {model!r}: its definitions can not be looked up")
        plans: dict[str, Definitions] = {}
        found = []
        for event in made:
            text, manifest = json.dumps(event["data"]["plan"]), event["data"]["manifest"]
            found.append((digest(manifest), plans.setdefault(text, Definitions(text, manifest["feature_hashes"]))))
        return found

    def _by_definitions(self, served: pa.Table, found: _Found) -> Iterator[tuple[Definitions, pa.Table]]:
        """The sample in parts whose versions were trained with the same definitions."""
        by_manifest = dict(found.known)
        parts: dict[int, tuple[Definitions, list[int]]] = {}
        for version in served["version"].unique().to_pylist() if served.num_rows else []:
            defined = by_manifest.get(self._manifest_digest(found.model, version), found.known[-1][1])
            parts.setdefault(id(defined), (defined, []))[1].append(version)
        for defined, versions in parts.values():
            yield defined, served.filter(pc.is_in(served["version"], value_set=pa.array(versions, pa.int64())))

    def _manifest_digest(self, model: str, version: int) -> str:
        try:
            manifest = self._records.get(model, version).manifest
        except (UnknownModel, UnknownVersion):  # a model file that was served alone
            return ""
        return "" if manifest is None else digest(asdict(manifest))

    def _recomputed(self, defined: Definitions, part: pa.Table, found: _Found, observe: bool) -> None:
        """Hold a part of the sample against the lake."""
        plan = defined.plan
        fits = pc.equal(pc.list_value_length(part["x"]), len(plan.names))
        strange = part.num_rows - int(pc.sum(fits).as_py() or 0)
        if strange:
            self._note_strange(plan, strange, found)
        part = part.filter(fits)
        if not part.num_rows:
            return
        pinned = {s: v for s in plan.sources if (v := self._lake.version(s)) is not None}
        found.pinned |= pinned
        there = ServedRows((self._lake, self._online), plan, part, pinned)
        now, tables = there.joined(dict(pinned), None if observe else np.arange(part.num_rows))
        codes = self._explained(there, now, defined, found)
        for j, name in enumerate(plan.names):
            found.cells[name].append(codes[:, j])
        if observe:
            found.observed.append(
                {
                    "model": found.model,
                    "feature_hashes": defined.hashes,
                    "rows": part.num_rows,
                    "start_at": int(there.at.min()),
                    "end_at": int(there.at.max()),
                    "features": describe(there.served, plan.names),
                    "unseen": unseen_shares(plan, tables, there.rows, there.at),
                }
            )

    def _explained(self, there: ServedRows, now: Vectors, defined: Definitions, found: _Found) -> Codes:
        """The cause of every cell [rows, features] that differs."""
        codes = np.zeros(there.served.shape, np.int8)
        wrong = np.flatnonzero((~agree(there.served, now)).any(axis=1))
        found.mismatched += len(wrong)
        if len(wrong):
            states = LakeStates(self._records.events("rows.appended"), there.pinned)
            others = list(dict.fromkeys(d for _, d in found.known if d is not defined))
            cells = Mismatches(there, now, states, [defined, *others])
            for rows, explained, whys in cells.explained(wrong, found.states_left):
                codes[rows] = explained.codes
                found.whys = {**whys, **found.whys}
        return codes

    def _note_strange(self, plan: FeaturePlan, rows: int, found: _Found) -> None:
        """Vectors of another width than the version's definitions give: code, in every feature."""
        found.mismatched += rows
        for name in plan.names:
            found.cells[name].append(np.full(rows, number(Cause.CODE), np.int8))
            found.whys.setdefault(
                name, f"vectors were served that do not have the {len(plan.names)} features of the definitions"
            )

    def _tell(self, judged: Consistency, observed: list[dict[str, Any]], key: str) -> None:
        model, now = judged.model, time.time()
        told = [
            Event(
                kind=OBSERVED,
                subject=model,
                pipeline=model,
                at=data["end_at"],
                wall_s=now,
                data=data,
                key=f"{OBSERVED}/{model}/{digest(key, data['feature_hashes'])}",
            )
            for data in observed
        ]
        told.append(
            Event(
                kind=JUDGED,
                subject=model,
                pipeline=model,
                at=judged.end_at,
                wall_s=now,
                data=judged.to_json(),
                key=f"{JUDGED}/{model}/{key}",
            )
        )
        self._records.append(told)
