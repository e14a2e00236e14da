import os

import pytest

from raymill.cluster.attach import lacks
from raymill.cluster.processes import Process, describe
from raymill.cluster.session import Session

HEAD = ("gcs/gcs_server", "raylet/raylet", "dashboard/dashboard.py", "autoscaler/v2/monitor.py")


def session_of(pids, state="running", managed=True):
    return Session(
        root="/nowhere",
        state=state,
        managed=managed,
        has_autoscaler=True,
        address="127.0.0.1:1",
        dashboard_url="",
        serve_url="",
        token_path="",
        started_s=0.0,
        pids=tuple(pids),
    )


def running(command):
    return Process(os.getpid(), describe(os.getpid()).started, command)


def test_a_session_is_alive_while_all_of_its_head_runs_and_not_before_up_has_ended():
    assert session_of(map(running, HEAD)).is_alive
    assert not session_of(map(running, HEAD), state="starting").is_alive
    assert not session_of([]).is_alive


@pytest.mark.parametrize("lost", HEAD)
def test_a_session_that_lost_a_part_that_ray_does_not_restart_is_dead(lost):
    pids = [Process(os.getpid(), 1, command) if command == lost else running(command) for command in HEAD]
    assert not session_of(pids).is_alive


def test_a_cluster_of_another_says_what_a_run_has_to_do_without_and_why():
    assert lacks(session_of([])) == ()
    found = dict(what.split(": ", 1) for what in lacks(session_of([], managed=False)))
    assert len(found) == 3 and all("not started by `raymill up`" in why for why in found.values())
