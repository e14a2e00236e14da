"""Which lake is whose: what the newest run declared, else the home's own."""

from raymill.actors.lakes import Lakes, stores_declared
from raymill.runtime import Col, Cost, FeatureView, Label, Monitor, Pipeline, Source, Stores, Train, col
from raymill.runtime.home import Home
from raymill.runtime.ledger import Ledger

ROWS = Source("rows", key=["ref"], time="t", schema={"ref": Col("string"), "t": Col("timestamp"), "v": Col("float64")})


def a_pipeline(name: str, lake: str | None) -> Pipeline:
    return Pipeline(
        name,
        views=[FeatureView("past", ROWS, entity="ref", features={"m": col("v").mean("1d")})],
        label=Label("big", ROWS, col("v") > 1),
        train=Train(lambda n: None),
        monitor=Monitor(cost=Cost(missed=2, false_alarm=1)),
        stores=Stores(lake=lake),
    )


def test_a_pipelines_lake_is_the_one_its_newest_run_declared(tmp_path):
    ledger = Ledger(tmp_path / "record.db")
    lakes = Lakes(Home(tmp_path), ledger.events)
    own = lakes.of("taxi")
    for run, lake in (("r1", "s3://first/x"), ("r1", "s3://first/x"), ("r2", None), ("r3", "s3://second/x/")):
        ledger.append([stores_declared(a_pipeline("taxi", lake), run)])
        expected = own if lake is None else lakes.at(Stores(lake=lake))
        assert lakes.of("taxi") is expected
    ledger.append([stores_declared(a_pipeline("other", "s3://first/x"), "r4")])
    assert len(ledger.events("stores.declared")) == 4
    assert lakes.of("nobody") is own
    assert lakes.all() == [own, lakes.of("other"), lakes.of("taxi")]
    ledger.close()
