"""The records actor under Ray: found by name, restarted by Ray, its errors are ours, nothing acknowledged lost."""

import os
import signal
import threading

import pytest
import ray

from raymill.runtime.errors import Conflict, UnknownModel
from raymill.runtime.messages import Event
from raymill.runtime.records import NAME, RecordsActor, RemoteRecords
from raymill.runtime.spawn import spawn


class RecordsActorWithPid(RecordsActor):
    """The actor under test, which also tells its process."""

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYMILL_HOME", str(home / "raymill"))
        ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
        yield spawn(RecordsActorWithPid, str(home / "raymill"), name=NAME)
        ray.shutdown()


def test_errors_of_the_actor_arrive_as_ours(records):
    remote = RemoteRecords()
    with pytest.raises(UnknownModel):
        remote.get("nothing", 1)
    remote.register("errors", "model", b"p", None, "t", {}, 0.5)
    remote.promote("errors", 1, reason="first")
    with pytest.raises(Conflict):
        remote.reject("errors", 1, reason="is live")


def test_kill_9_of_the_actor_under_writers_loses_and_doubles_nothing(records):
    remote, acknowledged, mutex = RemoteRecords(), [], threading.Lock()

    def write(writer: int) -> None:
        for n in range(40):
            remote([Event(kind="kill.test", subject=f"{writer}", wall_s=0.0, data={"n": n})])
            with mutex:
                acknowledged.append((str(writer), n))

    writers = [threading.Thread(target=write, args=(w,)) for w in range(3)]
    pid = ray.get(records.pid.remote())
    for writer in writers:
        writer.start()
    while len(acknowledged) < 10:
        pass
    os.kill(pid, signal.SIGKILL)
    for writer in writers:
        writer.join()
    written = [(e["subject"], e["data"]["n"]) for e in remote.events("kill.test")]
    assert sorted(written) == sorted(acknowledged) and len(written) == 120
    assert ray.get(records.pid.remote()) != pid
    assert remote.verify().broken_seq is None


def test_a_roll_back_without_a_version_goes_back_one_step(records):
    remote = RemoteRecords()
    for n in (1, 2):
        remote.register("m", "model", b"p%d" % n, None, f"t{n}", {}, 0.5)
        remote.promote("m", n, reason="better")
    assert remote.rollback("m", reason="worse").version == 1
    assert remote.live("m").version == 1
