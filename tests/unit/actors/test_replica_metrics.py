"""The gauges of a replica: what they say, and that a version that is gone stays at nothing."""

import asyncio

from raymill.actors.replica_metrics import OF_REPLICA, OF_VERSION, ReplicaMetrics
from raymill.actors.scaling import Load
from raymill.actors.version_health import Tally

LOAD = Load(delay_s=0.02, service_s=0.01, rows_per_s=500.0, busy=0.5, idle_s=0.0)


class Gauges:
    """Keeps what is set."""

    def __init__(self):
        self.now, self.made = {}, []

    def gauge(self, name, description, labels):
        self.made.append((name, description, labels))
        return type("Gauge", (), {"set": lambda _, value, tags: self.now.__setitem__((name, *tags.values()), value)})()


def test_every_gauge_is_made_once_with_a_description_and_says_what_was_counted():
    kept = Gauges()
    did = {"taxi": {3: Tally(calls=4, failed=1, slow=2, rows=100, seconds=0.2)}}
    metrics = ReplicaMetrics(lambda: LOAD, lambda: did, kept.gauge)
    metrics.publish()
    metrics.publish()
    assert {name for name, _, _ in kept.made} == {*OF_REPLICA, *OF_VERSION} and len(kept.made) == 9
    assert all(description for _, description, _ in kept.made)
    assert kept.now["raymill_queue_delay_seconds",] == 0.02 and kept.now["raymill_rows_per_second",] == 500
    of_version = [kept.now[name, "taxi", "3"] for name in OF_VERSION]
    assert of_version == [4, 1, 2, 25, 0.05]


def test_a_version_that_answers_no_more_falls_to_nothing():
    kept, did = Gauges(), {"taxi": {1: Tally(calls=4, rows=8), 2: Tally(calls=1, rows=1)}}
    metrics = ReplicaMetrics(lambda: LOAD, lambda: did, kept.gauge)
    metrics.publish()
    del did["taxi"][1]
    metrics.publish()
    assert kept.now["raymill_version_batches", "taxi", "1"] == 0
    assert kept.now["raymill_version_batches", "taxi", "2"] == 1


def test_it_goes_on_by_itself_until_it_is_stopped(monkeypatch):
    async def test():
        kept = Gauges()
        metrics = ReplicaMetrics(lambda: LOAD, dict, kept.gauge)
        monkeypatch.setattr("raymill.actors.replica_metrics.EVERY_S", 0.001)
        metrics.start(asyncio.get_running_loop())
        kept.now.clear()
        while not kept.now:
            await asyncio.sleep(0.001)
        metrics.stop()
        await asyncio.sleep(0.002)
        kept.now.clear()
        await asyncio.sleep(0.01)
        assert not kept.now

    asyncio.run(test())
