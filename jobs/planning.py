"""What a run needs and may cost: a value, made from the pipeline and `cluster.toml` alone."""

from __future__ import annotations

from typing import Any

from raymill.cluster.spec import ClusterConfig, NodeType
from raymill.runtime.errors import SpecError
from raymill.runtime.spec import Pipeline


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


def plan_run(pipeline: Pipeline, config: ClusterConfig) -> dict[str, Any]:
    """The plan, as JSON values.

    Raises:
        SpecError: the cluster can not hold the pipeline.
    """
    train, serve = pipeline.train, pipeline.serve
    markets: dict[str, NodeType] = {kind.market: kind for kind in config.node_types.values()}
    needs: list[dict[str, Any]] = [
        {"purpose": "control", "what": "head", "usd_per_h": config.head.price_usd_per_h},
        {"purpose": "serving", "what": f"{serve.min_replicas} replicas on the head", "usd_per_h": 0.0},
    ]
    if serve.min_replicas > config.head.cpus - 1:
        raise SpecError(
            f"serve.min_replicas={serve.min_replicas} needs as many CPUs and one to spare on the head, "
            f"which has {config.head.cpus}: lower it, or raise head.cpus in cluster.toml"
        )
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
        "needs": needs,
        "usd_per_h": usd_per_h,
        "budget_usd_per_day": pipeline.budget.usd_per_day if pipeline.budget else None,
        "hours_within_budget": pipeline.budget.usd_per_day / usd_per_h if pipeline.budget and usd_per_h else None,
        "replay": {"history_until": replay.history_until, "until": replay.until} if replay else None,
        "skipped": [],
    }
