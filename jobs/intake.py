"""Who takes rows in for a verb: the running cluster's actors, or the same classes here, on the home itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from raymill.actors.blocks import block_batches
from raymill.actors.data import DataActor
from raymill.actors.features import FeatureActor
from raymill.actors.feed import Feed, is_followed, open_stream, take
from raymill.actors.files import File, files_in, is_folder, look
from raymill.actors.lakes import stores_declared
from raymill.actors.sources import file_batches
from raymill.cluster.session import Session
from raymill.jobs import pipeline_file
from raymill.jobs.feature_actors import spawn_features
from raymill.jobs.planning import refuse_other_host
from raymill.runtime.errors import ContractError, Usage
from raymill.runtime.home import current_home
from raymill.runtime.messages import Ingested
from raymill.runtime.records import RecordsActor, RemoteRecords
from raymill.runtime.spawn import Remote, ask, driver_and_head, end, named, on_head, spawn
from raymill.runtime.spec import DeltaTable, Directory, Pipeline, Source


@dataclass(frozen=True, slots=True)
class Intake:
    """The way of a batch: the data actor, then all who take what it accepted."""

    data: Any
    """A `DataActor`, or one that is reached by name."""
    takers: tuple[Any, ...]
    """Features, and the monitor where it runs."""
    records: Any
    """The ledger: a `RecordsActor`, or one that is reached by name."""
    on_cluster: bool
    """Whether these are actors of a running cluster."""

    def tell(self, done: Ingested) -> None:
        """Features and monitor take what the lake holds."""
        for taker in self.takers:
            taker.take(done)


@contextmanager
def open_intake(pipeline: Pipeline, session: Session | None) -> Iterator[Intake]:
    """The intake of a pipeline; what does not run yet is started, and stays with the cluster.

    Args:
        pipeline: whose rows come in.
        session: the cluster that this process has joined; absent: there is none, and the home is worked on here.

    Raises:
        StoreError: without a cluster: another process works on the home.
        SpecError: the cluster's head is another host.
    """
    if session is not None:
        yield _on_cluster(pipeline, str(session.home.root))
        return
    home = current_home()
    records = RecordsActor(home.root)
    data = DataActor(str(home.root), list(pipeline.sources), records.append, pipeline.name, pipeline.stores)
    features = FeatureActor(str(home.root), pipeline, records.append)
    started: list[Any] = []
    try:
        for actor in (records, data, features):
            actor.start()
            started.append(actor)
        records.append([stores_declared(pipeline, "")])
        yield Intake(data, (features,), records, on_cluster=False)
    finally:
        for actor in reversed(started):
            actor.stop()


def _on_cluster(pipeline: Pipeline, home: str) -> Intake:
    refuse_other_host(*driver_and_head(), home)
    for module in pipeline_file.loaded():
        ray.cloudpickle.register_pickle_by_value(module)
    name, records, place = pipeline.name, RemoteRecords(), on_head()
    handles = [
        spawn(RecordsActor, home, name="records", **place),
        spawn(DataActor, home, list(pipeline.sources), records, name, pipeline.stores, name=f"data/{name}", **place),
        *spawn_features(pipeline, home, records, **place),
    ]
    for handle in handles:
        ask(handle.health.remote())  # an actor that could not start says here why
    records.append([stores_declared(pipeline, "")])
    takers = [n for n in (f"features/{name}", f"drift/{name}") if n in named("")]
    return Intake(Remote(f"data/{name}"), tuple(Remote(n) for n in takers), records, on_cluster=True)


def push(intake: Intake, source: Source, paths: Sequence[str]) -> Iterator[Ingested]:
    """Take files and folders in, once; without paths what the source's `read` names, as it is now.

    Sent again after a crash it goes on: what the lake has is told as a duplicate.

    Raises:
        Usage: no path, and the source names none; or no file that is read lies there.
        ContractError: a file is damaged, or does not fit the source.
        StoreError: a folder, table or the lake can not be reached.
    """
    if not paths and isinstance(source.read, DeltaTable):
        yield from _versions(intake, source, source.read)
        return
    for batch_id, rows in _batches(intake, source, _files(source, paths)):
        done = intake.data.ingest(source.name, rows, batch_id=batch_id)
        intake.tell(done)
        yield done


def _files(source: Source, paths: Sequence[str]) -> list[File]:
    read = source.read
    if not paths and isinstance(read, Directory):
        return files_in(read.path, read.pattern)
    if not paths and isinstance(read, str):
        paths = [read]
    if not paths:
        what = "is a stream: `raymill feed` follows it" if is_followed(source) else "names no file: give a PATH"
        raise Usage(f"source {source.name!r} {what}")
    found: list[File] = []
    for path in paths:
        inside = [f for f in files_in(path) if f.kind] if is_folder(path) else [_file(path)]
        if not inside:
            raise Usage(f"folder {path} holds no .parquet, .csv or .arrow file")
        found += inside
    return found


def _file(path: str) -> File:
    try:
        file = look(path)
    except ContractError as err:
        raise Usage(err.message) from err
    if not file.kind:
        raise Usage(f"{path} is no .parquet, .csv or .arrow file: only these are read")
    return file


def _batches(intake: Intake, source: Source, files: list[File]) -> Iterator[tuple[str, Any]]:
    if not intake.on_cluster or len(files) == 1:
        for file in files:
            yield from file_batches(file.place, source)
        return
    is_local = any("://" not in file.place for file in files)
    yield from block_batches(files, source, on_head() if is_local else {})


def _versions(intake: Intake, source: Source, table: DeltaTable) -> Iterator[Ingested]:
    stream = open_stream(source, lambda batch_id: intake.data.has_batch(source.name, batch_id), "push")
    stream.open()
    while (batch := stream.next(0)) is not None:
        for done in take(intake.data, source, batch):
            intake.tell(done)
            yield done
        stream.acknowledge(batch)


@contextmanager
def running_feed(pipeline: Pipeline, intake: Intake) -> Iterator[Any]:
    """The pipeline's feed (a `Feed`, or one that is reached by name), for the time of the block."""
    if not intake.on_cluster:
        feed = Feed(pipeline.sources, intake.data, intake.takers)
        feed.start()
        try:
            yield feed
        finally:
            feed.stop()
        return
    name = f"feed/{pipeline.name}"
    ask(spawn(Feed, pipeline.sources, intake.data, intake.takers, name=name, anew=True, **on_head()).health.remote())
    try:
        yield Remote(name)
    finally:
        end(name)
