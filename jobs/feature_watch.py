"""Features while they serve: registered first, then checked again and again: do serving and lake agree on them?

At the end of each of the monitor's periods a run looks at a sample of it, at its end at a larger one of all; while rows
are fed in (`raymill feed`), at what was answered since the last look.
"""

from __future__ import annotations

import time
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
from raymill.runtime.home import Home
from raymill.runtime.spec import Pipeline
from raymill.runtime.stores import places_of

PERIOD_ROWS = 1_000
"""Served rows of a small check: one wrong value of a feature is within the tolerance, two are an alarm."""
MOST_SHARE = 0.015
"""Share of a run's time that checks of periods take: one that would begin above it is left to the check at the end."""
SETTLE_S = 60.0
"""How far one look at what is served live reaches back into the one before: answers come to the lake a little later."""


def register_features(world: World) -> list[str]:
    """Tell the registry what the pipeline declares; a sentence for each of its features that is deprecated."""
    return register(world.records, world.pipeline)


def check_served(world: World, run: Run) -> Consistency:
    """Recompute a sample of what this run's endpoint answered from the lake, and write the judgement down.

    Raises:
        StoreError: the lake can not be read.
    """
    return _recompute(world).check(world.pipeline.name, Span(since_s=run.progress.began_s))


def check_period(world: World, run: Run, start_at: int, end_at: int) -> Consistency | None:
    """The same of a small sample of one period (event time, µs UTC); None: checks have had their time of this run.

    Raises:
        StoreError: the lake can not be read.
    """
    began_s = run.progress.began_s
    if run.progress.seconds.get("consistency", 0.0) > MOST_SHARE * (time.time() - began_s):
        return None
    with run.stage("consistency"):
        span = Span(start_at=start_at, end_at=end_at, since_s=began_s)
        return _recompute(world).check(world.pipeline.name, span, rows=PERIOD_ROWS, observe=False)


class LiveChecks:
    """Checks what a pipeline's endpoint has answered lately, again and again, while rows are fed in."""

    def __init__(self, pipeline: Pipeline, home: Home, records: Any, every_s: float) -> None:
        places = places_of(home, pipeline.stores)
        self._recompute = Recompute(Lake(places.lake), records, places.online)
        self._model = pipeline.name
        self._every_s = every_s
        self._since_s = self._last = time.time()

    def look(self) -> Consistency | None:
        """The judgement, where one is due and something was answered since the one before.

        Raises:
            StoreError: the lake can not be read.
        """
        now = time.time()
        if now - self._last < self._every_s:
            return None
        self._last = now
        span = Span(since_s=self._since_s)
        judged = self._recompute.check(self._model, span, rows=PERIOD_ROWS, observe=False)
        if not judged.rows:
            return None
        self._since_s = now - SETTLE_S
        return judged


def features_told(world: World, run: Run, end: int) -> dict[str, Any]:
    """For the summary.

    `consistency`, the run's last check (null: none), `checks`, what each of them found in short, and `freshness` at
    `end`, µs UTC.
    """
    name = world.pipeline.name
    judged = [e["data"] for e in world.records.events(JUDGED, pipeline=name) if e["wall_s"] >= run.progress.began_s]
    places = places_of(world.home, world.pipeline.stores)
    fresh = freshness(Lake(places.lake), places.online, FeaturePlan.of(world.pipeline), end)
    short = ("start_at", "end_at", "rows", "mismatched", "alert", "reason")
    return {
        "consistency": judged[-1] if judged else None,
        "checks": [{k: found[k] for k in short} for found in judged],
        "freshness": fresh,
    }


def _recompute(world: World) -> Recompute:
    places = places_of(world.home, world.pipeline.stores)
    return Recompute(Lake(places.lake), world.records, places.online)
