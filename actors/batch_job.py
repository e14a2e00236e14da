"""Batch prediction of a table: planned once, answered piece by piece by Ray Data's actors, no HTTP.

Invariants
- The plan is written before the first answer; a job that is asked for again goes on by it, whatever is live meanwhile.
- The manifest is written last; a job that has one does nothing more and says the same.
- A job may be killed at any moment, its driver too: the next one asks for the pieces that no word of being done is of.
- What goes through the object store is a piece's description and its count of rows: readers are writers.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from raymill.actors import batch_rows
from raymill.actors.batch_duplicates import note_duplicates
from raymill.actors.batch_input import is_text, pieces_of, schema_of
from raymill.actors.batch_output import MANIFEST, PIECES, PLAN, Output
from raymill.actors.batch_plan import BatchPlan, BatchRequest, check_same, pinned
from raymill.actors.batch_worker import BatchWorker, Done
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.lake_reader import newest_versions
from raymill.actors.rollout import ModelSpec, Route
from raymill.runtime.errors import Conflict, RaymillError, Unavailable
from raymill.runtime.home import Home
from raymill.runtime.ids import new_ids
from raymill.runtime.spawn import in_short, on_head
from raymill.runtime.stores import places_of

_CPUS = 0.1
"""Of a worker: so little that it asks the autoscaler for no node; nodes come for leases alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a job did, all tries together, and how fast this one was."""

    job: str
    model: str
    version: int
    out: str
    rows: int
    """Rows answered."""
    rejected: int
    """Rows in `_rejects`."""
    duplicates: int
    """Of them, rows whose id a row before them has."""
    parts: int
    answered_now: int
    """Rows answered by this call; the others were there already."""
    seconds: float
    """That this call took."""
    rows_per_s: float


OnPiece = Callable[[Done, int], None]
"""(a piece that is done, pieces of all), for whoever shows progress."""


def plan_job(
    model: ModelSpec, route: Route | None, request: BatchRequest, home: Home, *, job: str | None = None
) -> BatchPlan:
    """The plan of a job: the one that its folder holds, else a new one, which is written there.

    Args:
        model: a served model.
        route: the version that is to answer; absent: the live one.
        request: table, output and what else is wished.
        home: where the model's lake is looked for.
        job: id of the job; absent: a fresh one, or that of the job that the folder holds.

    Raises:
        Conflict: the folder holds another job, or something else.
        ContractError: the table can not be read, or its columns are not the model's.
        RequestError: the table is empty, or no version is live.
    """
    output = Output(request.out)
    text = output.read(PLAN)
    if text is not None:
        plan = BatchPlan.from_json(text, f"{request.out}/{PLAN}")
        check_same(plan, model.name, route.version if route else None, request, job)
        return plan
    if not output.is_free():
        raise Conflict(f"{request.out} holds something else than a batch job: give the job a folder of its own")
    features = model.plan is not None and not request.vectors
    versions: dict[str, int] = {}
    if features:
        versions = newest_versions(Lake(places_of(home, model.stores).lake), FeaturePlan.from_json(model.plan))
    plan = BatchPlan(
        job=job or new_ids(1)[0],
        model=pinned(model, route),
        request=request,
        now_us=time.time_ns() // 1000,
        pieces=pieces_of(request.table, request.delta_version),
        features=features,
        lake_versions=versions,
    )
    first = plan.pieces[0]
    batch_rows.check_columns(schema_of(first), plan, is_text=is_text(first))
    if not output.create(PLAN, plan.to_json()):  # somebody else was faster with the same folder
        return plan_job(model, route, request, home, job=job)
    return plan


def run_job(plan: BatchPlan, home: Home, *, workers: int | None = None, on_piece: OnPiece | None = None) -> Summary:
    """Answer what is not answered yet, on the Ray cluster that this process has joined.

    Args:
        plan: what `plan_job` gave.
        home: home of the workers.
        workers: actors; absent: one a processor of the cluster.
        on_piece: told of every piece that is done.

    Raises:
        ContractError: the table can not be read, or is not what it was when the job was planned.
        ModelError: the version can not be loaded, or fails.
        StoreError: lake or output can not be used.
        Unavailable: the cluster lost the workers.
    """
    begun_s = time.monotonic()
    output = Output(plan.request.out)
    text = output.read(MANIFEST)
    if text is None:
        output.sweep()
        note_duplicates(plan.pieces, output)
        done = []
        for one in _done(plan, home, output, workers or int(ray.cluster_resources().get("CPU", 1))):
            done.append(one)
            if on_piece is not None:
                on_piece(one, len(plan.pieces))
        text = _manifest(plan, done)
        output.write(MANIFEST, text)
        now = sum(d.now for d in done)
    else:
        now = 0
    told = json.loads(text)
    seconds = time.monotonic() - begun_s
    return Summary(
        job=plan.job,
        model=plan.model.name,
        version=plan.version,
        out=plan.request.out,
        rows=told["rows"],
        rejected=told["rejected"],
        duplicates=told.get("duplicates", 0),
        parts=told["parts"],
        answered_now=now,
        seconds=round(seconds, 3),
        rows_per_s=round(now / seconds, 1),
    )


def _manifest(plan: BatchPlan, done: list[Done]) -> str:
    totals = {name: sum(getattr(d, name) for d in done) for name in ("rows", "rejected", "duplicates", "parts")}
    about = {"job": plan.job, "model": plan.model.name, "version": plan.version, "finished_s": time.time()}
    return json.dumps(
        {**about, **totals, "lake_versions": plan.lake_versions, "request": asdict(plan.request)}, indent=1
    )


def _done(plan: BatchPlan, home: Home, output: Output, workers: int) -> Iterator[Done]:
    """The pieces: those that are done, then each of the others when it is."""
    known = [replace(Done(**json.loads(text)), now=0) for text in output.texts(PIECES)]
    yield from known
    left = sorted({p.number for p in plan.pieces} - {d.piece for d in known})
    if left:
        yield from _answered(plan, left, home, min(workers, len(left)))


def _answered(plan: BatchPlan, numbers: list[int], home: Home, workers: int) -> Iterator[Done]:
    """The pieces of these numbers, answered by so many workers, each when it is done."""
    context = ray.data.DataContext.get_current().copy()
    # After its import, which sets the level: it tells plan and progress, and of errors the traces.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    with ray.data.DataContext.current(context):
        pieces = ray.data.from_items([{"piece": number} for number in numbers], override_num_blocks=len(numbers))
        answered = pieces.map_batches(
            _Answering,
            fn_constructor_args=(str(home.root), plan.to_json()),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=_CPUS,
            **_placement(plan),
        )
        try:
            for block in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from (Done(**row) for row in block.to_pylist())
        except RayTaskError as err:
            if isinstance(err.cause, RaymillError):
                raise err.cause from err
            raise Unavailable(f"the batch job's workers failed: {in_short(err)}; the same again goes on") from err


class _Answering:
    """A worker as Ray Data calls it."""

    def __init__(self, home: str, plan: str) -> None:
        self._home, self._plan = Home(Path(home)), BatchPlan.from_json(plan, "the job")
        self._worker: BatchWorker | None = None

    def __call__(self, numbers: pa.Table) -> pa.Table:
        if self._worker is None:  # not before: what a constructor raises Ray tells as the death of an actor
            self._worker = BatchWorker(self._home, self._plan)
        done = [self._worker.answer(self._plan.pieces[number]) for number in numbers["piece"].to_pylist()]
        return pa.Table.from_pylist([asdict(d) for d in done])


def _placement(plan: BatchPlan) -> dict[str, Any]:
    """Paths are one host's, the head's; URLs may be opened anywhere."""
    stores = plan.model.stores.of_one_host if plan.features else ()
    local = [p for p in (plan.request.table, plan.request.out) if "://" not in p]
    return on_head() if stores or local else {}
