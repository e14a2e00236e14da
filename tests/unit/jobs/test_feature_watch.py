"""Checks while a pipeline serves: a period's sample, and what was answered since the last look."""

import json
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from raymill.jobs import feature_watch
from raymill.jobs.feature_watch import LiveChecks, check_period
from raymill.runtime.errors import Unavailable
from raymill.runtime.home import Home
from tests.unit.actors.served_shop import MINUTE, Shop, pipeline_of, sales


@pytest.fixture
def shop(tmp_path):
    made = Shop(tmp_path)
    made.arrive(sales(*range(60)), "first")
    yield made
    made.close()


def skewed(shop, *numbers):
    """Vectors of which the first is off by one."""
    rows = sales(*numbers)
    x = shop.features.vectors(rows, rows["sold"].cast("int64").to_numpy() + MINUTE // 2)
    x[0, 0] += 1
    return x


def test_a_period_is_judged_by_what_was_asked_in_it_and_written_down(shop):
    version = shop.train()
    shop.serve(sales(10, 11), version)
    shop.serve(sales(40, 41), version, x=skewed(shop, 40, 41), prefix="off")
    world = SimpleNamespace(pipeline=pipeline_of(), home=Home(shop.home), records=shop.records)
    run = SimpleNamespace(progress=SimpleNamespace(began_s=0.0, seconds={}), stage=lambda name: nullcontext())
    sound, off = (check_period(world, run, start * MINUTE, (start + 30) * MINUTE) for start in (0, 30))
    assert (sound.rows, sound.alert) == (2, False)
    assert (off.rows, off.alert, [f.feature for f in off.features]) == (2, True, ["shop.sum"])
    assert [e["data"] for e in shop.records.events("consistency.judged")] == json.loads(
        json.dumps([sound.to_json(), off.to_json()])
    )
    whole = shop.recompute.check("shop")  # which reads the lake from its beginning
    assert whole.features[0].causes == off.features[0].causes and whole.mismatched == off.mismatched
    assert len(shop.records.events("features.observed")) == 1  # statistics are those of the long check alone
    run.progress.began_s, run.progress.seconds["consistency"] = time.time() - 100, 2.0
    assert check_period(world, run, 0, 30 * MINUTE) is None  # it has had its share of the run's time


def test_what_is_served_live_is_looked_at_when_it_is_due_and_not_again(shop, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(feature_watch, "time", SimpleNamespace(time=lambda: clock.now))
    checks = LiveChecks(pipeline_of(), Home(shop.home), shop.records, 600.0)
    clock.now = 599.0
    assert checks.look() is None
    clock.now = 601.0
    assert checks.look() is None  # nothing was answered
    shop.serve(sales(40), 1, x=skewed(shop, 40))
    clock.now = 1201.0
    with pytest.raises(Unavailable, match="training set"):
        checks.look()
    version = shop.train()
    shop.serve(sales(50, 51), version, x=skewed(shop, 50, 51), prefix="off")
    clock.now = 1802.0
    assert checks.look().alert
    clock.now = 5e9  # long after all that was served
    assert checks.look().rows == 3
    clock.now += 601
    assert checks.look() is None
