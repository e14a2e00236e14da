"""The actor `rollouts` and the replicas that tell it, in processes of Ray: new code has an actor of its own."""

import threading
import time

import pytest
import ray

from raymill.actors.rollout_watch import NAME, Reporter, bring_up
from raymill.actors.version_health import Report
from raymill.runtime.home import Home
from raymill.runtime.spawn import ask, end, find

CONTROL = {"dashboard_url": "http://127.0.0.1:1", "url": "http://127.0.0.1:1", "keys": "off"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=80 << 20, log_to_driver=False)
    yield Home(tmp_path_factory.mktemp("home"))
    end(NAME)
    ray.shutdown()


class Replica:
    """Tells the actor that it is there, as a replica of that code does; of its own code unless one is named."""

    def __init__(self, home, name, code=None):
        told = Report(replica=name, generation="g", failures={}, roles={}, tallies={}, benched={})
        self.reporter = Reporter(home, CONTROL, name, lambda: told)
        self.reporter._code = code or self.reporter._code
        self.reporter._watch = bring_up(home, CONTROL)
        self._thread = threading.Thread(target=self.reporter._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.reporter.stop()
        self._thread.join()

    def wait_for(self, *names):
        """Until the actor that this replica asks has heard of these."""
        deadline = time.monotonic() + 60
        heard = set()
        while time.monotonic() < deadline and not set(names) <= heard:
            heard = {r.replica for r in self.reporter.reports()}
            time.sleep(0.1)
        assert set(names) <= heard


def actor():
    found = find(NAME)
    assert ask(found.health.remote(), timeout_s=60)
    return found._actor_id


def test_a_replica_of_other_code_brings_up_an_actor_anew_and_the_others_tell_that_one(home):
    with Replica(home, "old") as old:
        old.wait_for("old")
        first = actor()
        with Replica(home, "same") as same:
            same.wait_for("old", "same")
            assert actor() == first
            with Replica(home, "new", code="younger") as new:
                deadline = time.monotonic() + 60
                while new.reporter._watch._actor_id == first and time.monotonic() < deadline:
                    time.sleep(0.1)
                new.wait_for("old", "same", "new")
                assert actor() == new.reporter._watch._actor_id != first
