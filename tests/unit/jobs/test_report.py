import math
from html.parser import HTMLParser

import numpy as np
import pytest

from raymill.jobs import report, report_plots

DAY = 86_400_000_000
MAY = 1_367_366_400_000_000
AUC = [0.77, 0.76, 0.75, 0.74, 0.735, 0.70, 0.72, 0.73]
MONTHS = [f"2013-{m:02d}" for m in range(5, 13)]

SUMMARY = {
    "run": "01JDTESTRUN",
    "pipeline": "flight-delay",
    "seconds": {"ingest": 12.0, "train": 40.5, "replay": 130.0, "total": 190.2},
    "rows": {
        "ingested": 336_768,
        "quarantined": {"range:wind_speed": 2, "duplicate_key": 1},
        "seeded_bad": 8,
        "without_label": 9_430,
    },
    "months": [
        {
            "month": m,
            "auc": a,
            "baseline_auc": a - 0.02 - 0.01 * math.sin(i),
            "usd": 400_000 - 9_000 * i,
            "baseline_usd": 430_000 - 7_000 * i,
            "regret_usd": (i - 4) * -6_000.0 if i else None,
        }
        for i, (m, a) in enumerate(zip(MONTHS, AUC, strict=True))
    ],
    "versions": [
        {
            "version": 1,
            "kind": "baseline",
            "stage": "retired",
            "history": [{"stage": "live", "at": MAY, "reason": "first"}, {"stage": "retired", "reason": "replaced"}],
        },
        {"version": 2, "kind": "model", "stage": "live", "history": [{"stage": "live", "at": MAY + 5 * DAY}]},
        {"version": 3, "kind": "model", "stage": "rejected", "history": ["candidate", "rejected"]},
    ],
    "retrains": [
        {"at": MAY + 28 * DAY, "reason": "regret: +2.73 USD <b>a prediction</b>", "outcome": "promoted", "why": "good"},
        {"at": MAY + 120 * DAY, "reason": "regret: +1.10 USD", "outcome": "rolled_back", "why": "it costs more"},
    ],
    "requests": {"served": 226_000, "failed": 0, "retried": 14, "p50_ms": 9.1, "p99_ms": 38.4},
    "spot": {"reclaimed": 1, "steps_lost": 0},
    "cost": {"parts": {"training": 0.0123, "serving": 0.0231, "idle": 0.004}, "bill_usd": 0.0394},
}


def details() -> dict:
    rng = np.random.default_rng(0)
    features = ["weather.temp", "weather.wind_speed", "origin.delay_6h", "carrier.late_7d", "calendar.month"]
    return {
        "marks": [
            {"at": MAY + 28 * DAY, "kind": "retrain", "version": None},
            {"at": MAY + 29 * DAY, "kind": "canary", "version": 2},
            {"at": MAY + 34 * DAY, "kind": "promoted", "version": 2},
            {"at": "2013-09-03", "kind": "rolled_back", "version": 3},
            {"at": "2014-02-01", "kind": "retrain"},
        ],
        "verdicts": [
            {
                "period": m,
                "version": 2,
                "labelled": 27_000,
                "regret": 2.7 - i * 0.4,
                "regret_low": 2.1 - i * 0.4,
                "retrain": i in (0, 3),
                "reason": "regret: +2.73 USD a prediction against refit, at least +2.10 at 95%, on 27000 labels",
                "input_drift": {f: float(rng.gamma(1.0, 0.25)) for f in features},
                "output_drift": 0.1 * i,
            }
            for i, m in enumerate(MONTHS)
        ],
        "decisions": [{"version": 3, "accept": False, "reason": "no proof that it is better than live"}],
        "latencies_ms": rng.lognormal(2.2, 0.5, 5_000).tolist(),
        "trainings": [{"training_id": "01JD-1", "ranks": 2, "steps": 330, "seconds": 21.4, "auc": 0.771}],
        "gang_changes": [
            {"reason": "spot notice", "step": 120, "before": 2, "after": 1, "steps_lost": 0, "seconds": 0.4}
        ],
        "replica_kill": {"at": "2013-06-10", "requests": 96, "retried": 14, "failed": 0, "seconds": 3.1},
        "quarantine": [
            {"source": "flights", "reason": "duplicate_key", "rows": 1, "seeded": True},
            {"source": "weather", "reason": "range:wind_speed", "rows": 1, "seeded": False},
        ],
        "lineage": [
            {"what": "prediction 01JDX", "facts": {"answer": 0.31, "at": "2013-06-01"}},
            {"what": "version 2 of flight-delay", "facts": {"program": "9f" * 32}},
            {"what": "source rows", "facts": {"flights": "version 61, 110,000 rows"}},
        ],
        "skipped": ["the network namespace test needs root", {"what": "GPU ranks", "why": "no CUDA device"}],
    }


class Tags(HTMLParser):
    """Checks that every tag is closed, and collects addresses and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "br", "path", "use"):
            self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_startendtag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_the_page_is_whole_and_needs_nothing_from_outside(tmp_path):
    path = report.write_report(tmp_path, SUMMARY, details())
    assert path == tmp_path / "report.html" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    page = path.read_text()
    tags = parsed(page)
    assert all(a.startswith("#") for a in tags.addresses)
    assert len(set(tags.ids)) == len(tags.ids)
    assert "://" not in page and "#01020" not in page
    assert page.count("<svg") == 2


@pytest.fixture(scope="module")
def page() -> str:
    return report.render(SUMMARY, details())


@pytest.mark.parametrize(
    "words",
    [
        "AUC by month",
        "rolled back v3",
        "promoted v2",
        "weather.temp",
        "spot notice",
        "14 retried",
        "p99 38.4",
        "corrupted on purpose",
        "in the data",
        "source rows",
        "the network namespace test needs root",
        "no CUDA device",
        "no proof that it is better than live",
        "0.0394 USD in all",
        "336\u202f768",
    ],
)
def test_the_page_tells_what_happened(page, words):
    assert words in page


def test_words_from_outside_can_not_become_markup(page):
    assert "&lt;b&gt;a prediction&lt;/b&gt;" in page


def test_a_run_that_did_nothing_still_has_a_page():
    page = report.render({}, {})
    parsed(page)
    assert "No month had labels." in page and "No prediction was looked up." in page and "nan" not in page


def test_the_heat_strip_shows_the_most_drifted_features_first_and_the_answer_last():
    verdicts = [{"period": "2013-05", "input_drift": {f"f{i}": i / 10 for i in range(30)}, "output_drift": None}]
    strip = report.heat(verdicts)
    assert [f["name"] for f in strip["features"][:2]] == ["f29", "f28"]
    assert strip["features"][-1] == {"name": "the answer", "cells": [{"psi": None, "share": 0}]}
    assert strip["left_out"] == 30 - report.MAX_FEATURES


def test_a_histogram_of_latencies_holds_every_known_value():
    bounds, counts = report_plots.histogram([1.0, 2.0, 2.0, 50.0, 0.0])
    assert sum(counts) == 4 and len(bounds) == len(counts) + 1
    assert report_plots.histogram([]) == ([], [])
    assert sum(report_plots.histogram([3.0])[1]) == 1


def test_numbers_are_written_for_people():
    assert report.number(-1234567.891, 1) == "−1\u202f234\u202f567.9"
    assert report.number(None) == report.number(float("nan")) == "–"
    assert [report.seconds(v) for v in (0.012, 3.14, 190.2, None)] == ["12 ms", "3.1 s", "3 min 10 s", "–"]
    assert [report.day(v) for v in (MAY, "2013-05-01T09:00:00Z", None)] == ["2013-05-01", "2013-05-01", "–"]


def test_a_mark_lies_where_its_day_is_in_the_month():
    place = report_plots._place
    assert place("2013-05-01", MONTHS) == -0.5 and place("2013-06-16", MONTHS) == pytest.approx(1.0)
    assert place("2014-02-01", MONTHS) is None


def test_labels_that_lie_close_get_lines_of_their_own():
    close = [(0.0, "retrain", ""), (0.1, "canary v2", ""), (0.2, "promoted v2", ""), (4.0, "rolled back v3", "")]
    assert report_plots._lanes(close, 8) == [0, 1, 2, 0]


def test_served_values_that_are_not_the_lakes_are_an_alarm_with_cause_and_example():
    finding = {
        "feature": "shop.rate_7d", "rows": 2000, "mismatches": 40, "rate": 0.02, "causes": {"stale": 39, "code": 1},
        "why": "served 1 <2, the lake gives 3",
    }  # fmt: skip
    judged = {"rows": 2000, "mismatched": 40, "alert": True, "reason": "above the tolerance", "features": [finding]}
    fresh = {"views": [{"view": "shop", "source": "orders", "age_s": 7200.0, "behind_s": None}]}
    page = report.render({**SUMMARY, "consistency": judged, "freshness": fresh}, {})
    for text in ("alarm", "above the tolerance", "shop.rate_7d", "2.00 %", "stale 39, code 1", "1 &lt;2", "2.0 h"):
        assert text in page
    assert "Nothing was compared" in report.render(SUMMARY, {})
