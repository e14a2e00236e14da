"""`raymill features …` and the warning of `raymill plan`, on a home with a record and no cluster."""

import json
import sys

import pytest

from raymill.jobs.cli import main as command
from raymill.runtime.feature_registration import register
from tests.unit.actors.served_shop import Shop, pipeline_of, sales


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with a trained version, ten served rows, one of them wrong."""
    shop = Shop(tmp_path)
    shop.arrive(sales(*range(60)), "first")
    register(shop.records, pipeline_of())
    version = shop.train()
    shop.records.promote("shop", version, reason="test")
    rows = sales(*range(50, 60))
    at = rows["sold"].cast("int64").to_numpy() + 30_000_000
    x = shop.features.vectors(rows, at)
    x[3, 0] += 1
    shop.serve(rows, version, x=x)
    shop.close()
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def printed(home, capsys):
    """Runs a verb; what it printed."""

    def run(*words, code=0):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "stdout", sys.stdout)  # `main` keeps it, for good: a process of its own in life
            command.main(list(words))
        assert stop.value.code == code
        return capsys.readouterr().out

    return run


@pytest.fixture
def said(printed):
    """Runs a verb; the document that it printed."""
    return lambda *words, code=0: json.loads(printed(*words, "--json", code=code))


def test_features_are_listed_shown_and_found(said):
    assert [f["name"] for f in said("features", "list")] == ["shop.sum", "sale.twice"]
    assert [f["name"] for f in said("features", "search", "TWICE")] == ["sale.twice"]
    assert said("features", "search", "--owner", "nobody") == []
    (shown,) = said("features", "show", "shop.sum")
    assert shown["expression"] == "sum(price, 30m)" and shown["answering"] == ["shop/1"]
    assert said("features", "show", "none", code=2)["code"] == "unknown_feature"


def test_a_column_leads_to_the_live_versions_that_break(said):
    assert said("features", "lineage", "--column", "sales.shop")["breaks"] == ["shop/1"]
    (upstream,) = said("features", "lineage", "--model", "shop")
    assert "sales.price" in upstream["columns"]
    assert said("features", "lineage", code=2)["code"] == "request_error"


def test_a_check_alarms_by_exit_code_and_in_the_status(said, printed):
    (judged,) = said("features", "consistency", "shop", "--check", code=3)
    assert judged["alert"] and judged["features"][0]["feature"] == "shop.sum"
    assert said("features", "consistency") == [judged]
    assert [(a["model"], a["what"]) for a in said("status")["alerts"]] == [("shop", "consistency")]
    assert "ALARM    consistency of shop" in printed("status")


def test_statistics_and_freshness_are_told(said):
    said("features", "consistency", "--check", code=3)
    by_name = {v["name"]: v for v in said("features", "stats")}
    assert by_name["shop.sum"]["training"]["rows"] == 50 and by_name["sale.twice"]["online"]["rows"] == 10
    (fresh,) = said("features", "freshness")
    assert fresh["model"] == "shop" and fresh["views"][0]["behind_s"] == 0


def test_who_plans_with_a_deprecated_feature_is_warned(said, tmp_path):
    assert said("features", "deprecate", "shop.sum", code=2)["code"] == "usage"
    (told,) = said("features", "deprecate", "shop.sum", "--reason", "slow", "--replacement", "sale.twice")
    assert (told["pipelines"], told["answering"]) == (["shop"], ["shop/1"])
    file = tmp_path / "pipeline.py"
    file.write_text("from tests.unit.actors.served_shop import pipeline_of\npipeline = pipeline_of()\n")
    assert said("plan", str(file))["warnings"] == ["feature shop.sum is deprecated: slow; use sale.twice instead"]
    assert said("features", "register", str(file))["warnings"] == said("plan", str(file))["warnings"]
    said("features", "deprecate", "shop.sum", "--undo")
    assert said("plan", str(file))["warnings"] == []


def test_features_are_registered_before_anything_was_run(said, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path / "new"))
    file = tmp_path / "pipeline.py"
    file.write_text("from tests.unit.actors.served_shop import pipeline_of\npipeline = pipeline_of()\n")
    assert said("features", "list", code=1)["code"] == "unavailable"
    assert said("features", "register", str(file))["features"] == pipeline_of().feature_hashes
    assert [f["answering"] for f in said("features", "list")] == [[], []]


@pytest.mark.parametrize(
    "words",
    [
        ("list",),
        ("show", "shop.sum"),
        ("stats",),
        ("lineage", "--column", "price"),
        ("lineage", "--model", "shop"),
        ("freshness",),
        ("consistency",),
        ("deprecate", "shop.sum", "--reason", "old"),
    ],
)
def test_every_verb_has_a_form_for_people(printed, words):
    assert words[0] == "consistency" or "shop" in printed("features", *words)
