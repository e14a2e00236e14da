"""The training gang: ranks kept warm, and trainings that go on when ranks are lost.

    gang = Gang(scheduler, train, owner="run-7", checkpoint_dir=home.models / "checkpoints")
    result = gang.fit(training_set, training_id="run-7/1")
    gang.close()

The ranks run in chunks of steps; between two chunks the driver looks for notices, checkpoints, and re-forms the
group. Invariants:
- whatever the ranks go through, the rows are trained on in the order of `data_order.undisturbed`, each exactly once
  an epoch;
- a training that was killed goes on from its newest checkpoint, with any number of ranks; one that is finished is
  not done again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raymill.actors.checkpoint import CheckpointFolder
from raymill.actors.engine_config import declared_config
from raymill.actors.fit import Asked, Fit
from raymill.actors.ranks import Owner, Patience, Ranks
from raymill.runtime.errors import LeaseError
from raymill.runtime.messages import EpochMetrics, Event, TrainingSet, TrainResult
from raymill.runtime.spec import Train


class Gang:
    """The ranks of one pipeline, kept for all its trainings."""

    def __init__(
        self,
        scheduler: Any,
        train: Train,
        *,
        owner: str | Owner,
        checkpoint_dir: str | Path,
        record: Callable[[list[Event]], None] | None = None,
        patience: Patience | None = None,
    ) -> None:
        """`scheduler` is the scheduler actor's handle, or an object with its methods.

        Raises:
            SpecError: `train.config` asks for something a gang can not do.
        """
        self._train, self._record = train, record
        self._patience = patience or Patience()
        self._checkpoints = CheckpointFolder(checkpoint_dir)
        whose = owner if isinstance(owner, Owner) else Owner(name=owner)
        self._ranks = Ranks(scheduler, train, declared_config(train), whose, self._patience)

    def __len__(self) -> int:
        return len(self._ranks)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Ray node id of each rank."""
        return tuple(r.lease.node_id for r in self._ranks.members)

    def start(self) -> None:
        """Lease and start the ranks that are missing; `fit` does it too, this is to do it beforehand.

        Raises:
            LeaseError: fewer than `min_ranks` are to be had.
        """
        have, want = len(self._ranks), self._train.ranks
        if have >= want:
            return
        patience = self._patience.more_ranks_s if have >= self._train.min_ranks else self._patience.first_lease_s
        why = self._ranks.recruit(want - have, max(1, self._train.min_ranks - have), patience)
        if len(self._ranks) < self._train.min_ranks:
            raise LeaseError(f"the gang has {len(self._ranks)} of at least {self._train.min_ranks} ranks: {why}")

    def fit(
        self,
        training_set: TrainingSet,
        *,
        training_id: str,
        on_epoch: Callable[[EpochMetrics], None] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> TrainResult:
        """Train from `training_id`'s newest checkpoint, or from the beginning.

        Raises:
            TrainingError: the loss is not finite, the model fails, too few ranks are left, or the checkpoint is of
                another training.
            LeaseError: there are no ranks to begin with.
            SpecError: the model does not fit the rows.
        """
        asked = Asked(
            training_set=training_set,
            training_id=training_id,
            on_epoch=on_epoch,
            on_step=on_step,
            record=self._record,
        )
        fit = Fit(asked, self._ranks, self._train, self._patience, self._checkpoints)
        self.start()
        return fit.run()

    def close(self) -> None:
        """End the ranks and give their leases back; twice does no harm."""
        self._ranks.drop(self._ranks.members)
