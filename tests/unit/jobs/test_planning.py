from dataclasses import replace

import pytest

from raymill.actors.rollout import spec_of
from raymill.cluster.spec import load_config
from raymill.jobs.planning import plan_run, replica_options
from raymill.runtime import (
    Budget,
    Col,
    Cost,
    Drills,
    FeatureView,
    Label,
    Monitor,
    Pipeline,
    Replay,
    Serve,
    Source,
    Stores,
    Train,
    col,
    python,
)
from raymill.runtime.errors import SpecError
from raymill.runtime.expressions import duration_us

ROWS = Source("rows", key=["ref"], time="t", schema={"ref": Col("string"), "t": Col("timestamp"), "v": Col("float64")})


FAR = Stores(lake="s3://bucket/x", online="rediss://10.0.0.7:6379/0")
KILL = Drills(kill_replica_on="2020-01-02")


def a_pipeline(**other) -> Pipeline:
    fields = {
        "views": [FeatureView("past", ROWS, entity="ref", features={"m": col("v").mean("1d")})],
        "label": Label("big", ROWS, col("v") > 1),
        "train": Train(lambda n: None, ranks=2, spot=True),
        "monitor": Monitor(cost=Cost(missed=2, false_alarm=1)),
    }
    return Pipeline("demo", **fields | other)


def test_the_plan_names_what_is_needed_and_its_price():
    config = load_config()
    plan = plan_run(a_pipeline(budget=Budget(usd_per_day=14)), config)
    prices = {n["what"]: n["usd_per_h"] for n in plan["needs"] if n["purpose"] == "training"}
    assert prices == {"1 reserved nodes": config.price("reserved"), "1 spot nodes": config.price("spot")}
    assert plan["usd_per_h"] == pytest.approx(config.head.price_usd_per_h + sum(prices.values()))
    assert plan["hours_within_budget"] == pytest.approx(14 / plan["usd_per_h"])
    assert set(plan["features"]) == {"past.m"}
    assert plan["slow_features"] == {}


def test_the_plan_names_slow_features_and_refuses_functions_that_only_this_process_can_import():
    def views(function):
        return [FeatureView("past", ROWS, entity="ref", features={"m": python(function, col("v")).mean("1d")})]

    plan = plan_run(a_pipeline(views=views(duration_us)), load_config())
    assert plan["slow_features"] == {"past.m": ["raymill.runtime.expressions:duration_us"]}
    with pytest.raises(SpecError, match="PYTHONPATH before `raymill up`"):
        plan_run(a_pipeline(views=views(a_pipeline)), load_config())


def test_without_spot_every_rank_is_reserved():
    plan = plan_run(a_pipeline(train=Train(lambda n: None, ranks=2)), load_config())
    assert [n["what"] for n in plan["needs"] if n["purpose"] == "training"] == ["2 reserved nodes"]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"train": Train(lambda n: None, ranks=9, min_ranks=9)}, "lower it"),
        ({"serve": Serve(min_replicas=7, max_replicas=7)}, "serve.min_replicas=7: 7 replicas on the head.*anywhere"),
        ({"serve": Serve(min_replicas=7, max_replicas=7, anywhere=True), "stores": FAR}, "reserved nodes.*there are 5"),
        ({"serve": Serve(anywhere=True)}, "the lake is a folder of RAYMILL_HOME and the online store is a folder"),
        (
            {"serve": Serve(anywhere=True), "stores": replace(FAR, online=None)},
            "the online store is a folder.*rediss://",
        ),
        ({"serve": Serve(anywhere=True), "stores": replace(FAR, lake=None)}, "the lake is a folder.*s3://bucket"),
        (
            {"serve": Serve(anywhere=True), "stores": replace(FAR, online="redis://localhost")},
            "redis://localhost means another place on each host",
        ),
        (
            {"serve": Serve(anywhere=True), "stores": FAR, "replay": Replay("2020-01-01", drills=KILL)},
            "kill_replica_on",
        ),
    ],
)
def test_what_the_cluster_can_not_hold_is_refused_before_anything_starts(other, says):
    with pytest.raises(SpecError, match=says):
        plan_run(a_pipeline(**other), load_config())


def test_a_gang_that_may_shrink_is_planned_on_what_there_is():
    config = load_config()
    few = config.model_copy(update={"node_types": {"spot": config.node_types["spot"]}})
    plan = plan_run(a_pipeline(train=replace(a_pipeline().train, ranks=3, min_ranks=1)), few)
    assert any(n["what"] == "2 spot nodes" for n in plan["needs"])


def test_replicas_leave_the_heads_host_only_if_asked_and_if_every_model_can_be_served_there():
    head = {"resources": {"head": 0.01}}
    far, near = a_pipeline(serve=Serve(min_replicas=5, max_replicas=5, anywhere=True), stores=FAR), a_pipeline()
    models = [spec_of(far, None, []), spec_of(near, None, [])]
    plan = plan_run(far, load_config())
    assert "5 replicas on head and reserved nodes" in [n["what"] for n in plan["needs"]]
    assert replica_options(far, models[:1], head) == {"label_selector": {"raymill.io/market": "!spot"}}
    assert replica_options(far, models, head) == head
    assert replica_options(a_pipeline(stores=FAR), models[:1], head) == head
