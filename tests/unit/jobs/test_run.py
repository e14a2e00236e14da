import time

import pytest

from raymill.jobs.run import newest, open_run
from raymill.runtime.errors import Conflict
from raymill.runtime.home import Home


def test_an_unfinished_run_is_taken_up_again_and_a_finished_one_is_not(tmp_path):
    home = Home(tmp_path)
    with open_run(home, "demo", "{}") as first, first.stage("ingest"):
        first.progress.next_day = 5
    with open_run(home, "demo", "{}") as again:
        assert again.id == first.id and again.progress.next_day == 5
        again.progress.finished = True
        again.save()
    time.sleep(0.002)  # ids are in the order of their milliseconds
    with open_run(home, "demo", "{}") as new:
        assert new.id != first.id
    assert newest(home).run == new.id


def test_two_processes_do_not_work_on_the_same_pipeline(tmp_path):
    home = Home(tmp_path)
    with open_run(home, "demo", "{}"), pytest.raises(Conflict, match="another process"), open_run(home, "demo", "{}"):
        pass


def test_runs_of_other_pipelines_are_left_alone(tmp_path):
    home = Home(tmp_path)
    with open_run(home, "one", "{}") as one, open_run(home, "two", "{}") as two:
        assert one.id != two.id
    assert newest(home, "one").run == one.id


def test_stage_seconds_add_up_even_when_the_stage_fails(tmp_path):
    with open_run(Home(tmp_path), "demo", "{}") as run:
        with pytest.raises(ValueError), run.stage("train"):
            raise ValueError
        assert set(run.progress.seconds) == {"train"}
