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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.evaluate import Ints, columns_of, evaluate
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.feature_statistics import describe
from raymill.actors.lake import Lake
from raymill.actors.lake_join import LakeJoin
from raymill.actors.media import MEDIA
from raymill.actors.media_files import with_bytes
from raymill.actors.observed import key_texts
from raymill.actors.online import KEEP, OnlineReader
from raymill.actors.online_intake import OnlineIntake, OnlineShards, moment
from raymill.actors.point_in_time import History
from raymill.actors.row_refs import shared
from raymill.actors.windows import NEVER
from raymill.runtime.errors import Conflict
from raymill.runtime.expressions import digest
from raymill.runtime.feature_registry import DESCRIBED
from raymill.runtime.home import Home
from raymill.runtime.messages import Event, Ingested, Manifest, TrainingSet
from raymill.runtime.spec import Pipeline
from raymill.runtime.stores import places_of


class FeatureActor:
    """Stop 2 of the data: rows in, training sets and online vectors out."""

    def __init__(
        self,
        home: str | Path,
        pipeline: Pipeline,
        record: Callable[[list[Event]], None],
        keep: str = KEEP,
        shards: Sequence[Any] = (),
    ) -> None:
        """Nothing is opened yet.

        Args:
            home: RAYMILL_HOME.
            pipeline: whose features.
            record: what the ledger takes events by.
            keep: how far behind the newest event online vectors may be asked for.
            shards: the actors (`OnlineIntake`) that write the shares of a divided online store; absent: this one
                writes all.
        """
        places = places_of(Home(Path(home)), pipeline.stores)
        self._pipeline = pipeline
        self._record = record
        self._lake = Lake(places.lake)
        self._offline = LakeJoin(self._lake, str(places.lake))
        self._plan = FeaturePlan.of(pipeline)
        own = [OnlineIntake(home, pipeline, i, keep) for i in range(pipeline.stores.online_shards) if not shards]
        self._own = own
        self._online: OnlineIntake | OnlineShards = (
            own[0] if len(own) == 1 else OnlineShards(own or shards, pipeline.name)
        )
        self._reader = OnlineReader(places.online, self._plan)

    def start(self) -> None:
        """Bring the online store to the lake's present versions; in a replay only to where the replay is."""
        for intake in self._own:
            intake.start()

    def stop(self) -> None:
        """Close the online store; everything taken in is durable."""
        self._offline.close()
        self._reader.close()
        self._online.stop()
        for intake in self._own:
            intake.stop()

    def health(self) -> dict[str, Any]:
        """Lake version up to which the online store holds each source; −1: not known to."""
        return self._online.health()

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
            Unavailable: as many batches as are taken at once are under way, or a share's actor is away for too long;
                calls by `Remote` wait and are made again for a minute.
        """
        if source in self._plan.sources:
            self._online.ingest(source, rows, lake_version)

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
        self._online.rebuild(versions, until)
        self._tell("features.rebuilt", until, {"lake_versions": versions, "seconds": time.time() - began}, key="")

    def replay_to(self, until: int) -> None:
        """Recorded rows with event times before `until` (µs UTC) have come: say so before they are taken in.

        A store that is ahead of that by more than half of what it keeps (a run is taken up again that another one has
        overtaken) is filled anew, since it would refuse the replay's requests.
        """
        if not self._online.replay_to(until):
            self.rebuild(until)

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
        labels = self._read(versions[row], start_at, end_at, media)
        rows, at, y, left_out = self._labelled(labels, start_at, end_at, known_until)
        if not len(rows):
            raise Conflict(
                f"no row of {moment(start_at)} … {moment(end_at)} has a label that was known at "
                f"{moment(known_until)}: ingest more rows, or widen the range"
            )
        x = self._offline.join(rows, self._plan, versions, at=at)
        whole = pa.table(
            {
                "key": pa.array(key_texts(rows, self._pipeline.label.source), pa.string()),
                "at": pa.array(at).cast(pa.timestamp("us", "UTC")),
                **_columns(x),
                "y": pa.array(y.astype(np.float32)),
                **{c: with_bytes(rows[c].combine_chunks(), c, self._pipeline.label.source.schema[c]) for c in media},
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

    def _read(self, version: int, start_at: int, end_at: int, media: tuple[str, ...]) -> pa.Table:
        """What features and label need of the label's rows with event time in [start_at, end_at), and media."""
        row = self._plan.row
        columns = [*row.key, row.time, *([row.known_at] if row.known_at else [])]
        columns += [*self._plan.request_columns, *self._pipeline.label.value.columns(), *media]
        where = [(row.time, ">=", moment(start_at)), (row.time, "<", moment(end_at))]
        rows = self._lake.read(row.name, version=version, columns=list(dict.fromkeys(columns)), where=where)
        for name in media:  # Delta knows no large binary, and images soon make more than the 2 GiB of a small one
            rows = rows.set_column(rows.column_names.index(name), name, rows[name].cast(MEDIA))
        return rows

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
