"""What is told of features over HTTP and on the command line, from a real lake, record and online store."""

import json

import pytest

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.feature_readings import FeatureReadings
from raymill.actors.freshness import freshness
from raymill.actors.lakes import Lakes
from raymill.actors.online import OnlineStore
from raymill.runtime.errors import RequestError, UnknownFeature, UnknownModel
from raymill.runtime.feature_registration import register
from raymill.runtime.home import Home
from raymill.runtime.spec import FeatureView
from tests.unit.actors.served_shop import MINUTE, SALES, Shop, pipeline_of, sales


@pytest.fixture
def shop(tmp_path):
    made = Shop(tmp_path)
    made.arrive(sales(*range(60)), "first")
    register(made.records, pipeline_of())
    yield made
    made.close()


@pytest.fixture
def readings(shop):
    return FeatureReadings(shop.records, Lakes(Home(shop.home), shop.records.events))


def test_a_feature_is_told_with_its_statistics_in_training_and_online(shop, readings):
    shop.serve(sales(*range(50, 60)), shop.train())
    shop.recompute.check("shop")
    (found,) = readings.features({"name": "shop.sum"})
    training, online = (found["statistics"][kind] for kind in ("training", "online"))
    assert (training["rows"], online["rows"]) == (50, 10)
    assert training["quantiles"][0] <= training["mean"] <= training["quantiles"][-1]
    assert online["unseen_share"] == 0 and found["models"] == [{"model": "shop", "version": 1, "stage": "candidate"}]
    assert json.loads(json.dumps(found))["columns"][0] == {"column": "sales.price", "role": "value"}


def test_everything_is_json_and_narrowed_by_the_query(readings):
    assert [f["name"] for f in readings.features({})] == ["shop.sum", "sale.twice"]
    assert [f["name"] for f in readings.features({"column": "sales.shop"})] == ["shop.sum"]
    assert readings.lineage({"column": "price"})["labels"] == [{"pipeline": "shop", "label": "dear"}]
    with pytest.raises(UnknownFeature):
        readings.features({"name": "none"})
    with pytest.raises(RequestError, match="name what is asked for"):
        readings.lineage({})
    with pytest.raises(RequestError, match="no version"):
        readings.lineage({"model": "shop", "version": "x"})


def test_freshness_is_the_age_of_the_newest_event_when_the_model_was_last_asked(shop, readings):
    shop.serve(sales(59), shop.train())
    shop.arrive(sales(60, 61, 62), "unseen online", seen=False)
    (told,) = readings.freshness({"at": "1970-01-01T01:03:00Z"})
    assert told["sources"] == [{"source": "sales", "newest_at": 62 * MINUTE, "age_s": 60.0}]
    assert [(v["view"], v["age_s"], v["behind_s"]) for v in told["views"]] == [("shop", 240.0, 180.0)]
    (told,) = readings.freshness({"model": "shop"})
    assert told["at"] == 59.5 * MINUTE and told["views"][0]["behind_s"] == 0
    with pytest.raises(UnknownModel):
        readings.freshness({"model": "none"})


def test_a_view_whose_newest_event_is_older_than_its_max_age_is_expired(shop):
    view = FeatureView("price", SALES, entity="shop", features=["price"], max_age="10m")
    plan = FeaturePlan.of_views([view], SALES, name="aged")
    store = OnlineStore(Home(shop.home).online, plan)
    store.ingest("sales", sales(*range(5)))
    store.close()
    at = [minute * MINUTE for minute in (14, 15)]
    told = [freshness(shop.lake, Home(shop.home).online, plan, moment)["views"][0] for moment in at]
    assert [v["expired"] for v in told] == [False, True]


def test_a_store_that_was_never_filled_has_no_newest_event(shop, readings):
    told = freshness(shop.lake, shop.home / "elsewhere", FeaturePlan.of(pipeline_of()), 90 * MINUTE)
    assert told["views"][0]["newest_at"] is None and told["sources"][0]["age_s"] == 31 * 60
    assert freshness(shop.lake, shop.home, FeaturePlan.of(pipeline_of()), -1)["sources"][0]["newest_at"] is None


def test_the_checks_so_far_are_those_of_the_model(shop, readings):
    shop.serve(sales(59), shop.train())
    judged = shop.recompute.check("shop")
    assert readings.consistency({}) == [json.loads(json.dumps(judged.to_json()))]
    assert readings.consistency({"model": "other"}) == []
