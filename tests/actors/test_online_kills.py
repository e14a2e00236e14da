"""Writers of the online store killed at random points: the store is readable, nothing acknowledged is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raymill.actors.online import OnlineReader
from raymill.actors.point_in_time import join
from tests.unit.actors.test_online import PLAN, rides, small_store, table

WRITERS = """
import os, sys
sys.path.insert(0, {root!r})
from tests.actors import test_online_kills as t
t.small_store(t.Path({path!r}) / "warm").ingest("rides", t.table(t.rides(t.random.Random(0), 5)))
facts = t.rides(t.random.Random(6), {rows})
print("ready", flush=True)
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        t.write_from({path!r}, facts, int(line))
    print("writer", pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""
BATCH = 5


def write_from(path: str, facts: list[dict[str, Any]], done: int) -> None:
    """Take the rows in from there on, and say after each batch how many are in."""
    store = small_store(Path(path), keep="12h")
    while done < len(facts):
        store.ingest("rides", table(facts[done : done + BATCH]))
        done += BATCH
        os.write(1, b"%d\n" % done)
    os._exit(0)


def kill_writers(path: Path, kills: int) -> None:
    """Writers that follow each other, each killed at a random moment; what was acknowledged must be there."""
    facts = rides(random.Random(6), 400 * kills)
    code = textwrap.dedent(WRITERS).format(root=str(Path(__file__).parents[2]), path=str(path), rows=len(facts))
    dice = random.Random(time.time_ns())
    small_store(path, keep="12h").ingest("rides", table(facts[:BATCH]))
    done = BATCH
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True, bufsize=1) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        ask = OnlineReader(path, PLAN)
        for n in range(kills):
            print(done, file=parent.stdin)
            pid = int(parent.stdout.readline().split()[1])
            if n % 2:
                done = int(parent.stdout.readline())
                assert_holds(ask, facts, done)  # while it writes on
            time.sleep(dice.random() * 0.05)
            os.kill(pid, signal.SIGKILL)
            while (line := parent.stdout.readline()) != "dead\n":
                done = int(line)
            assert_holds(ask, facts, done)
        parent.stdin.close()
        ask.close()
    assert done > BATCH * (kills // 2)  # they were killed while they wrote


def test_writers_killed_at_random_points_lose_nothing_acknowledged(tmp_path: Path) -> None:
    kill_writers(tmp_path / "online", 5)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_writers_killed_at_a_hundred_random_points_lose_nothing_acknowledged(tmp_path: Path) -> None:
    kill_writers(tmp_path / "online", 100)


def asked_of(facts: list[dict[str, Any]], done: int) -> tuple[pa.Table, np.ndarray]:
    """The last twenty of the first `done` rows, just before the last one of them."""
    first = max(done - 20, 0)
    return table(facts[first:done]), np.full(done - first, facts[done - 1]["left"] - 1, dtype=np.int64)


def assert_holds(ask: OnlineReader, facts: list[dict[str, Any]], done: int) -> None:
    """The reader answers from the first `done` rows; the writer may be ahead, by rows that leave later."""
    asked, at = asked_of(facts, done)
    known = table([f for f in facts if f["left"] <= at[0]])
    assert ask.vectors(asked, at).tobytes() == join(asked, PLAN, {"rides": known}, at=at).tobytes()
