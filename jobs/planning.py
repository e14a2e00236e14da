"""What a run needs and may cost: a value, made from the pipeline and `cluster.toml` alone."""

from __future__ import annotations

from typing import Any

from raymill.cluster.spec import ClusterConfig, NodeType
from raymill.runtime.errors import SpecError
from raymill.runtime.spec import Pipeline


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
    spot = min(train.ranks - 1, markets["spot"].max_workers) if train.spot and "spot" in markets else 0
    reserved = train.ranks - spot
    room = markets["reserved"].max_workers if "reserved" in markets else 0
    if reserved > room and train.min_ranks > room + spot:
        raise SpecError(
            f"train.min_ranks={train.min_ranks}, but cluster.toml allows {room} reserved and {spot} spot nodes: "
            "lower min_ranks, or raise max_workers"
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
