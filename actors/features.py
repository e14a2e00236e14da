"""FeatureActor: one definition of every feature, as training sets from the lake and as vectors from the online store.

Invariants
- A training set is a function of its manifest alone: pinned lake versions, the definitions, the label's rule and the
  range of time; its rows are sorted by (event time, key hash), whatever order the lake gives them in.
- A row's features are those of its own event time; its label counts only if it was known at `known_until`. Of a row
  that was corrected the label is that of the newest version known then, all else that of the first one: what was
  corrected later could not be asked with.
- The online store holds every row that the lake held at its `lake_version`; what a crash or a missed batch left out is
  read again from the lake, which changes nothing that is in already.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.evaluate import Ints, columns_of, evaluate
from raymill.actors.feature_plan import FeaturePlan, SourcePlan
from raymill.actors.feature_statistics import describe
from raymill.actors.lake import Lake
from raymill.actors.lake_join import LakeJoin
from raymill.actors.media import MEDIA
from raymill.actors.media_files import with_bytes
from raymill.actors.observed import key_texts
from raymill.actors.online import KEEP, OnlineReader, OnlineStore
from raymill.actors.point_in_time import History
from raymill.actors.row_refs import shared, table_of
from raymill.actors.windows import NEVER, warm
from raymill.runtime.errors import Conflict
from raymill.runtime.expressions import digest, duration_us
from raymill.runtime.feature_registry import DESCRIBED
from raymill.runtime.home import Home
from raymill.runtime.messages import Event, Ingested, Manifest, TrainingSet
from raymill.runtime.spec import Pipeline
from raymill.runtime.stores import places_of

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class FeatureActor:
    """Stop 2 of the data: rows in, training sets and online vectors out."""

    def __init__(
        self, home: str | Path, pipeline: Pipeline, record: Callable[[list[Event]], None], keep: str = KEEP
    ) -> None:
        places = places_of(Home(Path(home)), pipeline.stores)
        self._pipeline = pipeline
        self._record = record
        self._lake = Lake(places.lake)
        self._offline = LakeJoin(self._lake, str(places.lake))
        self._plan = FeaturePlan.of(pipeline)
        self._keep_us = duration_us(keep)
        self._store = OnlineStore(places.online, self._plan, keep=keep)
        self._reader = OnlineReader(places.online, self._plan)

    def start(self) -> None:
        """Bring the online store to the lake's present versions; in a replay only to where the replay is."""
        warm()
        for declared in self._pipeline.sources:  # the data actor does so too, and may come later
            self._lake.migrate(declared)
        horizon = self._store.horizon()
        for source in self._plan.sources:
            version = self._lake.version(source)
            if version is not None and (horizon is not None or self._store.lake_version(source) < version):
                self._catch_up(source, version, horizon)

    def stop(self) -> None:
        """Close the online store; everything taken in is durable."""
        self._offline.close()
        self._reader.close()
        self._store.close()

    def health(self) -> dict[str, Any]:
        """Lake version up to which the online store holds each source; −1: not known to."""
        return {"ok": True, "lake_versions": {s: self._store.lake_version(s) for s in self._plan.sources}}

    def plan(self) -> FeaturePlan:
        """What is computed; a replica gets it as JSON."""
        return self._plan

    def take(self, done: Ingested) -> None:
        """Take in what the DataActor accepted."""
        self.ingest(
            done.source, done.rows_ref, done.batch_id, lake_version=None if done.duplicate else done.lake_version
        )

    def ingest(self, source: str, rows: Any, batch_id: str, *, lake_version: int | None = None) -> None:
        """Take accepted rows into the online store, once however often they come.

        Args:
            source: name of a source; one that no view reads is passed over.
            rows: Arrow table, or a reference to one.
            batch_id: the batch they came in.
            lake_version: version that their append made; absent for a batch that was repeated.

        Raises:
            ContractError: the rows do not fit the source.
            StoreError: store or lake can not be opened; sending the batch again is safe.
        """
        if source not in self._plan.sources:
            return
        if self._store.horizon() is not None or lake_version is None:
            self._store.ingest(source, table_of(rows))
        elif self._lacks_only(source, table_of(rows), lake_version):
            self._store.ingest(source, table_of(rows), lake_version=lake_version, whole=True)
        else:
            self._catch_up(source, lake_version, None)

    def _lacks_only(self, source: str, rows: pa.Table, version: int) -> bool:
        """Whether these rows are all that the online store lacks of a version; some versions only merge parts."""
        have = self._store.lake_version(source)
        if have < 0 or have >= version - 1:
            return have >= version - 1
        return self._lake.count(source, version=have) + rows.num_rows == self._lake.count(source, version=version)

    def vectors(self, rows: pa.Table, at: Ints) -> npt.NDArray[np.float32]:
        """Online feature vectors of request rows, float32 [rows, features]; errors as in `OnlineReader.vectors`."""
        return self._reader.vectors(rows, at)

    def rebuild(self, until: int | None = None) -> None:
        """Throw the online store's views away and fill them from the lake, in one transaction.

        With `until` (event time, µs UTC) as if the lake ended there: a replay begins, or begins anew, and the lake
        may hold what comes later from a replay before it. `replay_to` moves on.
        """
        began = time.time()
        versions = {s: v for s in self._plan.sources if (v := self._lake.version(s)) is not None}
        tables = {s: self._read(s, v, end_at=until) for s, v in versions.items()}
        self._store.replace(tables, versions, horizon=until)
        self._tell("features.rebuilt", until, {"lake_versions": versions, "seconds": time.time() - began}, key="")

    def replay_to(self, until: int) -> None:
        """Recorded rows with event times before `until` (µs UTC) have come: say so before they are taken in.

        A store that is ahead of that by more than half of what it keeps (a run is taken up again that another one has
        overtaken) is filled anew, since it would refuse the replay's requests.
        """
        horizon = self._store.horizon()
        if horizon is None or horizon > until + self._keep_us // 2:
            self.rebuild(until)
        elif until > horizon:
            self._store.set_horizon(until)

    def training_set(
        self,
        start_at: int,
        end_at: int,
        known_until: int,
        evaluate_from: int,
        lake_versions: Mapping[str, int] | None = None,
    ) -> TrainingSet:
        """Labelled rows with event time in [start_at, end_at), each with its features as of that time.

        Rows whose label is null or was not known at `known_until` are counted and left out; those with event time
        ≥ `evaluate_from` are the slice that is held out. All moments are µs UTC. With the `lake_versions` of a manifest
        (and its moments) the set is made again, bit for bit; absent: from the newest version of each source.

        Raises:
            Conflict: a source has no rows in the lake yet, or no row of the range has a label.
        """
        names = {s.name for s in self._pipeline.sources}
        versions = dict(lake_versions or {s: v for s in sorted(names) if (v := self._lake.version(s)) is not None})
        if names - versions.keys():
            raise Conflict(f"sources {sorted(names - versions.keys())} have no rows in the lake yet: ingest them first")
        row, media = self._plan.row.name, self._pipeline.train.media
        labels = self._read(row, versions[row], start_at, end_at, media)
        rows, at, y, left_out = self._labelled(labels, start_at, end_at, known_until)
        if not len(rows):
            raise Conflict(
                f"no row of {_moment(start_at)} … {_moment(end_at)} has a label that was known at "
                f"{_moment(known_until)}: ingest more rows, or widen the range"
            )
        x = self._offline.join(rows, self._plan, versions, at=at)
        whole = pa.table(
            {
                "key": pa.array(key_texts(rows, self._pipeline.label.source), pa.string()),
                "at": pa.array(at).cast(pa.timestamp("us", "UTC")),
                **_columns(x),
                "y": pa.array(y.astype(np.float32)),
                **{c: with_bytes(rows[c].combine_chunks(), c) for c in media},
            }
        )
        manifest = self._manifest(versions, (start_at, end_at, known_until), len(rows), left_out)
        cut = int(np.searchsorted(at, evaluate_from))
        key = f"training_set.made/{digest(asdict(manifest), evaluate_from)}"
        counts = {"train_rows": cut, "evaluate_rows": len(rows) - cut}
        data = {"manifest": asdict(manifest), "plan": json.loads(self._plan.to_json()), **counts}
        self._tell("training_set.made", known_until, data, key=key)
        described = {"feature_hashes": manifest.feature_hashes, "rows": cut or len(rows)}
        described["features"] = describe(x[: described["rows"]], self._plan.names)
        self._tell(DESCRIBED, known_until, described, key=f"{DESCRIBED}/{key}")
        return TrainingSet(
            manifest=manifest, train_ref=shared(whole.slice(0, cut)), evaluate_ref=shared(whole.slice(cut))
        )

    def _labelled(
        self, rows: pa.Table, start_at: int, end_at: int, known_until: int
    ) -> tuple[pa.Table, Ints, npt.NDArray[np.bool_], int]:
        """Labelled rows of the range in their order, their moments, their labels; and how many have none."""
        label, source = self._pipeline.label, self._plan.row
        history = History.of(rows, source)
        first, newest = history.versions(known_until)
        inside = (history.time[first] >= start_at) & (history.time[first] < end_at)
        first, newest = first[inside], newest[inside]
        values = columns_of(rows.select(label.value.columns()).take(newest), label.value.columns(), source.dtypes)
        value = evaluate(label.value, values, len(newest))
        known = history.known[newest]
        has = ~np.isnan(value) & (known <= known_until) & (known != NEVER)
        return rows.take(first[has]), history.time[first][has], value[has] != 0, int((~has).sum())

    def _manifest(self, versions: dict[str, int], span: tuple[int, int, int], rows: int, left_out: int) -> Manifest:
        start_at, end_at, known_until = span
        return Manifest(
            pipeline=self._pipeline.name,
            lake_versions=versions,
            features=self._plan.names,
            feature_hashes=self._pipeline.feature_hashes,
            label=self._pipeline.label.name,
            label_rule=self._pipeline.label.value.to_json(),
            start_at=start_at,
            end_at=end_at,
            known_until=known_until,
            rows=rows,
            without_label=left_out,
        )

    def _read(
        self,
        source: str,
        version: int,
        start_at: int | None = None,
        end_at: int | None = None,
        media: tuple[str, ...] = (),
        since: int | None = None,
    ) -> pa.Table:
        """The columns that features and label need, and media, of the rows with event time in [start_at, end_at).

        With `since` (an earlier version) at least those that came after it, and not all that were there before.
        """
        plan = self._source(source)
        columns = list(self._plan.source_columns(source))
        if source == self._plan.row.name:
            columns += [*plan.key, plan.time, *([plan.known_at] if plan.known_at else [])]
            columns += [*self._plan.request_columns, *self._pipeline.label.value.columns()]
        bounds = [(">=", start_at), ("<", end_at)]
        where = [(plan.time, op, _moment(us)) for op, us in bounds if us is not None]
        wanted = list(dict.fromkeys([*columns, *media]))
        rows = self._lake.read(source, version=version, columns=wanted, where=where or None, since=since)
        for name in media:  # Delta knows no large binary, and images soon make more than the 2 GiB of a small one
            rows = rows.set_column(rows.column_names.index(name), name, rows[name].cast(MEDIA))
        return rows

    def _source(self, name: str) -> SourcePlan:
        return self._plan.row if name == self._plan.row.name else self._plan.sources[name]

    def _catch_up(self, source: str, version: int, horizon: int | None) -> None:
        since = self._store.lake_version(source) if horizon is None else -1
        rows = self._read(source, version, end_at=horizon, since=since if since >= 0 else None)
        self._store.ingest(source, rows, lake_version=version if horizon is None else None, whole=True)

    def _tell(self, kind: str, at: int | None, data: dict[str, Any], *, key: str) -> None:
        name = self._pipeline.name
        self._record([Event(kind=kind, subject=name, pipeline=name, at=at, wall_s=time.time(), data=data, key=key)])


def _columns(x: npt.NDArray[np.float32]) -> dict[str, pa.Array]:
    """Vectors as columns: `x`, and the mask `known`, a bit each; ranks read both where they lie."""
    bits = np.packbits(~np.isnan(x.ravel()), bitorder="little")
    known = pa.Array.from_buffers(pa.bool_(), x.size, [None, pa.py_buffer(bits)])
    width = x.shape[1]
    return {
        "x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), width),
        "known": pa.FixedSizeListArray.from_arrays(known, width),
    }


def _moment(us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=us)
