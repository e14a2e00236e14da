"""How old the newest event of every source and view is: in the lake, and in the online store that answers requests.

Ages are in event time and are measured at a moment `at`; a view that is behind its source in the lake is a store that
lags. Reads one column of each source and one small record of each view.
"""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from raymill.actors.aggregates import BEFORE_ALL
from raymill.actors.environment import as_store_error, fetch, is_filled, open_environment, place_of, release
from raymill.actors.evaluate import moments
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.online_records import progress_of
from raymill.actors.served import instant
from raymill.runtime.expressions import SECOND_US
from raymill.runtime.lineage import PREDICTIONS
from raymill.runtime.stores import Online


def freshness(lake: Lake, online: Online, plan: FeaturePlan, at: int) -> dict[str, Any]:
    """How fresh the rows behind a pipeline's features are at a moment, µs UTC.

    Args:
        lake: where its sources' rows are.
        online: where its online store is, as `OnlineReader` takes it.
        plan: its features.
        at: the moment; events after it are passed over.

    Returns:
        `at`; of the lake `sources` [{source, newest_at, age_s}]; of the online store `views` [{view, source, newest_at,
        age_s, behind_s, expired}]: how much older its newest event is than the lake's, and whether it is older than the
        view's max age, so that every newest value of it is unknown. Null: there is none.
    """
    in_lake = {source: _newest_in_lake(lake, source, found.time, at) for source, found in plan.sources.items()}
    newest = _newest_online(online, plan)
    views = []
    for view in plan.event_views:
        online_at = newest[view.name]
        lake_at = in_lake[view.source.name]
        behind = None if online_at is None or lake_at is None else max(lake_at - online_at, 0) / SECOND_US
        told = {"view": view.name, "source": view.source.name, "newest_at": online_at, "age_s": _age_s(online_at, at)}
        expired = view.max_age_us is not None and (online_at is None or at - online_at > view.max_age_us)
        views.append({**told, "behind_s": behind, "expired": expired})
    sources = [{"source": s, "newest_at": t, "age_s": _age_s(t, at)} for s, t in in_lake.items()]
    return {"at": at, "sources": sources, "views": views}


def last_asked(lake: Lake, model: str) -> int | None:
    """Event time of the newest prediction of a model, µs UTC; None: it never answered."""
    if lake.version(PREDICTIONS) is None:
        return None
    found = lake.read(PREDICTIONS, columns=["at"], where=[("model", "=", model)])["at"]
    return int(moments(found, BEFORE_ALL).max()) if len(found) else None


def _newest_in_lake(lake: Lake, source: str, time: str, at: int) -> int | None:
    version = lake.version(source)
    if version is None:
        return None
    found = pc.max(lake.read(source, version=version, columns=[time], where=[(time, "<=", instant(at))])[time])
    return None if found.as_py() is None else int(found.cast("int64").as_py())


def _newest_online(online: Online, plan: FeaturePlan) -> dict[str, int | None]:
    place = place_of(online, plan.pipeline)
    if not is_filled(place):
        return {view.name: None for view in plan.event_views}
    with as_store_error(place):
        environment = open_environment(place)
        try:
            with environment.begin() as txn:
                fetch(txn, [view.progress_name for view in plan.event_views])
                found = {view.name: progress_of(txn, view) for view in plan.event_views}
        finally:
            release(place)
    return {name: None if p is None or p.newest == BEFORE_ALL else p.newest for name, p in found.items()}


def _age_s(newest: int | None, at: int) -> float | None:
    return None if newest is None else max(at - newest, 0) / SECOND_US
