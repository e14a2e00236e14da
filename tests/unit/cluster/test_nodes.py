import os
import subprocess
import time

import pytest

from raymill.cluster.books import close_books, read_watched
from raymill.cluster.node_table import NodeEntry, NodeState, NodeTable, read_table, write_table
from raymill.cluster.nodes import ClusterActor, SeenNode
from raymill.cluster.processes import NODE_MARK, describe
from raymill.cluster.spec import load_config
from raymill.cluster.spot_state import read_capacity, read_spot
from raymill.runtime.errors import ClusterError, Unavailable
from raymill.runtime.home import Home
from raymill.runtime.ledger import Ledger

HEAD = SeenNode(node_id="h", instance="head", node_type="head")
SPOT = SeenNode(node_id="s", instance="spot-1", node_type="spot")


class World:
    """A ledger in memory, a scheduler, and the nodes that Ray shows."""

    def __init__(self, path):
        self.home, self.nodes, self.events, self.notices = Home(path), [HEAD], {}, []
        self.records_away = self.scheduler_away = False

    def actor(self):
        return ClusterActor(str(self.home.root), load_config(), self.record, self.notify, lambda: list(self.nodes))

    def record(self, events):
        if self.records_away:
            raise Unavailable("no records")
        for event in events:
            self.events.setdefault(event.key, event)

    def notify(self, notice):
        if self.scheduler_away:
            raise Unavailable("no scheduler")
        self.notices.append(notice.node_id)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def spot_process(world):
    """A process that plays the spot node's raylet, in the provider's table."""
    process = subprocess.Popen(["sleep", "60"], env={**os.environ, NODE_MARK: "spot-1"})
    entry = NodeEntry(
        instance="spot-1",
        node_type="spot",
        market="spot",
        state=NodeState.RUNNING,
        tags={},
        launched_s=time.time(),
        raylet=describe(process.pid),
    )
    write_table(world.home, NodeTable().put(entry))
    world.nodes.append(SPOT)
    yield process
    process.kill()
    process.wait()


def test_nodes_that_come_and_go_are_in_the_ledger_once_with_their_price(world):
    actor = world.actor()
    actor.look()
    world.nodes.append(SPOT)
    actor.look()
    world.nodes.remove(SPOT)
    actor.look()
    actor.look()
    assert list(world.events) == ["node.started/h", "node.started/s", "node.stopped/s"]
    assert world.events["node.started/h"].data["price_usd_per_h"] == load_config().head.price_usd_per_h


def test_without_a_records_actor_the_watch_does_not_start(world):
    world.records_away = True
    with pytest.raises(Unavailable):
        world.actor().start()


def test_what_the_ledger_did_not_take_is_written_at_a_later_look(world):
    actor = world.actor()
    world.records_away = True
    with pytest.raises(Unavailable):
        actor.look()
    world.records_away = False
    actor.look()
    assert "node.started/h" in world.events


def test_a_spot_node_is_noticed_then_ended_and_launches_are_refused(world, spot_process):
    actor = world.actor()
    actor.look()
    actor.replay([{"at_s": 0, "available": False, "notice_s": 0.3}])
    assert world.notices == ["s"] and spot_process.poll() is None and read_capacity(world.home) == 0
    time.sleep(0.35)
    actor.look()
    assert spot_process.wait(timeout=5) == -9
    world.nodes.remove(SPOT)
    actor.look()
    assert world.events["node.stopped/s"].data["reason"] == "spot reclaim"
    assert {"spot.noticed/s", "spot.reclaimed/s"} <= world.events.keys()


def test_an_actor_killed_between_notice_and_deadline_takes_the_node_when_it_is_back(world, spot_process):
    actor = world.actor()
    actor.look()
    actor.reclaim(notice_s=0.1)
    time.sleep(0.15)
    back = world.actor()
    back.start()
    back.stop()
    assert spot_process.wait(timeout=5) == -9 and world.notices == ["s"]


def test_a_scheduler_that_is_away_is_told_when_it_is_back_and_the_fault_shows_meanwhile(world, spot_process):
    actor = world.actor()
    actor.look()
    world.scheduler_away = True
    actor.reclaim(notice_s=60)
    assert "not delivered" in actor.status()["fault"]
    world.scheduler_away = False
    actor.look()
    assert world.notices == ["s"] and actor.status()["fault"] == ""


def test_a_node_that_went_before_its_deadline_was_not_reclaimed(world, spot_process):
    actor = world.actor()
    actor.look()
    actor.reclaim(notice_s=0.05)
    world.nodes.remove(SPOT)
    time.sleep(0.1)
    actor.look()
    assert "spot.reclaimed/s" not in world.events and read_spot(world.home).reclaims == []


def test_there_is_nothing_to_reclaim_without_a_spot_node(world):
    actor = world.actor()
    actor.look()
    with pytest.raises(ClusterError, match="no spot node"):
        actor.reclaim(notice_s=1)


def test_the_books_of_a_dead_cluster_are_closed_when_the_nodes_were_last_seen(world):
    world.actor().look()
    nodes, seen_s = read_watched(world.home)
    Ledger(world.home.record).close()
    assert close_books(world.home, reason="down", stopped_s=None) == len(nodes) == 1
    ledger = Ledger(world.home.record)
    (stop,) = ledger.events("node.stopped")
    ledger.close()
    assert stop["wall_s"] == seen_s and close_books(world.home, reason="down", stopped_s=None) == 0


def test_a_damaged_node_table_is_named(world):
    world.home.cluster.mkdir(parents=True)
    (world.home.cluster / "nodes.json").write_text("{")
    with pytest.raises(ClusterError, match=r"nodes\.json is damaged"):
        read_table(world.home)
