"""Run by test_cluster.py in a process of its own: lease, market, idleness, restart of the actor; prints JSON."""

import json
import sys
import time
from pathlib import Path

from raymill.cluster import session
from raymill.runtime.home import Home

HEAD = {"resources": {"head": 0.01}}
home = Home(Path(sys.argv[1]))
found = session.load(home)
assert found is not None
found.enter()

import ray  # noqa: E402  it reads the session's variables at import
from ray.util.placement_group import placement_group, remove_placement_group  # noqa: E402

from raymill.cluster.nodes import ClusterActor  # noqa: E402
from raymill.cluster.spec import load_config  # noqa: E402
from raymill.runtime.messages import Notice  # noqa: E402
from raymill.runtime.records import RecordsActor, RemoteRecords  # noqa: E402
from raymill.runtime.spawn import find, spawn  # noqa: E402


class Scheduler:
    def __init__(self) -> None:
        self.notices: list[Notice] = []

    def start(self) -> None:
        pass

    def notice(self, notice: Notice) -> None:
        self.notices.append(notice)

    def seen(self) -> list[str]:
        return [n.node_id for n in self.notices]


def until(condition, what, limit_s=90.0):
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > limit_s:
            raise TimeoutError(f"{what} after {limit_s} s; {ray.get(find('cluster').status.remote())}")
        time.sleep(0.1)
    return round(time.monotonic() - began, 2)


def alive_workers():
    return [
        n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Labels"].get("raymill.io/market") in ("spot", "reserved")
    ]


ray.init(address=found.address, namespace="raymill", log_to_driver=False)
told = {"refused_without_records": False}
try:
    alone = (
        ray.remote(ClusterActor).options(num_cpus=0).remote(str(home.root), load_config(), RemoteRecords(patience_s=1))
    )
    ray.get(alone.start.remote())
except ray.exceptions.RayTaskError as err:
    told["refused_without_records"] = "records" in str(err)
spawn(RecordsActor, str(home.root), name="records", **HEAD)
spawn(Scheduler, name="scheduler", **HEAD)
cluster = spawn(ClusterActor, str(home.root), load_config(), name="cluster", **HEAD)
assert ray.get(cluster.health.remote())

group = placement_group([{"CPU": 1, "GPU": 1}], bundle_label_selector=[{"raymill.io/market": "spot"}])
told["group_s"] = until(lambda: group.wait(0), "spot group")
first = alive_workers()[0]
until(lambda: first in [n["node_id"] for n in ray.get(cluster.status.remote())["nodes"]], "node watched")
ray.get(cluster.replay.remote([{"at_s": 0, "available": False, "notice_s": 3}, {"at_s": 14, "available": True}]))
told["noticed"] = ray.get(find("scheduler").seen.remote()) == [first]
told["alive_at_notice"] = first in alive_workers()
told["gone_s"] = until(lambda: first not in alive_workers(), "reclaim")
told["refused_while_closed"] = not alive_workers()
told["back_s"] = until(lambda: bool(alive_workers()), "node after the market opened")
second = alive_workers()[0]
until(lambda: group.wait(0), "group on the new node")
ray.kill(cluster, no_restart=False)
until(lambda: len(ray.get(find("cluster").status.remote())["nodes"]) == 2, "cluster actor is back")
remove_placement_group(group)
told["idle_s"] = until(lambda: not alive_workers(), "idle node gone")
events = find("records").events
until(lambda: len(ray.get(events.remote("node.stopped"))) == 2, "stops in the ledger")
told["events"] = [
    [e["kind"], e["subject"], e["data"]]
    for e in ray.get(events.remote())
    if e["kind"].split(".")[0] in ("node", "spot")
]
told["nodes"] = [first, second]
print(json.dumps(told))
