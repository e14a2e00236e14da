"""Who gets bundles: everything that is granted fits, the first rank is safe, and the others hear why they wait."""

from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.gang import Asked, Facts, Grant, Held, Node, NodeKind, Queue, decide
from raymill.runtime.messages import LeaseRequest, Purpose

GPU = {"CPU": 1.0, "GPU": 1.0}
KINDS = (
    NodeKind(name="reserved", market="reserved", resources=GPU, max_nodes=1),
    NodeKind(name="spot", market="spot", resources=GPU, max_nodes=3),
)


def ask(count=2, *, min_count=1, spot=True, owner="gang", tenant="default", last_chance=False, resources=GPU):
    request = LeaseRequest(
        owner=owner, purpose=Purpose.TRAINING, count=count, min_count=min_count, resources=resources, spot=spot,
        tenant=tenant,
    )  # fmt: skip
    return Asked(request=request, last_chance=last_chance)


def node(name, market="", free=GPU, *, draining=False, total=GPU):
    return Node(node_id=name, node_type=market, market=market, total=total, free=free, draining=draining)


def one(asked, **facts):
    (decision,) = decide([asked], Facts(**{"nodes": (), **facts}))
    return decision


def test_the_first_rank_goes_to_a_reserved_node_and_the_rest_to_spot():
    assert one(ask(3), kinds=KINDS) == Grant(markets=("reserved", "spot", "spot"), launches=3)


def test_without_leave_for_spot_everything_is_reserved():
    assert one(ask(1, spot=False), kinds=KINDS) == Grant(markets=("reserved",), launches=1)
    refused = one(ask(2, min_count=2, spot=False), kinds=KINDS)
    assert isinstance(refused, Queue) and refused.hopeless and "never fits" in refused.reason


def test_an_owner_that_has_its_reserved_rank_grows_on_spot():
    held = (Held(owner="gang", tenant="default", market="reserved", resources=GPU),)
    assert one(ask(1), kinds=KINDS, held=held, nodes=(node("r", "reserved", {}),)).markets == ("spot",)


def test_spot_falls_back_to_reserved_when_the_spot_market_is_full():
    kinds = (KINDS[0], NodeKind(name="spot", market="spot", resources=GPU, max_nodes=0))
    big = node("r", "reserved", {"CPU": 2.0, "GPU": 2.0}, total={"CPU": 2.0, "GPU": 2.0})
    assert one(ask(2), kinds=kinds, nodes=(big,)) == Grant(markets=("reserved", "reserved"), launches=0)


def test_nodes_that_are_there_are_used_before_new_ones_are_launched():
    nodes = (node("r", "reserved"), node("s", "spot"))
    assert one(ask(2), kinds=KINDS, nodes=nodes) == Grant(markets=("reserved", "spot"), launches=0)
    assert one(ask(3), kinds=KINDS, nodes=nodes).launches == 1


def test_nothing_goes_to_a_node_that_will_be_taken_away():
    nodes = (node("a", draining=True), node("b", free={}))
    waiting = one(ask(1, spot=False), nodes=nodes)
    assert isinstance(waiting, Queue) and "1 going away" in waiting.reason and not waiting.hopeless


def test_a_cluster_without_markets_gives_any_node():
    assert one(ask(2), nodes=(node("a"), node("b"))) == Grant(markets=("", ""), launches=0)


def test_fewer_than_asked_are_given_only_when_time_is_up():
    nodes = (node("a"), node("b", free={}))
    waiting = one(ask(2), nodes=nodes)
    assert isinstance(waiting, Queue)
    assert "1 of 2 bundles of {CPU: 1, GPU: 1} fit now (1 would do)" in waiting.reason
    assert one(ask(2, last_chance=True), nodes=nodes) == Grant(markets=("",), launches=0)
    assert isinstance(one(ask(2, min_count=2, last_chance=True), nodes=nodes), Queue)


def test_when_time_is_up_no_node_is_launched_any_more():
    assert isinstance(one(ask(1, last_chance=True), kinds=KINDS), Queue)


def test_what_can_never_fit_is_told_so_with_what_there_is():
    refused = one(ask(1, resources={"GPU": 4.0}), kinds=KINDS)
    assert isinstance(refused, Queue) and refused.hopeless
    assert "1 × {GPU: 4} never fits" in refused.reason and "node type spot (at most 3) has {GPU: 1}" in refused.reason


def test_a_cluster_of_spot_only_refuses_who_does_not_allow_it():
    refused = one(ask(1, spot=False), kinds=KINDS[1:])
    assert isinstance(refused, Queue) and "set spot=True" in refused.reason


def test_a_waiting_gang_keeps_what_it_could_use_from_smaller_later_ones():
    nodes = (node("a"), node("b", free={}))
    first, second = decide([ask(2, min_count=2), ask(1, owner="late")], Facts(nodes=nodes))
    assert isinstance(first, Queue) and isinstance(second, Queue)


def test_what_can_never_fit_holds_up_nobody():
    huge = ask(1, resources={"GPU": 64.0})
    assert isinstance(decide([huge, ask(1)], Facts(nodes=(node("a"),)))[1], Grant)


def test_a_launch_that_is_under_way_is_not_counted_on_twice():
    coming = (Held(owner="x", tenant="default", market="spot", resources=GPU, placed=False),) * 3
    waiting = one(ask(2, min_count=2), kinds=KINDS, held=coming)
    assert isinstance(waiting, Queue) and not waiting.hopeless


def test_a_quota_bounds_a_tenant_and_says_how_much_it_holds():
    facts = {
        "nodes": tuple(node(n) for n in "abcd"),
        "held": (Held(owner="x", tenant="team", market="", resources=GPU),) * 2,
        "quotas": {"team": {"GPU": 3.0}},
    }
    waiting = one(ask(2, tenant="team"), **facts)
    assert isinstance(waiting, Queue) and "tenant 'team' holds {GPU: 2} of its {GPU: 3}" in waiting.reason
    assert one(ask(2, tenant="team", last_chance=True), **facts).markets == ("",)
    assert one(ask(2, tenant="other"), **facts).markets == ("", "")


AMOUNT = st.integers(0, 3).map(float)
MARKET = st.sampled_from(["", "reserved", "spot"])
NODES = st.lists(
    st.builds(
        lambda market, cpu, gpu, draining: (market, {"CPU": cpu, "GPU": gpu}, draining),
        MARKET, AMOUNT, AMOUNT, st.booleans(),
    ),
    max_size=5,
)  # fmt: skip
ASKS = st.lists(
    st.builds(
        lambda count, less, spot, owner, cpu, gpu, last: ask(
            count, min_count=max(1, count - less), spot=spot, owner=owner, last_chance=last,
            resources={"CPU": cpu, "GPU": gpu},
        ),
        st.integers(1, 4), st.integers(0, 3), st.booleans(), st.sampled_from("ab"), st.just(1.0), AMOUNT,
        st.booleans(),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(nodes=NODES, asks=ASKS, launchable=st.integers(0, 2))
def test_all_that_is_granted_fits_and_is_lawful(nodes, asks, launchable):
    kinds = tuple(NodeKind(name=m, market=m, resources=GPU, max_nodes=launchable) for m in ("reserved", "spot"))
    facts = Facts(
        nodes=tuple(
            Node(node_id=str(i), market=m, total=r, free=r, draining=d, node_type=m)
            for i, (m, r, d) in enumerate(nodes)
        ),
        kinds=kinds if launchable else (),
    )
    decisions = decide(asks, facts)
    there = {m: {"CPU": 0.0, "GPU": 0.0} for m in ("", "reserved", "spot")}
    for n in facts.nodes:
        for r in n.free if not n.draining else ():
            there[n.market][r] += n.free[r]
    for kind in facts.kinds:
        left = max(0, kind.max_nodes - sum(n.node_type == kind.name for n in facts.nodes))
        for r in there[kind.market]:
            there[kind.market][r] += left * kind.resources[r]
    everything = {r: sum(m[r] for m in there.values()) for r in ("CPU", "GPU")}
    for asked, decision in zip(asks, decisions, strict=True):
        if isinstance(decision, Queue):
            assert decision.reason
            continue
        request = asked.request
        assert (request.min_count if asked.last_chance else request.count) <= len(decision.markets) <= request.count
        assert not asked.last_chance or decision.launches == 0
        if "reserved" in facts.markets:
            assert decision.markets[0] == "reserved"
        assert request.spot or "spot" not in decision.markets
        for market in decision.markets:
            for r, amount in request.resources.items():
                pool = there[market] if facts.markets else everything
                pool[r] -= amount
                assert pool[r] >= -1e-6
