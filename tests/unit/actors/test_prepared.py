"""When a process is prepared for the next replica; on Ray: `tests/actors/test_replica_grants.py`."""

import os
import sys
import threading

import pytest

from raymill.actors import prepared
from raymill.actors.endpoint import Placement, number
from raymill.actors.prepared import Spare, environment, prepare

VARIABLES = {"A": "1"}


@pytest.fixture
def spare():
    """A `Spare` on a clock of its own; `asked` has what a process was asked for with."""

    class Tried(Spare):
        def __init__(self):
            self.asked, self.fails = [], False
            super().__init__(VARIABLES, self._start_one)

        def _start_one(self, variables):
            if self.fails:
                raise OSError("no raylet")
            self.asked.append(variables)

        def after(self, now_s, running):
            self.keep(running, now_s)
            for thread in threading.enumerate():
                if thread.name == "raymill-prepare":
                    thread.join()
            return len(self.asked)

    return Tried()


def test_one_is_prepared_when_the_number_is_at_rest_and_again_when_a_replica_took_it(spare):
    assert [spare.after(now, 1) for now in (100, 102, 103.5, 200, 400)] == [0, 0, 1, 1, 1]
    assert [spare.after(now, 2) for now in (500, 504, 600)] == [1, 2, 2]
    assert [spare.after(now, 1) for now in (700, 800)] == [2, 2], "whoever leaves takes none"
    assert [spare.after(now, 0) for now in (900, 1000)] == [2, 2]
    assert [spare.after(now, 1) for now in (1100, 1200)] == [2, 3]
    assert spare.asked == [VARIABLES] * 3


def test_what_fails_is_tried_again_a_minute_later_and_harms_nobody(spare):
    spare.fails = True
    assert [spare.after(now, 1) for now in (100, 110)] == [0, 0]
    spare.fails = False
    assert [spare.after(now, 1) for now in (130, 171, 300)] == [0, 1, 1]


def test_a_policy_that_is_made_anew_finds_the_process_that_is_there():
    assert prepared.spare_of({"A": "1", "B": "2"}) is prepared.spare_of({"B": "2", "A": "1"})
    assert prepared.spare_of({"A": "1"}) is not prepared.spare_of({"A": "2"})


def test_a_module_that_is_missing_is_no_obstacle_and_the_others_are_imported(monkeypatch, tmp_path):
    (tmp_path / "needed_later.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in environment(("no_such_module", "needed_later")).items():
        monkeypatch.setitem(os.environ, name, value)
    prepare()
    assert "needed_later" in sys.modules


def test_only_replicas_that_follow_the_load_have_one_and_their_variables_are_those_of_the_process():
    scaled = {"policy": {"policy_kwargs": {"scaling": {}}}}
    placement = Placement(env={"X": "1"}, autoscaling=scaled, prepare=("torch",))
    kwargs = number(placement)["autoscaling_config"]["policy"]["policy_kwargs"]
    assert kwargs["prepared"] == placement.variables == {"X": "1", **environment(("torch",))}
    assert "prepared" not in number(Placement(autoscaling=scaled))["autoscaling_config"]["policy"]["policy_kwargs"]
    assert Placement(env={"X": "1"}, prepare=("torch",)).variables == {"X": "1"}
