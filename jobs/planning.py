"""What a run needs and may cost: a value, made from the pipeline and `cluster.toml`.

Python functions in its features are looked for as a replica would: by a process that starts elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raymill.actors.rollout import ModelSpec
from raymill.actors.scaling import Scaling
from raymill.cluster.environment import MARKET_LABEL
from raymill.cluster.spec import ClusterConfig, NodeType
from raymill.runtime.errors import SpecError
from raymill.runtime.expressions import SECOND_US, duration_us
from raymill.runtime.row_functions import check_importable
from raymill.runtime.spec import Pipeline, Serve


def refuse_other_host(here: str, head: str, home: str) -> None:
    """Refuse a run whose own files would lie on another host than those of its actors, which are kept on the head.

    Args:
        here: address of the host on which the run's process is.
        head: address of the head's host.
        home: RAYMILL_HOME, a path.

    Raises:
        SpecError: the two are different hosts.
    """
    if here != head:
        raise SpecError(
            f"this process is on {here}, the cluster's head on {head}, and {home} means another folder on each: "
            "run it on the head, e.g. by `ray job submit --working-dir . -- raymill run …`"
        )


def refuse_local_stores(pipeline: Pipeline) -> None:
    """Refuse replicas on any host whose features or predictions would be where only the head's host is.

    Raises:
        SpecError: `serve.anywhere`, and a store that other hosts can not reach, or a drill that kills a process here.
    """
    if not pipeline.serve.anywhere:
        return
    if pipeline.stores.of_one_host:
        raise SpecError(
            f"serve.anywhere=True lets replicas run on other hosts, but {' and '.join(pipeline.stores.of_one_host)}: "
            "give URLs that every host reaches, stores=Stores(lake='s3://bucket/prefix', "
            "online='rediss://host:6379/0'), or leave serve.anywhere away"
        )
    if pipeline.replay and pipeline.replay.drills.kill_replica_on:
        raise SpecError(
            "drills.kill_replica_on kills a process of the head's host, and serve.anywhere=True lets replicas run on "
            "others: leave one of them away"
        )


def replica_options(pipeline: Pipeline, models: Sequence[ModelSpec], on_head: dict[str, Any]) -> dict[str, Any]:
    """Options of `Placement` that say where replicas may be; every model of the endpoint must be servable there."""
    if not pipeline.serve.anywhere or any(m.stores.of_one_host for m in models):
        return on_head
    return {"label_selector": {MARKET_LABEL: "!spot"}}


def scaling_of(serve: Serve) -> Scaling | None:
    """How the number of replicas follows the load; None: it does not."""
    if serve.min_replicas == serve.max_replicas:
        return None
    return Scaling(
        fewest=serve.min_replicas,
        most=serve.max_replicas,
        p99_s=duration_us(serve.p99) / SECOND_US,
        cooldown_s=duration_us(serve.cooldown) / SECOND_US,
        idle_s=duration_us(serve.idle) / SECOND_US,
        spare=serve.warm,
    )


def plan_run(pipeline: Pipeline, config: ClusterConfig) -> dict[str, Any]:
    """The plan, as JSON values.

    Raises:
        SpecError: the cluster can not hold the pipeline, or replicas can not import a feature's Python function.
    """
    refuse_local_stores(pipeline)
    functions = {name: one.expr.functions() for name, one in pipeline.described.items()}
    check_importable(f for found in functions.values() for f in found)
    train, serve = pipeline.train, pipeline.serve
    if train.media:
        raise SpecError(
            f"train.media={train.media}: media reach training batches, but no request carries them, so this model can "
            "not be served: train it by FeatureActor.training_set and Gang, or leave media and decode away"
        )
    markets: dict[str, NodeType] = {kind.market: kind for kind in config.node_types.values()}
    needs: list[dict[str, Any]] = [
        {"purpose": "control", "what": "head", "usd_per_h": config.head.price_usd_per_h},
        {"purpose": "serving", "what": _replicas(serve), "usd_per_h": 0.0},
    ]
    _check_replicas_fit(serve, config)
    room = {market: kind.max_workers for market, kind in markets.items()}
    spot = min(train.ranks - (1 if "reserved" in room else 0), room.get("spot", 0)) if train.spot else 0
    reserved = min(train.ranks - spot, room.get("reserved", 0))
    if reserved + spot < train.min_ranks:
        raise SpecError(
            f"train.min_ranks={train.min_ranks}, but cluster.toml allows {room.get('reserved', 0)} reserved and "
            f"{room.get('spot', 0)} spot nodes{'' if train.spot else ' (spot=False)'}: lower it, or raise max_workers"
        )
    for market, count in (("reserved", reserved), ("spot", spot)):
        if count:
            price = markets[market].price_usd_per_h * count
            needs.append({"purpose": "training", "what": f"{count} {market} nodes", "usd_per_h": price})
    usd_per_h = float(sum(need["usd_per_h"] for need in needs))
    replay = pipeline.replay
    return {
        "pipeline": pipeline.name,
        "sources": [s.name for s in pipeline.sources],
        "features": pipeline.feature_hashes,
        "slow_features": {name: [f.function for f in found] for name, found in functions.items() if found},
        "needs": needs,
        "usd_per_h": usd_per_h,
        "budget_usd_per_day": pipeline.budget.usd_per_day if pipeline.budget else None,
        "hours_within_budget": pipeline.budget.usd_per_day / usd_per_h if pipeline.budget and usd_per_h else None,
        "replay": {"history_until": replay.history_until, "until": replay.until} if replay else None,
        "skipped": [],
    }


def _replicas(serve: Serve) -> str:
    more = f" to {serve.max_replicas}" if serve.max_replicas > serve.min_replicas else ""
    return f"{serve.min_replicas}{more} replicas on {'head and reserved nodes' if serve.anywhere else 'the head'}"


def _check_replicas_fit(serve: Serve, config: ClusterConfig) -> None:
    kinds = [k for k in config.node_types.values() if k.market == "reserved"] if serve.anywhere else []
    cpus = config.head.cpus - 1 + sum(k.resources.get("CPU", 0.0) * k.max_workers for k in kinds)
    if serve.min_replicas > cpus:
        more = "or max_workers" if serve.anywhere else "or let them run elsewhere by serve.anywhere and stores in URLs"
        raise SpecError(
            f"serve.min_replicas={serve.min_replicas}: {_replicas(serve)} need as many CPUs, and there are {cpus:g} "
            f"beside the one that the head keeps: lower it, raise head.cpus in cluster.toml, {more}"
        )
