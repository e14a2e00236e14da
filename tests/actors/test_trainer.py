"""A rank as a plain class, in this process, in a group of one: what a step and a state are."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raymill.actors.checkpoint import decode
from raymill.actors.data_order import Schedule, undisturbed
from raymill.actors.engine_config import declared_config
from raymill.actors.program import auc, load_program, log_loss
from raymill.actors.trainer import Place, Position, TrainerActor
from raymill.runtime.errors import TrainingError
from raymill.runtime.spec import Train

SCHEDULE = Schedule(rows=1000, batch_rows=64, epochs=2, seed=13)


def net(inputs: int):  # type: ignore[no-untyped-def]
    import torch

    return torch.nn.Sequential(
        torch.nn.Linear(inputs, 16), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1), torch.nn.Flatten(0)
    )


def table(rows: int, seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, 3)).astype(np.float32)
    y = (x.sum(axis=1) > random.logistic(size=rows)).astype(np.float32)
    x[::9, 2] = np.nan
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 3), "y": pa.array(y)})


def begun(rank: TrainerActor, state: bytes | None = None) -> Position:
    host, port = rank.listen(1)
    rank.join(Place(rank=0, ranks=1, host=host, port=port))
    assert rank.load(table(1000, 1), table(500, 2)) == (1000, 3)
    return rank.begin(SCHEDULE, state)


@pytest.fixture
def a_rank() -> Iterator[Callable[..., TrainerActor]]:
    made: list[TrainerActor] = []

    def make(model: Any = net, **config: Any) -> TrainerActor:
        train = Train(model=model, batch_rows=64, epochs=2, config=config)
        rank = TrainerActor(train, declared_config(train), "127.0.0.1", 10)
        rank.start()
        made.append(rank)
        return rank

    yield make
    for rank in made:
        rank.stop()
        rank.stop()


def test_a_state_goes_on_to_the_same_bits_from_any_step(a_rank: Callable[..., TrainerActor]) -> None:
    config = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20}}, "gradient_clipping": 1.0}
    rank = a_rank(**config)
    assert rank.position().step == -1
    begun(rank)
    assert rank.advance(19).step == 19
    halfway = rank.state({"mine": [1]})
    whole = rank.advance(SCHEDULE.steps)
    assert (
        whole.order == undisturbed(SCHEDULE) and whole.finite and not whole.failed and whole.last_s >= whole.first_s > 0
    )
    end = rank.state({})
    other = a_rank(**config)
    assert begun(other, halfway).step == 19
    assert other.advance(SCHEDULE.steps).order == whole.order
    assert other.state({}) == end
    arrays, facts = decode(halfway)
    assert facts["driver"] == {"mine": [1]} and {k.split("/")[0] for k in arrays} == {"net", "optimizer"}


def test_its_evaluation_is_that_of_the_program_it_exports(a_rank: Callable[..., TrainerActor], tmp_path: Path) -> None:
    rank = a_rank(bf16={"enabled": True})
    begun(rank)
    rank.advance(SCHEDULE.epoch_steps)
    train_loss, evaluate_loss, evaluate_auc = rank.evaluate()
    assert 0.3 < train_loss < 0.8
    program = rank.program()
    held_out = table(500, 2)
    p = load_program(program)(held_out["x"].combine_chunks().flatten().to_numpy().reshape(-1, 3))
    y = held_out["y"].to_numpy()
    assert np.isclose(auc(p, y), evaluate_auc) and np.isclose(log_loss(p, y), evaluate_loss)
    rank.advance(SCHEDULE.steps)
    assert rank.evaluate()[2] > 0.6
    (tmp_path / "p").write_bytes(program)
    elsewhere = [sys.executable, "-c", LOADER, str(tmp_path / "p")]
    done = subprocess.run(elsewhere, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(load_program(program)(np.zeros((2, 3), np.float32)).tolist())


LOADER = """
import sys, pathlib, numpy as np
from raymill.actors.program import load_program
print(load_program(pathlib.Path(sys.argv[1]).read_bytes())(np.zeros((2, 3), np.float32)).tolist())
"""


def fails_late(inputs: int):  # type: ignore[no-untyped-def]
    import torch

    class Late(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = torch.nn.Linear(inputs, 1), 0

        def forward(self, x):  # type: ignore[no-untyped-def]
            self.calls += 1
            if self.calls > 6:
                raise ValueError("no more")
            return self.linear(x).reshape(-1)

    return Late()


def test_a_step_that_fails_changes_nothing_and_leaves_a_state_to_go_on_from(
    a_rank: Callable[..., TrainerActor],
) -> None:
    rank = a_rank(model=fails_late)
    begun(rank)
    rank.advance(5)
    before = decode(rank.state({}))
    position = rank.advance(20)
    assert position.step == 5 and position.failed == "ValueError: no more"
    after = decode(rank.state({}))
    assert all(np.array_equal(after[0][k], before[0][k]) for k in before[0])
    assert begun(rank, rank.state({})).step == 5
    assert rank.advance(9).step == 9


def test_a_checkpoint_of_another_net_is_refused(a_rank: Callable[..., TrainerActor]) -> None:
    rank = a_rank()
    begun(rank)
    rank.advance(2)
    with pytest.raises(TrainingError, match=r"does not fit train.model.*new training_id"):
        begun(a_rank(model=fails_late), rank.state({}))
    with pytest.raises(TrainingError, match="never began"):
        a_rank().evaluate()


def test_no_collective_of_any_group_waits_longer_than_the_ranks_patience(a_rank: Callable[..., TrainerActor]) -> None:
    from torch.distributed import distributed_c10d

    begun(a_rank())
    groups = list(distributed_c10d._world.pg_map)
    assert len(groups) > 1, "DeepSpeed's own groups are among them"
    for group in groups:
        backend = group._get_backend(__import__("torch").device("cpu"))
        assert backend.options._timeout.total_seconds() == 10
