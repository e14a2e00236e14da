"""kill -9 amid appends, merges, migrations and vacuums: what was acknowledged is there, once; all is readable."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from raymill.actors.lake import Lake
from tests.actors import s3_server
from tests.actors.lake_worker import ROWS, TABLE, batch, processes, source, work

BATCHES_A_WORKER = 1000


def crash(context, root: str, environment: dict[str, str], crash_number: int, dice: random.Random) -> set[int]:
    """Let one worker (or two, without vacuum) work for a moment and kill them; the batches that were acknowledged."""
    both = crash_number % 3 == 2
    firsts = [(2 * crash_number + w) * BATCHES_A_WORKER for w in range(1 + both)]
    pipes, workers = [], []
    for first in firsts:
        ours, theirs = context.Pipe(duplex=False)
        told = (root, environment, first, crash_number // 2, not both, theirs)
        worker = context.Process(target=work, args=told, daemon=True)
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)
    assert [pipe.recv() for pipe in pipes] == ["ready"] * len(pipes)
    time.sleep(dice.choice([0.03, 0.1, 0.3]) * dice.random())
    for worker in workers:
        assert worker.is_alive()
        worker.kill()
        worker.join()
    acknowledged = set()
    for pipe in pipes:
        try:
            while True:
                acknowledged.add(pipe.recv())
        except (EOFError, OSError):
            pipe.close()
    return acknowledged


def assert_whole(lake: Lake, acknowledged: set[int]) -> None:
    """Nothing acknowledged is lost, nothing is doubled, no batch is there by half."""
    rows = lake.read(TABLE)
    numbers = rows["n"].to_pylist()
    assert len(numbers) == len(set(numbers)) == lake.count(TABLE)
    batches = {n // ROWS for n in numbers}
    assert acknowledged <= batches
    assert len(numbers) == ROWS * len(batches)
    assert rows[rows.column_names[-1]].null_count == 0
    assert len(lake.parts(TABLE)) == len(numbers)


def kill_often(root: str, crashes: int, seed: int, environment: dict[str, str] | None = None) -> None:
    context, dice, acknowledged = processes(), random.Random(seed), {0}
    Lake(root).append(TABLE, batch(0, 0), batch_id="0", by="t")
    for number in range(crashes):
        done = crash(context, root, environment or {}, number, dice)
        acknowledged |= done
        lake = Lake(root)  # as the next process sees it
        assert_whole(lake, acknowledged)
        lake.migrate(source(number // 2))
        again = max(done, default=2 * number * BATCHES_A_WORKER)  # a retry by one who does not know whether it was done
        lake.append(TABLE, batch(again, number // 2), batch_id=str(again))
        acknowledged.add(again)
        assert_whole(lake, acknowledged)


def test_a_lake_whose_processes_are_killed_is_whole(tmp_path: Path) -> None:
    kill_often(str(tmp_path), 9, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2))
def test_a_lake_is_whole_after_a_hundred_kills(tmp_path: Path, seed: int) -> None:
    kill_often(str(tmp_path), 50, seed)


@pytest.mark.soak
def test_a_lake_in_a_bucket_is_whole_after_kills(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with s3_server.running() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("RAYMILL_HOME", str(tmp_path))
        kill_often(server.url("killed"), 20, 3, server.environment)
