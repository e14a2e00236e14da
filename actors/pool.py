"""The cluster as the scheduler sees and changes it: nodes, and one detached placement group per lease.

The only file of the scheduler that calls Ray; a fake with the same methods stands in for it in unit tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state as ray_state  # jobs and free resources per node have no public call without dashboard
from ray.util.placement_group import PlacementGroup

from raymill.actors.gang import Node, Resources

MARKET_LABEL = "raymill.io/market"
"""Label of a node that says which market it was bought in."""
_TYPE_LABEL = "ray.io/node-group"
_NODE_LABEL = "ray.io/node-id"
_HEAD_RESOURCE = "node:__internal_head__"
_PREFIX = "lease:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A placement group of ours as it was observed."""

    handle: Any
    """What actors are started with."""
    node_id: str
    """Node its bundle lies on; empty: none (yet, or any more)."""
    state: str
    """PENDING, CREATED, RESCHEDULING …"""


class RayPool:
    """Nodes and placement groups of the Ray cluster this process is connected to."""

    def nodes(self) -> list[Node]:
        """Nodes that are up."""
        free = ray_state.available_resources_per_node()
        return [
            Node(
                node_id=n["NodeID"],
                node_type=n["Labels"].get(_TYPE_LABEL, ""),
                market=n["Labels"].get(MARKET_LABEL, ""),
                total=n["Resources"],
                free=free.get(n["NodeID"], {}),
            )
            for n in ray.nodes()
            if n["Alive"]
        ]

    def head(self) -> str:
        """Node id of the head, where replicas run."""
        return next((n["NodeID"] for n in ray.nodes() if n["Alive"] and _HEAD_RESOURCE in n["Resources"]), "")

    def create(self, lease_id: str, bundle: Resources, market: str, avoid: list[str]) -> Any:
        """Ask for a bundle; what is pending is demand that makes the autoscaler launch a node."""
        selector = {MARKET_LABEL: market} if market else {}
        if avoid:
            selector[_NODE_LABEL] = f"!in({','.join(sorted(avoid))})" if len(avoid) > 1 else f"!{avoid[0]}"
        return ray.util.placement_group(
            [bundle],
            strategy="PACK",
            name=_PREFIX + lease_id,
            lifetime="detached",
            bundle_label_selector=[selector] if selector else None,
        )

    def groups(self) -> dict[str, Group]:
        """Lease id → its placement group, for all of ours that are not removed."""
        found = {}
        for group_id, row in ray.util.placement_group_table().items():
            if row["name"].startswith(_PREFIX) and row["state"] != "REMOVED":
                handle = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))
                found[row["name"].removeprefix(_PREFIX)] = Group(
                    handle=handle,
                    node_id=row["bundles_to_node_id"].get(0, "") if row["state"] == "CREATED" else "",
                    state=row["state"],
                )
        return found

    def remove(self, handle: Any) -> None:
        """Give a bundle back; what still runs in it is killed. Removing it twice is no error."""
        ray.util.remove_placement_group(handle)

    def dead_jobs(self) -> set[str]:
        """Ids of the jobs whose driver is gone."""
        return {job["JobID"] for job in ray_state.jobs() if job["IsDead"]}
