"""Answers pieces of a batch job: the endpoint's loading, codec and models, with the lake in the online store's place.

Invariant: a piece may be answered any number of times, by workers at once too: its parts come out the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors import batch_rows, surroundings, wire
from raymill.actors.batch_duplicates import duplicates_of
from raymill.actors.batch_input import is_text, read
from raymill.actors.batch_output import PIECES, REJECTS, Output
from raymill.actors.batch_plan import PART_ROWS, BatchPlan, Piece
from raymill.actors.batch_rows import Reject
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.lake_reader import LakeReader
from raymill.actors.load_notes import LoadNotes
from raymill.actors.model_set import ModelSet
from raymill.actors.models import Answer, Question
from raymill.actors.prediction_rows import Scored, decode, encode
from raymill.actors.prediction_sink import LakeSink
from raymill.actors.predictions import Sink
from raymill.actors.rollout import to_user_config
from raymill.actors.row_text import json_rows
from raymill.actors.wire import Rows
from raymill.runtime.errors import ModelError, RaymillError
from raymill.runtime.home import Home
from raymill.runtime.records import RemoteRecords
from raymill.runtime.stores import places_of

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of a piece."""

    piece: int
    rows: int = 0
    """Rows answered."""
    rejected: int = 0
    duplicates: int = 0
    """Rows rejected because a row before them has their id."""
    parts: int = 0
    now: int = 0
    """Rows answered by this very call; the others were there already."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a piece that are read, answered and written at once."""

    piece: Piece
    name: str
    first: int
    """Number of its first row in the file."""
    table: pa.Table
    twice: dict[int, str]
    """Rows whose id another row before them has, by number in the part; and that row in words."""


class BatchWorker:
    """A plain class; Ray Data makes it an actor."""

    def __init__(
        self,
        home: Home,
        plan: BatchPlan,
        *,
        fetch: Callable[[str], bytes] | None = None,
        load: Any = None,
        sink: Sink | None = None,
    ) -> None:
        """Load the model, as a replica does; `fetch`, `load` and `sink` stand for the actors where there is no Ray.

        Raises:
            ModelError: the version can not be loaded.
        """
        self._plan = plan
        self._output = Output(plan.request.out)
        lake = Lake(places_of(home, plan.model.stores).lake)
        self._reader = None
        if plan.features:
            self._reader = LakeReader(lake, FeaturePlan.from_json(plan.model.plan), plan.lake_versions)
        models = ModelSet(
            fetch=fetch or RemoteRecords().program,
            load=load or surroundings.load_program,
            open_reader=lambda spec: None,
            guard=LoadNotes(home.loads, f"a worker of batch job {plan.job}").loading,
        )
        models.apply(to_user_config([plan.model]))
        if failed := models.failures.get(plan.model.name):
            raise ModelError(f"version {plan.version} of model {plan.model.name!r} can not be loaded: {failed}")
        self._model = models.models[plan.model.name]
        self._answers = batch_rows.answers_of(self._model.spec.outputs)
        self._sink = sink or LakeSink(lambda model: lake, home.spool / "sink.lock", surroundings.observe)

    def answer(self, piece: Piece) -> Done:
        """Answer the parts of a piece that are not there yet; what comes twice in the table must be noted before.

        Raises:
            ContractError: the table can not be read, or is not what it was.
            ModelError: the program fails.
            StoreError: lake or output can not be used.
        """
        marker = f"{PIECES}/{piece.number:06d}.json"
        known = self._output.read(marker)
        if known is not None:
            return Done(**{**json.loads(known), "now": 0})
        twice = duplicates_of(piece, self._output)
        done = Done(piece=piece.number, duplicates=len(twice.rows))
        for number, table in enumerate(read(piece)):
            name = piece.part(number)
            answered = self._output.rows_of(name)
            if answered is None:
                first = piece.row + number * PART_ROWS
                answered = self._answer(Part(piece, name, first, table, twice.among(first, len(table))))
                done = replace(done, now=done.now + answered)
            rows, rejected = done.rows + answered, done.rejected + len(table) - answered
            done = replace(done, rows=rows, rejected=rejected, parts=done.parts + 1)
        self._output.write(marker, json.dumps(asdict(done)))
        return done

    def _answer(self, part: Part) -> int:
        """Answer a part and write it; how many rows got an answer."""
        asked = batch_rows.asked_columns(part.table, self._plan, f"{part.piece.number}", part.first)
        text = is_text(part.piece)
        rows, where, rejects = batch_rows.readable(asked, self._plan, is_text=text, twice=part.twice)
        log = JobLog()
        answers = self._answers.empty_table()
        if rows is not None:
            answers, taken, ill = self._predicted(rows, log)
            rejects += [Reject(int(where[i]), err) for i, err in ill.items()]
            where = where[taken]
        if rejects:
            self._output.write_rows(f"{REJECTS}/{part.name}", _rejected(part, asked["id"], rejects))
        if self._plan.request.log and log.scored:
            frames = [encode(scored, f"batch/{self._plan.job}", time.time()) for scored in log.scored]
            self._sink.ship(f"batch-{self._plan.job}-{part.name}", decode(b"".join(frames)))
        kept = part.table.take(pa.array(where, pa.int64()))
        for name in batch_rows.kept_columns(part.table.column_names, self._plan.request.keep):
            answers = answers.append_column(name, kept[name])
        self._output.write_rows(part.name, answers)
        return len(answers)

    def _predicted(self, rows: Rows, log: JobLog) -> tuple[pa.Table, Places, dict[int, RaymillError]]:
        """The answers, the numbers of the rows that they are for, and the other rows with the reason."""
        ill: dict[int, RaymillError] = {}
        if self._reader is not None:
            x = self._reader.vectors(rows.columns, rows.at)
            ill |= self._reader.unknown(rows.columns, rows.at)
        else:
            x = batch_rows.vectors_of(rows)
            ill |= batch_rows.infinite(x)
        is_well = np.ones(len(rows), dtype=np.bool_)
        is_well[list(ill)] = False
        well = np.flatnonzero(is_well)
        found: list[tuple[Places, Answer]] = []
        step = self._plan.model.max_batch_rows
        for start in range(0, len(well), step):
            asked, bad = batch_rows.parted(well[start : start + step], lambda some: self._ask(rows, x, some, log))
            found += asked
            ill |= {int(row[0]): err for row, err in bad}
        if not found:
            return self._answers.empty_table(), np.empty(0, np.int64), ill
        columns = [
            pa.array([name for _, answer in found for name in answer.ids], pa.string()),
            pa.array(np.concatenate([answer.versions for _, answer in found])),
            wire.column_of(np.concatenate([answer.p for _, answer in found])),
        ]
        return pa.table(columns, schema=self._answers), np.concatenate([some for some, _ in found]), ill

    def _ask(self, rows: Rows, x: npt.NDArray[np.float32], some: Places, log: JobLog) -> tuple[Places, Answer]:
        chosen = some.tolist()
        texts = rows.texts if self._plan.request.log and self._reader is not None else None
        question = Question(
            ids=[rows.ids[i] for i in chosen],
            at=rows.at[some],
            keys=[rows.keys[i] for i in chosen],
            texts=[texts[i] if texts else None for i in chosen],
            x=x[some],
        )
        [answer] = self._model.ask([question], log)
        if isinstance(answer, RaymillError):
            raise answer
        return some, answer


class JobLog:
    """What a model logs, kept until its part is written."""

    def __init__(self) -> None:
        self.scored: list[Scored] = []

    def record(self, scored: Scored, shadows: list[Scored]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """As `PredictionLog.record`; every row is answered once, so no earlier answer can be known."""
        self.scored.append(scored)
        return scored.versions, scored.p


def _rejected(part: Part, ids: pa.ChunkedArray, rejects: list[Reject]) -> pa.Table:
    rejects = sorted(rejects, key=lambda r: r.row)
    places = pa.array([r.row for r in rejects], pa.int64())
    return pa.table(
        {
            "file": pa.repeat(part.piece.fragment or part.piece.place, len(rejects)),
            "row": pa.array([part.first + r.row for r in rejects], pa.int64()),
            "id": ids.take(places),
            "code": pa.array([r.error.code for r in rejects]),
            "reason": pa.array([r.error.message for r in rejects]),
            "data": pa.array(json_rows(part.table.take(places))),
        }
    )
