"""The feature registry on a real record: what is registered, found, led back and forth, and not to be used any more."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.runtime.errors import Conflict, UnknownFeature
from raymill.runtime.expressions import col
from raymill.runtime.feature_registration import declaration, deprecate, register, restore, written
from raymill.runtime.feature_registry import Catalogue
from raymill.runtime.messages import Event, Manifest
from raymill.runtime.records import RecordsActor
from raymill.runtime.spec import Col, Cost, FeatureView, Label, Monitor, OnDemand, Pipeline, Source, Train
from raymill.runtime.view_spec import Feature

SALES = Source(
    "sales", key=["sale"], time="sold", known_at="booked",
    schema={
        "sale": Col("int64"), "sold": Col("timestamp"), "booked": Col("timestamp", nullable=True),
        "shop": Col("string"), "price": Col("float64"),
    },
)  # fmt: skip


def no_model(inputs):
    raise AssertionError("no model is built here")


def pipeline_of(name="shop", window="7d"):
    takings = Feature(col("price").mean(window), description="Mean price", unit="USD", owner="ann", tags=["money"])
    return Pipeline(
        name,
        views=[
            FeatureView("shop", SALES, entity="shop", features={"takings": takings}, tags=["retail"]),
            OnDemand("sale", {"hour": col("sold").hour(), "dear": Feature(col("price") > 3, sensitive=True)}),
        ],
        label=Label("returned", SALES, col("price") > 5),
        train=Train(no_model),
        monitor=Monitor(cost=Cost(missed=2, false_alarm=1)),
    )


@pytest.fixture
def records(tmp_path):
    actor = RecordsActor(tmp_path)
    actor.start()
    yield actor
    actor.stop()


def trained(records, pipeline, training_id, *, live=True):
    manifest = Manifest(
        pipeline=pipeline.name, lake_versions={"sales": 1}, features=pipeline.feature_names,
        feature_hashes=pipeline.feature_hashes, label="returned", label_rule=[], start_at=0, end_at=1, known_until=1,
        rows=1, without_label=0,
    )  # fmt: skip
    made = records.register(pipeline.name, "model", training_id.encode(), manifest, training_id, {}, 0.5)
    if live:
        records.promote(pipeline.name, made.version, reason="test")
    return made.version


def test_a_registered_feature_is_typed_described_and_versioned_by_its_content(records):
    register(records, pipeline_of())
    (found,) = Catalogue.of(records).find("shop.takings")
    assert found.version == pipeline_of().feature_hashes["shop.takings"]
    assert (found.dtype, found.unit, found.owner, found.tags) == ("float32", "USD", "ann", ("retail", "money"))
    assert (found.expression, found.windows, found.entity) == ("mean(price, 7d)", ("7d",), ("shop",))
    assert dict(found.columns)["sales.price"] == "value" and dict(found.columns)["sales.booked"] == "known_at"
    assert Catalogue.of(records).find("sale.dear")[0].sensitive


def test_registering_again_writes_nothing_and_going_back_is_told(records):
    for window in ("7d", "7d", "1d", "1d", "7d"):
        register(records, pipeline_of(window=window))
    assert len(records.events("features.registered")) == 3
    old, new = sorted(Catalogue.of(records).find("shop.takings"), key=lambda v: bool(v.pipelines))
    assert old.windows == ("1d",) and new.windows == ("7d",)


def test_one_definition_in_two_pipelines_is_one_version(records):
    register(records, pipeline_of("one"))
    register(records, pipeline_of("two"))
    (found,) = Catalogue.of(records).find("shop.takings")
    assert found.pipelines == ("one", "two")


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"text": "TAKINGS"}, {"shop.takings"}),
        ({"text": "mean price"}, {"shop.takings"}),
        ({"tag": "retail"}, {"shop.takings"}),
        ({"owner": "ann"}, {"shop.takings"}),
        ({"owner": "bob"}, set()),
        ({"column": "sales.price"}, {"shop.takings", "sale.dear"}),
        ({"column": "sold"}, {"shop.takings", "sale.hour"}),
        ({"column": "sold", "tag": "money"}, {"shop.takings"}),
        ({}, {"shop.takings", "sale.hour", "sale.dear"}),
    ],
)
def test_features_are_found_by_name_description_tag_owner_and_column(records, asked, names):
    register(records, pipeline_of())
    assert {v.name for v in Catalogue.of(records).search(**asked)} == names


def test_which_live_models_break_when_a_column_goes(records):
    for window in ("7d", "1d"):
        register(records, pipeline_of(window=window))
        trained(records, pipeline_of(window=window), window)
    register(records, pipeline_of("other"))
    trained(records, pipeline_of("other"), "candidate", live=False)
    found = Catalogue.of(records).downstream("sales.booked")
    assert found["breaks"] == ["shop/2"]  # the first one is retired, the other pipeline's a candidate
    assert {f["name"] for f in found["features"]} == {"shop.takings"} and found["labels"] == []
    assert [x["label"] for x in Catalogue.of(records).downstream("price")["labels"]] == ["returned", "returned"]
    assert Catalogue.of(records).downstream("sales.nothing")["breaks"] == []


def test_what_a_model_version_stands_on(records):
    register(records, pipeline_of())
    version = trained(records, pipeline_of(), "one")
    (found,) = Catalogue.of(records).upstream("shop", version)
    assert found["features"] == pipeline_of().feature_hashes and found["stage"] == "live"
    assert {"sales.price", "sales.sold", "sales.booked"} <= set(found["columns"])


def test_a_deprecated_feature_names_its_users_and_warns_whoever_plans_with_it(records):
    register(records, pipeline_of())
    trained(records, pipeline_of(), "one")
    for _ in range(2):
        (told,) = deprecate(records, "shop.takings", reason="it lags", replacement="sale.hour")
    assert told.pipelines == ("shop",) and told.answering == ("shop/1",)
    assert len(records.events("feature.deprecated")) == 1
    expected = ["feature shop.takings is deprecated: it lags; use sale.hour instead"]
    assert register(records, pipeline_of()) == expected
    restore(records, "shop.takings")
    restore(records, "shop.takings")
    assert register(records, pipeline_of()) == [] and len(records.events("feature.restored")) == 1


def test_one_version_alone_can_be_deprecated(records):
    register(records, pipeline_of())
    deprecate(records, "shop.takings", reason="too long", version=pipeline_of().feature_hashes["shop.takings"])
    assert len(Catalogue.of(records).warnings(pipeline_of())) == 1
    assert Catalogue.of(records).warnings(pipeline_of(window="1d")) == []


def test_what_is_not_there_is_said(records):
    register(records, pipeline_of())
    with pytest.raises(UnknownFeature, match=r"shop\.takings"):
        Catalogue.of(records).find("store.takings")
    with pytest.raises(UnknownFeature):
        deprecate(records, "shop.takings", reason="old", replacement="none.such")
    with pytest.raises(Conflict, match="no version"):
        deprecate(records, "shop.takings", reason="old", version="0" * 16)
    with pytest.raises(Conflict, match="itself"):
        deprecate(records, "shop.takings", reason="old", replacement="shop.takings")


def test_statistics_are_those_of_the_version(records):
    register(records, pipeline_of())
    hashes = pipeline_of().feature_hashes
    for kind, rows in (("features.described", 10), ("features.described", 20), ("features.observed", 5)):
        data = {
            "feature_hashes": hashes,
            "rows": rows,
            "features": {"shop.takings": {"mean": 1}},
            "unseen": {"shop": 0},
        }
        records.append([Event(kind=kind, subject="shop", pipeline="shop", wall_s=time.time(), data=data)])
    found = Catalogue.of(records).statistics("shop.takings", hashes["shop.takings"])
    assert (found["training"]["rows"], found["online"]["rows"], found["online"]["unseen_share"]) == (20, 5, 0)
    assert Catalogue.of(records).statistics("shop.takings", "another") == {"training": None, "online": None}


def test_a_definition_is_written_as_one_would_write_it():
    expr = (col("a") > 15).mean("90m") - col("a").last("7d") * 2
    assert written(expr) == "mean((a > 15), 90m) - (last(a, 7d) * 2)"
    assert written(col("t").hour()) == "hour(t)"


@settings(deadline=None)
@given(st.sampled_from(["7d", "6h", "1d"]))
def test_a_declaration_changes_with_its_content_alone(window):
    one, two = declaration(pipeline_of(window=window)), declaration(pipeline_of("other", window=window))
    assert one == two
    assert (one["digest"] == declaration(pipeline_of())["digest"]) == (window == "7d")
