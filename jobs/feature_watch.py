"""What a run does for its features: registers them first, and checks at its end that serving and lake agree on them."""

from __future__ import annotations

from typing import Any

from raymill.actors.consistency import Consistency
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.freshness import freshness
from raymill.actors.lake import Lake
from raymill.actors.recompute import Recompute
from raymill.actors.served import Span
from raymill.jobs.run import Run
from raymill.jobs.world import World
from raymill.runtime.feature_registration import register
from raymill.runtime.feature_registry import JUDGED
from raymill.runtime.stores import places_of


def register_features(world: World) -> list[str]:
    """Tell the registry what the pipeline declares; a sentence for each of its features that is deprecated."""
    return register(world.records, world.pipeline)


def check_served(world: World, run: Run) -> Consistency:
    """Recompute a sample of what this run's endpoint answered from the lake, and write the judgement down.

    Raises:
        StoreError: the lake can not be read.
    """
    places = places_of(world.home, world.pipeline.stores)
    recompute = Recompute(Lake(places.lake), world.records, places.online)
    return recompute.check(world.pipeline.name, Span(since_s=run.progress.began_s))


def features_told(world: World, run: Run, end: int) -> dict[str, Any]:
    """For the summary: `consistency`, the run's last check (null: none), and `freshness` at `end`, µs UTC."""
    name = world.pipeline.name
    judged = [e for e in world.records.events(JUDGED, pipeline=name) if e["wall_s"] >= run.progress.began_s]
    places = places_of(world.home, world.pipeline.stores)
    fresh = freshness(Lake(places.lake), places.online, FeaturePlan.of(world.pipeline), end)
    return {"consistency": judged[-1]["data"] if judged else None, "freshness": fresh}
