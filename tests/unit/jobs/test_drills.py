"""Drills are done once, in the first retrain that has two ranks, and what can not be done is told."""

from types import SimpleNamespace

from raymill.jobs.drills import Drilled
from raymill.jobs.replay import moment
from raymill.jobs.run import open_run
from raymill.runtime.home import Home
from raymill.runtime.spec import Drills


class Market:
    def __init__(self) -> None:
        self.played: list[list[dict]] = []

    def replay(self, trace):
        self.played.append(trace)


def a_world(market, ranks=2, replicas=()):
    return SimpleNamespace(
        pipeline=SimpleNamespace(
            replay=SimpleNamespace(drills=Drills(reclaim_spot=True, kill_replica_on="2020-02-01")),
            train=SimpleNamespace(spot=True),
        ),
        cluster=market,
        gang=[None] * ranks,
        endpoint=SimpleNamespace(replicas=lambda: list(replicas)),
        client=SimpleNamespace(retried=0),
    )


def test_the_market_reclaims_once_and_never_in_the_first_training(tmp_path):
    market = Market()
    with open_run(Home(tmp_path), "demo", "{}") as run:
        stepped = Drilled(a_world(market), run, print).on_step(lambda *_: None)
        for training in ("first", "first", "second", "second", "third"):
            stepped(training, 1, 10)
        assert len(market.played) == 1
        assert run.progress.drills["spot"]["training_id"] == "second"


def test_a_gang_of_one_rank_is_left_alone(tmp_path):
    market = Market()
    with open_run(Home(tmp_path), "demo", "{}") as run:
        stepped = Drilled(a_world(market, ranks=1), run, print).on_step(lambda *_: None)
        stepped("first", 1, 10)
        stepped("second", 1, 10)
    assert not market.played


def test_a_cluster_without_a_market_is_told_as_skipped(tmp_path):
    with open_run(Home(tmp_path), "demo", "{}") as run:
        Drilled(a_world(None), run, print)
        Drilled(a_world(None), run, print)
        assert len(run.progress.skipped) == 1 and "spot market" in run.progress.skipped[0]


def test_no_running_replica_is_told_and_the_day_goes_on(tmp_path):
    with open_run(Home(tmp_path), "demo", "{}") as run:
        with Drilled(a_world(Market()), run, print).on_day(moment("2020-02-01"), lambda: 0):
            pass
        assert "no running replica" in run.progress.skipped[-1]
