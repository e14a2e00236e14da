"""Real ranks on a local Ray: they are lost by SIGKILL and by notice, and the training ends as if nothing had been."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raymill.actors.data_order import Schedule, undisturbed
from raymill.actors.program import load_program
from raymill.actors.ranks import Patience
from raymill.actors.training import Gang
from raymill.runtime.errors import LeaseError, SpecError, TrainingError
from raymill.runtime.messages import (
    Event,
    Granted,
    Lease,
    LeaseRequest,
    Manifest,
    Notice,
    Queued,
    TrainingSet,
    TrainResult,
)
from raymill.runtime.spec import Train

COLUMNS, EPOCHS, BATCH_ROWS = 6, 3, 256
ROWS = 78 * BATCH_ROWS + 1
"""The last batch of an epoch has a single row: one of two ranks gets none of it."""
SCHEDULE = Schedule(rows=ROWS, batch_rows=BATCH_ROWS, epochs=EPOCHS, seed=13)
ORDER = undisturbed(SCHEDULE)


class Pool:
    """Leases as the scheduler grants them: a placement group each, every one on a node of its own name."""

    def __init__(self, bundles: int = 2) -> None:
        self.free, self.given = bundles, 0
        self.held: dict[str, Lease] = {}
        self.noticed: list[Notice] = []

    def acquire(self, request: LeaseRequest, timeout_s: float) -> Granted | Queued:
        count = min(request.count, self.free)
        if count < request.min_count:
            return Queued(reason=f"{self.free} bundles are free")
        leases = []
        for _ in range(count):
            group = placement_group([request.resources])
            assert group.wait(30)
            self.given += 1
            leases.append(
                Lease(
                    lease_id=f"lease-{self.given}",
                    owner=request.owner,
                    purpose=request.purpose,
                    node_id=f"node-{self.given}",
                    market="",
                    placement_group=group,
                    resources=request.resources,
                )
            )
        self.free -= count
        self.held |= {lease.lease_id: lease for lease in leases}
        return Granted(leases=tuple(leases))

    def release(self, lease_ids: list[str]) -> None:
        for lease_id in lease_ids:
            remove_placement_group(self.held.pop(lease_id).placement_group)

    def notices(self, owner: str) -> list[Notice]:
        return [n for n in self.noticed if any(lease.node_id == n.node_id for lease in self.held.values())]


def net(inputs: int):  # type: ignore[no-untyped-def]
    """A small net; for data of 2, 3 or 4 columns one with a fault of its own."""
    import torch

    class Faulty(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = torch.nn.Linear(inputs, 1), 0

        def forward(self, x):  # type: ignore[no-untyped-def]
            self.calls += 1
            logits = self.linear(x)
            if inputs == 4:
                return logits
            if inputs == 6 and self.calls > 6:
                raise ValueError("I do not like this batch")
            return logits.reshape(-1) * (torch.inf if inputs == 8 else 1.0)

    if inputs < 2 * COLUMNS:
        return Faulty()
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1), torch.nn.Flatten(0)
    )


def table(rows: int, seed: int, columns: int = COLUMNS) -> pa.Table:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, columns)).astype(np.float32)
    y = (x @ np.linspace(-1, 1, columns) + x[:, 0] * x[:, 1] > random.logistic(size=rows)).astype(np.float32)
    x[random.random(x.shape) < 0.05] = np.nan
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), columns), "y": pa.array(y)})


def a_set(rows: int = ROWS, columns: int = COLUMNS) -> TrainingSet:
    manifest = Manifest(
        pipeline="p",
        lake_versions={"flights": 3},
        features=tuple("abcdef")[:columns],
        feature_hashes={"a": "1"},
        label="late",
        label_rule=[],
        start_at=0,
        end_at=1,
        known_until=1,
        rows=rows,
        without_label=0,
    )
    return TrainingSet(manifest=manifest, train_ref=table(rows, 1, columns), evaluate_ref=table(4000, 2, columns))


def a_gang(pool: Pool, folder: Path, ledger: list[Event]) -> Gang:
    train = Train(model=net, epochs=EPOCHS, batch_rows=BATCH_ROWS, ranks=2)
    patience = Patience(first_lease_s=1, replacement_s=1, collective_s=15)
    return Gang(pool, train, owner="run-1", checkpoint_dir=folder, record=ledger.extend, patience=patience)


def probabilities(result: TrainResult) -> np.ndarray:
    x = np.random.default_rng(7).normal(size=(500, COLUMNS)).astype(np.float32)
    return load_program(result.program)(x)


@dataclass
class Crew:
    """One warm gang for all tests, and what an undisturbed training of it came to."""

    gang: Gang
    pool: Pool
    ledger: list[Event]
    folder: Path
    peaceful: TrainResult

    def of(self, ranks: int) -> list[int]:
        """Have so many ranks, and no more to be had; their process ids."""
        self.gang._ranks.drop(self.gang._ranks.members[ranks:])
        self.pool.free, self.pool.noticed = ranks - len(self.gang), []
        self.gang.start()
        assert len(self.gang) == ranks
        self.pool.free = 0
        return [ray.get(r.actor.health.remote()) for r in self.gang._ranks.members]

    def same(self, result: TrainResult) -> bool:
        """Whether a result is that of the undisturbed training: the order exactly, the net up to rounding."""
        apart = np.abs(probabilities(result) - probabilities(self.peaceful)).max()
        return result.data_order == ORDER and result.steps == SCHEDULE.steps and bool(apart < 1e-3)


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    ray.init(address="local", include_dashboard=False, num_cpus=3, logging_level=logging.ERROR)
    pool, ledger, folder = Pool(), [], tmp_path_factory.mktemp("checkpoints")
    gang = a_gang(pool, folder, ledger)
    yield Crew(gang, pool, ledger, folder, gang.fit(a_set(), training_id="peaceful"))
    gang.close()
    gang.close()
    assert not pool.held
    ray.shutdown()


def at_step(step: int, act: Callable[[], object]) -> Callable[[int, int], None]:
    """A hook that acts once, after the first chunk beyond `step`."""
    acted: list[int] = []

    def hook(now: int, steps: int) -> None:
        if now > step and not acted:
            acted.append(now)
            act()

    return hook


def test_a_training_evaluates_each_epoch_and_tells_the_ledger(crew: Crew) -> None:
    epochs = crew.peaceful.epochs
    assert crew.peaceful.data_order == ORDER and crew.peaceful.steps == SCHEDULE.steps
    assert [(e.epoch, e.ranks) for e in epochs] == [(0, 2), (1, 2), (2, 2)]
    assert epochs[-1].evaluate_auc > 0.75 and epochs[-1].train_loss < epochs[0].train_loss
    events = [e for e in crew.ledger if e.subject == "peaceful"]
    assert [e.kind for e in events] == ["training.epoch"] * 3 + ["training.finished"]
    assert len({e.key for e in events}) == 4
    json.dumps([e.data for e in events], allow_nan=False)


def test_the_same_processes_train_again_and_to_the_same_bits(crew: Crew) -> None:
    before = crew.of(2)
    again = crew.gang.fit(a_set(), training_id="again")
    assert np.array_equal(probabilities(again), probabilities(crew.peaceful))
    assert crew.of(2) == before


def test_a_rank_whose_node_gets_notice_leaves_without_a_step_lost(crew: Crew) -> None:
    crew.of(2)
    notice = Notice(node_id=crew.gang.nodes[1], deadline_s=time.time() + 30, reason="spot")
    hook = at_step(100, lambda: crew.pool.noticed.append(notice))
    result = crew.gang.fit(a_set(), training_id="notice", on_step=hook)
    (change,) = result.changes
    assert (change.before, change.after, change.reason, change.steps_lost) == (2, 1, "spot notice", 0)
    assert crew.same(result) and len(crew.pool.held) == 1


def test_one_rank_learns_what_two_learn(crew: Crew) -> None:
    crew.of(1)
    result = crew.gang.fit(a_set(), training_id="alone")
    assert crew.same(result) and result.epochs[0].ranks == 1
    assert abs(result.epochs[-1].train_loss - crew.peaceful.epochs[-1].train_loss) < 1e-4


def test_a_rank_killed_in_mid_step_costs_no_step_and_changes_no_order(crew: Crew) -> None:
    first, _ = crew.of(2)
    kill = threading.Timer(0.1, os.kill, (first, signal.SIGKILL))  # the next chunk is under way by then
    result = crew.gang.fit(a_set(), training_id="killed", on_step=at_step(60, kill.start))
    (change,) = result.changes
    assert (change.before, change.after, change.reason, change.steps_lost) == (2, 1, "rank lost", 0)
    assert change.step > 60 and crew.same(result) and len(crew.pool.held) == 1
    assert [e.kind for e in crew.ledger if e.subject == "killed"].count("gang.changed") == 1


def test_when_no_rank_is_left_a_replacement_goes_on_from_the_checkpoint(crew: Crew) -> None:
    (only,) = crew.of(1)
    reached: list[int] = []

    def kill() -> None:
        crew.pool.free = 1
        os.kill(only, signal.SIGKILL)

    hook = at_step(100, kill)
    result = crew.gang.fit(a_set(), training_id="gone", on_step=lambda *at: (reached.append(at[0]), hook(*at)))
    (change,) = result.changes
    assert (change.before, change.after, change.step) == (1, 1, SCHEDULE.epoch_steps)
    assert change.steps_lost == next(s for s in reached if s > 100) - SCHEDULE.epoch_steps
    assert crew.same(result) and [e.epoch for e in result.epochs] == [0, 1, 2]


def test_a_training_that_ran_out_of_ranks_is_finished_later_and_never_done_twice(crew: Crew) -> None:
    (only,) = crew.of(1)
    with pytest.raises(TrainingError, match=r"0 ranks are left of at least 1.*0 bundles are free.*checkpoint is kept"):
        crew.gang.fit(a_set(), training_id="few", on_step=at_step(100, lambda: os.kill(only, signal.SIGKILL)))
    with pytest.raises(LeaseError, match="0 of at least 1 ranks: 0 bundles are free"):
        crew.gang.fit(a_set(), training_id="few")
    crew.of(1)
    steps: list[int] = []
    result = crew.gang.fit(a_set(), training_id="few", on_step=lambda step, _: steps.append(step))
    assert steps[0] > SCHEDULE.epoch_steps and crew.same(result)
    finished = crew.gang.fit(a_set(), training_id="few", on_step=lambda *_: pytest.fail("it is finished"))
    assert np.array_equal(probabilities(finished), probabilities(result)) and finished.epochs == result.epochs
    with pytest.raises(TrainingError, match="other rows"):
        crew.gang.fit(a_set(rows=ROWS - 1), training_id="few")


def test_epochs_whose_driver_died_between_checkpoint_and_ledger_are_told_by_the_next(crew: Crew) -> None:
    crew.of(1)
    told: list[Event] = []

    def die(events: list[Event]) -> None:
        if any(e.data.get("epoch") == 1 for e in events):
            raise KeyboardInterrupt
        told.extend(events)

    crew.gang._record = die
    try:
        with pytest.raises(KeyboardInterrupt):
            crew.gang.fit(a_set(), training_id="untold")
    finally:
        crew.gang._record = crew.ledger.extend
    crew.gang.fit(a_set(), training_id="untold")
    told += [e for e in crew.ledger if e.subject == "untold"]
    assert {e.data["epoch"] for e in told if e.kind == "training.epoch"} == {0, 1, 2}


@pytest.mark.parametrize(
    ("columns", "error", "words"),
    [
        (2, SpecError, r"gives \[2, 1\], not \[2\]: return one logit a row"),
        (3, TrainingError, "again and again: ValueError: I do not like this batch"),
        (4, TrainingError, "the loss is not finite at step 1"),
    ],
)
def test_what_is_the_models_fault_is_said_so(crew: Crew, columns: int, error: type[Exception], words: str) -> None:
    crew.of(1)
    with pytest.raises(error, match=words):
        crew.gang.fit(a_set(8000, columns), training_id=f"fault {columns}")


DRIVER = """
import os, signal, ray
from pathlib import Path
from tests.actors import test_training as t
ray.init(address="local", include_dashboard=False, num_cpus=3)
gang = t.a_gang(t.Pool(), Path({folder!r}), [])
gang.fit(t.a_set(), training_id="all dead", on_step=lambda step, _: step > 100 and os.killpg(0, signal.SIGKILL))
"""


def test_after_sigkill_of_the_driver_and_its_whole_cluster_another_gang_goes_on(crew: Crew) -> None:
    crew.of(1)
    script = DRIVER.format(folder=str(crew.folder))
    root = Path(__file__).parents[2]
    driver = subprocess.run([sys.executable, "-c", script], cwd=root, start_new_session=True, capture_output=True)
    assert driver.returncode == -signal.SIGKILL, driver.stderr.decode()[:3000]
    steps: list[int] = []
    result = crew.gang.fit(a_set(), training_id="all dead", on_step=lambda step, _: steps.append(step))
    assert steps[0] > SCHEDULE.epoch_steps and crew.same(result)
