"""Starts the features actor of a pipeline, and those of its shards where its online store is divided by entities."""

from __future__ import annotations

from typing import Any

from raymill.actors.features import FeatureActor
from raymill.actors.online import KEEP
from raymill.actors.online_intake import OnlineIntake
from raymill.runtime.records import RemoteRecords
from raymill.runtime.spawn import Remote, end, named, spawn
from raymill.runtime.spec import Pipeline


def spawn_features(pipeline: Pipeline, home: str, records: RemoteRecords, **options: Any) -> list[Any]:
    """Handles of what runs then; `features/<pipeline>` is the one to talk to, `features/<pipeline>/<n>` its shards.

    Each shard writes an environment of its own and is restarted by itself: the others go on, and readers go on reading
    what it had.
    """
    name, shards = f"features/{pipeline.name}", pipeline.stores.online_shards
    wanted = [f"{name}/{i}" for i in range(shards)] if shards > 1 else []
    for one in named(f"{name}/"):  # of a run that divided otherwise
        if one not in wanted:
            end(one)
    found = [spawn(OnlineIntake, home, pipeline, i, name=one, **options) for i, one in enumerate(wanted)]
    remote = [Remote(one) for one in wanted]
    return [*found, spawn(FeatureActor, home, pipeline, records, KEEP, remote, name=name, **options)]
