from dataclasses import replace

import pytest

from raymill.cluster.spec import load_config
from raymill.jobs.planning import plan_run
from raymill.runtime import Budget, Col, Cost, FeatureView, Label, Monitor, Pipeline, Serve, Source, Train, col
from raymill.runtime.errors import SpecError

ROWS = Source("rows", key=["ref"], time="t", schema={"ref": Col("string"), "t": Col("timestamp"), "v": Col("float64")})


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


def test_without_spot_every_rank_is_reserved():
    plan = plan_run(a_pipeline(train=Train(lambda n: None, ranks=2)), load_config())
    assert [n["what"] for n in plan["needs"] if n["purpose"] == "training"] == ["2 reserved nodes"]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"train": Train(lambda n: None, ranks=9, min_ranks=9)}, "lower it"),
        ({"serve": Serve(min_replicas=7, max_replicas=7)}, "serve.min_replicas=7"),
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
