"""Processes that die while they load a program: what the next one finds, does, and tells; real processes, no Ray."""

import asyncio
import faulthandler
import os
import resource
import signal
import sys
import time
from itertools import count

import pytest

from raymill.actors import serving
from raymill.actors.crash_breaker import HOLD_S
from raymill.actors.envelope import Envelope, pack
from raymill.actors.load_notes import LoadNotes
from raymill.actors.model_set import ModelSet
from raymill.actors.rollout import to_user_config
from raymill.actors.tried_alone import tried_alone
from raymill.runtime.errors import DeadlyModel
from tests.unit.actors.serving_parts import Records, http, load, model, replica

SPEC = model((1, "live", 1.0), plan=None)
REFUSED = 9


def started(work):
    """A process that does this and ends; its id."""
    pid = os.fork()
    if not pid:
        status = 1
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            work()
            status = 0
        except DeadlyModel:
            status = REFUSED
        finally:
            os._exit(status)
    return pid


def ended(pid):
    """As `Popen.returncode`."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def notes(tmp_path):
    """`notes(inside, end)`: load a program, which does `inside`; alone it comes to that `end`."""
    alone, clock = count(), [1e9]

    def load_it(inside=lambda: None, end=""):
        noted = LoadNotes(
            tmp_path, "replica", try_alone=lambda *_: [end, next(alone)][0], clock=lambda: clock[0]
        )  # fmt: skip
        with noted.loading(SPEC, "d1", b""):
            inside()

    load_it.alone, load_it.folder, load_it.clock = alone, tmp_path / "d1", clock
    return load_it


def left(notes):
    return sorted(p.name.partition(".")[2] or p.name for p in notes.folder.iterdir())


def test_a_load_that_ended_a_process_is_tried_alone_and_refused_until_its_time_is_over(notes):
    assert ended(started(lambda: notes(os.abort))) == -signal.SIGABRT
    for _ in range(2):  # the second time nobody has to try
        with pytest.raises(DeadlyModel, match=r"has ended replica \(process \d+\) at 2001-09-09.*alone: SIGSEGV"):
            notes(end="SIGSEGV")
    assert next(notes.alone) == 1
    notes.clock[0] += HOLD_S
    notes()
    assert left(notes) == ["turn", "well"]  # whatever it was, it is over


def test_a_replica_that_is_killed_while_it_loads_condemns_no_model(notes):
    assert ended(started(lambda: notes(lambda: os.kill(os.getpid(), signal.SIGKILL)))) == -signal.SIGKILL
    loaded = []
    notes(lambda: loaded.append(1))
    assert loaded and next(notes.alone) == 1 and left(notes) == ["turn", "well"]


def test_a_load_that_raises_is_no_death(notes):
    with pytest.raises(ValueError, match="damaged"):
        notes(lambda: load(b"broken"))
    notes()
    assert next(notes.alone) == 0


def test_of_many_replicas_that_are_told_to_load_it_one_dies(notes):
    def die_slowly():
        time.sleep(0.3)  # by then all of them have begun
        os.abort()

    found = [started(lambda: notes(die_slowly, end="SIGABRT")) for _ in range(5)]
    assert sorted(map(ended, found)) == [-signal.SIGABRT, *[REFUSED] * 4]


def test_what_was_loaded_well_before_is_loaded_by_many_at_once(notes):
    notes()
    here, there = os.pipe(), os.pipe()

    def wait():
        os.write(here[1], b".")
        os.read(there[0], 1)

    other = started(lambda: notes(wait))
    os.read(here[0], 1)
    notes()  # while the other one is in the middle of it, whose note stays
    assert "loading" in left(notes)
    os.write(there[1], b".")
    assert ended(other) == 0 and left(notes) == ["turn", "well"]


def test_a_child_that_outlives_its_parent_hides_no_death(notes):
    gate = os.pipe()

    def fork_and_die():
        started(lambda: os.read(gate[0], 1))
        os.abort()

    assert ended(started(lambda: notes(fork_and_die))) == -signal.SIGABRT
    try:
        with pytest.raises(DeadlyModel):
            notes(end="SIGABRT")
    finally:
        os.write(gate[1], b".")


def test_where_nothing_can_be_noted_it_is_loaded_all_the_same(notes):
    notes.folder.write_text("no folder")
    loaded = []
    notes(lambda: loaded.append(1))
    assert loaded


@pytest.mark.parametrize(
    "code, end",
    [
        ("import os\ndef ask(x):\n    os.abort()", "SIGABRT, at "),  # at its first trial batch
        ("import os\nos._exit(0)", "it exited by itself, with status 0"),
        ("def ask(x):\n    raise ValueError", ""),
    ],
)
def test_alone_it_goes_the_replicas_own_way(code, end):
    told = tried_alone(SPEC, "d1", pack(Envelope(form="code", target="code:ask", source=code)))
    assert told.startswith(end) if end else not told
    assert "line 3 in ask" in told or "abort" not in code


def test_code_that_would_end_the_replica_in_an_orderly_way_is_an_error_like_any_other():
    models = ModelSet(fetch=Records().program, load=lambda data: sys.exit(3), open_reader=lambda spec: None)
    models.apply(to_user_config([SPEC]))
    assert models.failures == {"taxi": {1: "SystemExit: 3"}}


def test_a_model_that_nobody_answers_for_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "AGAIN_S", 0.02)

    async def test():
        records = Records(1)
        found = await replica(tmp_path, model((1, "live", 1.0)), records=records)
        assert not found.models.is_ready
        records.broken.clear()
        async with http(found) as client:
            for _ in range(200):
                if (await client.get("/v2/health/ready")).status_code == 200:
                    break
                await asyncio.sleep(0.02)
        assert found.models.is_ready
        await asyncio.to_thread(found.stop)

    asyncio.run(test())
