"""The cost of nodes: the parts sum to the bill and none is negative, whatever the events."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.runtime import cost


def event(kind, subject, wall_s, **data):
    named = {k: data.pop(k, "") for k in ("pipeline", "run")}
    return {"kind": kind, "subject": subject, "wall_s": float(wall_s), "data": data, **named}


def started(node="n", wall_s=0, price=3.6, node_type="spot"):
    return event("node.started", node, wall_s, node_type=node_type, market=node_type, price_usd_per_h=price)


def stopped(node="n", wall_s=100):
    return event("node.stopped", node, wall_s)


def granted(lease="l", wall_s=0, node="n", purpose="training", **data):
    return event("lease.granted", lease, wall_s, node_id=node, purpose=purpose, **{"tenant": "t", **data})


def released(lease="l", wall_s=100):
    return event("lease.released", lease, wall_s)


# 3.6 USD/h is a thousandth of a dollar a second
def test_a_node_is_training_while_it_is_leased_and_idle_else():
    found = cost.split([started(), granted(wall_s=20), released(wall_s=70), stopped()], 500)
    assert found.bill_usd == 0.1
    assert found.parts == {"training": 0.05, "serving": 0.0, "idle": 0.05}
    (node,) = found.nodes
    assert (node.seconds, node.running, node.usd, node.parts) == (100.0, False, 0.1, found.parts)


def test_what_has_not_ended_costs_up_to_now():
    found = cost.split([started(), granted(wall_s=20)], 60)
    assert found.parts == {"training": 0.04, "serving": 0.0, "idle": 0.02} and found.nodes[0].running


def test_a_lease_that_was_never_released_ends_with_its_node():
    assert cost.split([started(), granted(wall_s=50), stopped()], 900).parts["training"] == 0.05


def test_a_replica_has_its_share_of_the_head():
    events = [started("h", node_type="head"), granted(node="", purpose="serving", share=0.25), stopped("h")]
    assert cost.split(events, 500).parts == {"training": 0.0, "serving": 0.025, "idle": 0.075}


def test_leases_that_overlap_never_exceed_the_node():
    events = [started(), granted("a", share=1.0), granted("b", 50, purpose="serving", share=1.0), stopped()]
    assert cost.split(events, 500).parts == {"training": 0.075, "serving": 0.025, "idle": 0.0}


def test_a_cluster_that_died_without_a_word_ends_when_it_was_last_heard_of():
    events = [
        started("h1", node_type="head"), started("n1"), granted("l", 10, "n1"), event("rows.appended", "x", 40),
        started("h2", 1000, node_type="head"), released("l", 1001), stopped("h2", 1010),
    ]  # fmt: skip
    found = cost.split(events, 2000)
    assert [n.seconds for n in found.nodes] == [40.0, 40.0, 10.0]
    assert found.parts == {"training": 0.03, "serving": 0.0, "idle": 0.06}


def test_what_the_ledger_says_later_of_a_dead_cluster_is_believed():
    events = [started("h1", node_type="head"), started("h2", 100, node_type="head"), stopped("h1", 70)]
    assert [n.seconds for n in cost.split(events, 110).nodes] == [70.0, 10.0]


def test_a_window_counts_only_what_lies_in_it():
    events = [started(), granted(wall_s=20), released(wall_s=70), stopped()]
    found = cost.split(events, 80, since_s=60)
    assert found.bill_usd == 0.02 and found.parts == {"training": 0.01, "serving": 0.0, "idle": 0.01}


def test_it_is_split_by_run_pipeline_and_tenant():
    events = [
        started(), granted("a", 0, run="r1", pipeline="p"), released("a", 10),
        granted("b", 10, run="r2", pipeline="p", purpose="serving", tenant="u"), released("b", 30), stopped(),
    ]  # fmt: skip
    found = cost.split(events, 500)
    assert found.by_run == {"r1": {"training": 0.01}, "r2": {"serving": 0.02}}
    assert found.by_pipeline == {"p": {"training": 0.01, "serving": 0.02}}
    assert found.by_tenant == {"t": {"training": 0.01}, "u": {"serving": 0.02}}
    json.dumps(found.to_json(), allow_nan=False)


def test_leases_of_nodes_without_a_price_are_counted_apart():
    found = cost.split([granted(node="elsewhere"), released()], 500)
    assert found.unpriced_leases == 1 and found.bill_usd == 0.0 and found.nodes == ()


def test_a_node_that_comes_back_under_its_name_has_two_spans():
    found = cost.split([started(), stopped(wall_s=10), started(wall_s=50), granted(wall_s=55), stopped(wall_s=60)], 99)
    assert [n.seconds for n in found.nodes] == [10.0, 10.0] and found.parts["training"] == 0.005


TIMES = st.one_of(st.integers(0, 20).map(float), st.floats(0, 20))
NODE = st.sampled_from(["n1", "n2", "h"])
LEASE = st.sampled_from(["a", "b", "c", "d"])
EVENTS = st.lists(
    st.one_of(
        st.builds(
            lambda n, t, p: started(n, t, p, "head" if n == "h" else "spot"), NODE, TIMES, st.floats(0, 100)
        ),
        st.builds(stopped, NODE, TIMES),
        st.builds(
            lambda i, t, n, p, s, r: granted(i, t, n, p, share=s, run=r),
            LEASE, TIMES, st.sampled_from(["n1", "n2", "h", "", "lost"]), st.sampled_from(["training", "serving"]),
            st.floats(0, 1.5), st.sampled_from(["r1", "r2"]),
        ),
        st.builds(released, LEASE, TIMES),
    ),
    max_size=25,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(events=EVENTS, in_order=st.booleans(), now_s=TIMES, since_s=st.one_of(st.just(float("-inf")), TIMES))
def test_parts_sum_to_the_bill_and_none_is_negative(events, in_order, now_s, since_s):
    if in_order:
        events = sorted(events, key=lambda e: e["wall_s"])
    found = cost.split(events, now_s, since_s=since_s)

    def millionths(usd):
        assert usd >= 0
        return round(usd * 1e6)

    assert sum(millionths(v) for v in found.parts.values()) == millionths(found.bill_usd)
    assert sum(millionths(n.usd) for n in found.nodes) == millionths(found.bill_usd)
    for node in found.nodes:
        assert sum(millionths(v) for v in node.parts.values()) == millionths(node.usd)
        assert node.usd == pytest.approx(node.seconds * node.price_usd_per_h / 3600, abs=1e-6)
    for by in (found.by_run, found.by_pipeline, found.by_tenant):
        for purpose in cost.PURPOSES:
            whole = sum(millionths(parts.get(purpose, 0.0)) for parts in by.values())
            assert whole == millionths(found.parts[purpose])
