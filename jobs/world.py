"""The actors of one pipeline on one cluster, wired: the only place where they are all named together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from raymill.actors.autoscaling import autoscaling_config
from raymill.actors.data import DataActor
from raymill.actors.drift import DriftMonitor
from raymill.actors.endpoint import Endpoint, Placement
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lakes import stores_declared
from raymill.actors.ranks import Owner
from raymill.actors.rollout import ModelSpec, from_user_config, spec_of
from raymill.actors.scheduler import RemoteScheduler
from raymill.actors.sources import read_rows
from raymill.actors.training import Gang
from raymill.cluster.nodes import ClusterActor
from raymill.cluster.session import Session
from raymill.cluster.spec import ClusterConfig
from raymill.jobs import pipeline_file
from raymill.jobs.feature_actors import spawn_features
from raymill.jobs.planning import refuse_local_stores, refuse_other_host, replica_options, scaling_of
from raymill.jobs.pool import scheduler_of
from raymill.jobs.reach import client_of, endpoint_of
from raymill.jobs.replay import Recording
from raymill.jobs.run import Run
from raymill.jobs.serving_alone import give_up_grant
from raymill.runtime.client import Client
from raymill.runtime.errors import Unavailable
from raymill.runtime.home import Home
from raymill.runtime.messages import LeaseRequest, Purpose
from raymill.runtime.records import RecordsActor, RemoteRecords
from raymill.runtime.spawn import Remote, ask, driver_and_head, on_head, spawn
from raymill.runtime.spec import Pipeline

PREPARED = ("raymill.actors.program", "raymill.actors.online")
"""What replicas of trained models import beside what all do."""


@dataclass(frozen=True, slots=True)
class World:
    """Handles of everything that a loop talks to."""

    pipeline: Pipeline
    session: Session
    home: Home
    records: RemoteRecords
    scheduler: RemoteScheduler
    data: Any
    features: Any
    monitor: Any
    cluster: Any
    """The cluster actor; None where `up` did not start the cluster."""
    gang: Gang
    endpoint: Endpoint
    client: Client

    def deploy(self) -> None:
        """Take the replicas' grant and bring the application up with the present versions."""
        name, serve = self.pipeline.name, self.pipeline.serve
        models = self._models()
        where = replica_options(self.pipeline, models, on_head())
        owner = f"serve/{name}"
        count = min(max(serve.min_replicas, len(self.scheduler.leases(owner)), 1), serve.max_replicas)
        wanted = LeaseRequest(
            owner=owner,
            purpose=Purpose.SERVING,
            count=count,
            min_count=max(serve.min_replicas, 1),
            resources={"CPU": 1.0, **where.get("resources", {})},
            pipeline=name,
        )
        granted = self.scheduler.grant(wanted)
        scaling = scaling_of(serve)
        scaled = autoscaling_config(scaling, wanted) if scaling else {}
        prepare = PREPARED if "resources" in where else ()  # elsewhere nobody knows on which node
        count = len(granted.leases)
        self.endpoint.deploy(models, Placement(replicas=count, autoscaling=scaled, prepare=prepare, **where))
        give_up_grant(self.scheduler, reason=f"the replicas are those of {name} now")

    def serve_present_versions(self) -> None:
        """Bring the replicas to what the registry says: live, canary, their shares of the traffic."""
        with self.endpoint.turn():
            self.endpoint.set_models(self._models())

    def flush_predictions(self) -> None:
        """Wait until lake and monitor hold every prediction that was answered."""
        self.endpoint.flush()

    def _models(self) -> list[ModelSpec]:
        """This pipeline's model as the registry has it, beside those that are served already."""
        plan = FeaturePlan.of(self.pipeline).to_json()
        mine = spec_of(self.pipeline, plan, self.records.versions(self.pipeline.name))
        try:
            served = self.endpoint.config()["applications"][0]["deployments"][0]["user_config"]
        except Unavailable:
            return [mine]
        return [m for m in from_user_config(served).values() if m.name != mine.name] + [mine]

    def close(self) -> None:
        """End the gang's ranks and the client; actors and endpoint stay with the cluster."""
        self.gang.close()
        self.client.close()
        self.endpoint.close()


def build_world(pipeline: Pipeline, session: Session, config: ClusterConfig | None, run: Run) -> World:
    """Spawn what does not run yet, anew what belongs to the pipeline (its file may have changed), and wire it."""
    refuse_local_stores(pipeline)
    refuse_other_host(*driver_and_head(), str(session.home.root))
    for module in pipeline_file.loaded():  # its classes travel by value: workers need not find the file
        ray.cloudpickle.register_pickle_by_value(module)
    home = session.home
    records = RemoteRecords()
    place = on_head()
    handles = [spawn(RecordsActor, str(home.root), name="records", **place)]
    records.append([stores_declared(pipeline, run.id)])
    scheduler = scheduler_of(session)
    cluster = None
    if session.managed and config is not None:
        handles.append(spawn(ClusterActor, str(home.root), config, records, name="cluster", **place))
        cluster = Remote("cluster")
    name = pipeline.name
    since_s = run.progress.began_s if pipeline.replay else 0.0  # an earlier replay asked about the same moments
    own = {"anew": True, **place}
    handles += [
        spawn(
            DataActor,
            str(home.root),
            list(pipeline.sources),
            records,
            name,
            pipeline.stores,
            name=f"data/{name}",
            **own,
        ),
        *spawn_features(pipeline, str(home.root), records, **own),
        spawn(DriftMonitor, str(home.root), pipeline, records, since_s, name=f"drift/{name}", **own),
    ]
    for handle in handles:
        ask(handle.health.remote())  # an actor that could not start says here why
    return World(
        pipeline=pipeline,
        session=session,
        home=home,
        records=records,
        scheduler=scheduler,
        data=Remote(f"data/{name}"),
        features=Remote(f"features/{name}"),
        monitor=Remote(f"drift/{name}"),
        cluster=cluster,
        gang=Gang(
            scheduler,
            pipeline.train,
            owner=Owner(name=f"gang/{name}", pipeline=name, run=run.id),
            checkpoint_dir=home.models / "checkpoints",
            record=records,
        ),
        endpoint=endpoint_of(session),
        client=client_of(session),
    )


def recorded(pipeline: Pipeline) -> Recording:
    """The pipeline's recorded rows, read by its sources' `read`."""
    return Recording(pipeline, {s.name: read_rows(s) for s in pipeline.sources})
