from dataclasses import replace

import pytest
from pydantic import ValidationError

from raymill.runtime import (
    Col,
    Cost,
    Feature,
    FeatureView,
    Label,
    Lookup,
    Monitor,
    OnDemand,
    Pipeline,
    Source,
    Train,
    col,
)
from raymill.runtime.feature_registration import declaration
from raymill.runtime.source_spec import parents_first

ROWS = Source(
    "rows",
    key=["ref"],
    time="t",
    schema={"ref": Col("string"), "t": Col("timestamp"), "who": Col("string"), "v": Col("float64", nullable=True)},
)


def a_pipeline(**other):
    fields = {
        "views": [FeatureView("past", ROWS, entity="who", features={"mean": col("v").mean("1d")})],
        "label": Label("big", ROWS, col("v") > 1),
        "train": Train(lambda n: None),
        "monitor": Monitor(cost=Cost(missed=2, false_alarm=1)),
    }
    return Pipeline("demo", **fields | other)


def test_a_pipeline_names_its_inputs_sources_and_request_columns():
    pipeline = a_pipeline(
        views=[
            FeatureView("past", ROWS, entity="who", features={"mean": col("v").mean("1d")}),
            OnDemand("calendar", features={"hour": col("t").hour()}),
        ]
    )
    assert pipeline.feature_names == ("past.mean", "calendar.hour")
    assert pipeline.sources == (ROWS,)
    assert pipeline.request_columns == ("who", "t")


def test_a_features_hash_changes_with_its_definition_only():
    one = a_pipeline().feature_hashes["past.mean"]
    same = a_pipeline(train=Train(lambda n: None, epochs=9)).feature_hashes["past.mean"]
    other = FeatureView("past", ROWS, entity="who", features={"mean": col("v").mean("2d")})
    assert one == same != a_pipeline(views=[other]).feature_hashes["past.mean"]


def test_what_is_said_of_a_feature_changes_neither_its_hash_nor_its_expression():
    mean = col("v").mean("1d")
    plain = a_pipeline()
    told = a_pipeline(
        views=[
            FeatureView(
                "past",
                ROWS,
                entity="who",
                features={
                    "mean": Feature(mean, description="Mean of v", unit="EUR", tags=["money", "past"]),
                    "last": Feature(col("v"), owner="ben", sensitive=True),
                },
                owner="ana",
                tags=["past"],
            ),
            OnDemand("clock", {"hour": col("t").hour()}, sensitive=True),
        ]
    )
    assert told.feature_hashes["past.mean"] == plain.feature_hashes["past.mean"]
    assert told.described["past.mean"] == Feature(mean, "Mean of v", "EUR", "ana", ("past", "money"))
    assert told.described["past.last"] == Feature(col("v"), owner="ben", tags=("past",), sensitive=True)
    assert told.described["clock.hour"].sensitive
    assert plain.described["past.mean"] == Feature(mean)


def test_a_view_through_a_lookup_needs_the_columns_that_the_lookup_begins_with_and_is_another_version():
    owners = Source(
        "owners", key=["ref"], time="t", schema={"ref": Col("string"), "t": Col("timestamp"), "whose": Col("string")}
    )
    bills = Source(
        "bills", key=["ref"], time="t", schema={"ref": Col("string"), "t": Col("timestamp"), "whose": Col("string")}
    )
    count = {"n": col("ref").count("1d")}
    through = Lookup(owners, entity="ref", column="whose")
    pipeline = a_pipeline(views=[FeatureView("bills", bills, entity="whose", features=count, through=through)])
    assert pipeline.request_columns == ("ref",)
    assert [s.name for s in pipeline.sources] == ["rows", "bills", "owners"]
    aged = FeatureView("bills", bills, entity="whose", features=count, through=replace(through, max_age="1d"))
    assert a_pipeline(views=[aged]).feature_hashes != pipeline.feature_hashes
    columns = {tuple(c) for c in declaration(pipeline)["features"][0]["columns"]}
    assert {("rows.ref", "request"), ("owners.whose", "lookup"), ("bills.whose", "entity")} <= columns
    with pytest.raises(ValidationError, match="needs \\['whose'\\] of the label's rows"):
        a_pipeline(views=[FeatureView("bills", bills, entity="whose", features=count)])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Source("rows", key=["nope"], time="t", schema=ROWS.schema), "nope"),
        (lambda: Source("rows", key=["ref"], time="who", schema=ROWS.schema), "must be a timestamp"),
        (lambda: Source("Rows!", key=["ref"], time="t", schema=ROWS.schema), "lower case"),
        (lambda: FeatureView("v", ROWS, entity="who", features=["gone"]), "v.gone reads"),
        (lambda: FeatureView("v", ROWS, entity="whom", features=["v"]), "entity columns"),
        (lambda: FeatureView("v", ROWS, entity="who", features=["v"], max_age="3 days"), "not a duration"),
        (lambda: OnDemand("v", features={"m": col("v").mean("1d")}), "has a window"),
        (lambda: Train(lambda n: None, ranks=1, min_ranks=2), "lower min_ranks"),
        (lambda: a_pipeline(label=Label("big", ROWS, col("w") > 1)), "label 'big' reads"),
        (lambda: a_pipeline(views=[]), "no features"),
        (lambda: a_pipeline(views=[OnDemand("a", features={"h": col("t").hour()})] * 2), "declared twice"),
        (
            lambda: a_pipeline(
                label=Label(
                    "big",
                    Source("r", key=["id"], time="t", schema={"id": Col("string"), "t": Col("timestamp")}),
                    col("t") > 1,
                )
            ),
            "rename yours",
        ),
        (lambda: a_pipeline(traln=3), "Unexpected keyword"),
        (lambda: Cost(missed=-1, false_alarm=1), "greater than or equal"),
    ],
)
def test_a_wrong_declaration_is_refused_where_it_is_written(make, says):
    with pytest.raises((ValidationError, Exception), match=says):
        make()


def test_the_threshold_is_where_acting_becomes_cheaper_than_not():
    assert Cost(missed=120, false_alarm=30).threshold == pytest.approx(0.2)


def referring(to, name="children", dtype="string"):
    return Source(
        name,
        key=["ref"],
        time="t",
        schema={"ref": Col("string"), "t": Col("timestamp"), "who": Col(dtype, references=to)},
    )


def test_sources_come_after_those_that_their_rows_refer_to():
    children, grandchildren = referring("rows.who"), referring("children.ref", name="grandchildren")
    views = [FeatureView(s.name, s, entity="who", features=["who"]) for s in (grandchildren, children)]
    rows = referring("grandchildren.ref", name="labelled")
    assert [s.name for s in parents_first([rows, grandchildren, children, ROWS])] == [
        "rows",
        "children",
        "grandchildren",
        "labelled",
    ]
    assert a_pipeline(views=views).sources == (ROWS, grandchildren, children)


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ([referring("rows.who")], "no column of a source"),
        ([referring("rows.lost"), ROWS], "no column of a source"),
        ([referring("rows.v"), ROWS], "'rows.v', its reference, is float64"),
        ([referring("b.ref", name="a"), referring("a.ref", name="b")], "circle"),
        ([referring("children.ref")], "circle"),
    ],
)
def test_a_reference_that_leads_nowhere_or_round_is_refused(sources, told):
    with pytest.raises(ValueError, match=told):
        parents_first(sources)
