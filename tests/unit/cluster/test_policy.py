from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.cluster.policy import WatchedNode, departures, started_event, stopped_event


def node(node_id, started_s=100.0):
    return WatchedNode(
        node_id=node_id,
        instance=f"spot-{node_id}",
        node_type="spot",
        market="spot",
        price_usd_per_h=0.3,
        started_s=started_s,
    )


def test_a_node_that_ray_lost_departs_with_the_reason_and_time_somebody_knows():
    known = {n: node(n) for n in "abc"}
    gone = departures(known, frozenset("a"), {"b": "spot reclaim"}, {"b": 150.0}, 200.0)
    assert [(d.node.node_id, d.reason, d.stopped_s) for d in gone] == [
        ("b", "spot reclaim", 150.0),
        ("c", "lost", 200.0),
    ]


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1e9), st.floats(0, 1e9), st.floats(0, 1e9))
def test_no_node_costs_a_negative_time_or_beyond_now(started_s, gone_s, now_s):
    (departure,) = departures({"a": node("a", started_s)}, frozenset(), {}, {"a": gone_s}, now_s)
    event = stopped_event(departure)
    assert event.data["seconds"] >= 0 and event.wall_s <= max(now_s, started_s)


def test_the_ledger_gets_type_market_price_and_reason():
    (departure,) = departures({"a": node("a")}, frozenset(), {"a": "idle"}, {}, 160.0)
    assert started_event(node("a")).data["price_usd_per_h"] == 0.3
    said = stopped_event(departure)
    assert (said.key, said.data["seconds"], said.data["reason"], said.data["market"]) == (
        "node.stopped/a",
        60.0,
        "idle",
        "spot",
    )
