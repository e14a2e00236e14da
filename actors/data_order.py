"""Which rows are trained on in which step: pure functions of (seed, epoch, rows), never of the ranks.

Invariants:
- every row is trained on exactly once an epoch;
- the shares of a step's batch tile it, in order, for any number of ranks;
- the digest of an order depends on the rows and on nothing else, so a training that lost and won ranks can prove
  that it saw what an undisturbed one sees.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

NOTHING_YET = hashlib.sha256(b"raymill data order").digest()
"""Digest of an order before its first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of one global step, as a range of its epoch's permutation."""

    epoch: int
    """Epoch, from 0."""
    start: int
    """First place in the permutation."""
    stop: int
    """Place after the last; the last batch of an epoch may be shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The steps of a whole training."""

    rows: int
    """Rows of the training set."""
    batch_rows: int
    """Rows of a global step, over all ranks."""
    epochs: int
    """Passes over the rows."""
    seed: int
    """Seed of the order."""

    @property
    def epoch_steps(self) -> int:
        """Steps of one epoch."""
        return -(-self.rows // self.batch_rows)

    @property
    def steps(self) -> int:
        """Steps of the training."""
        return self.epoch_steps * self.epochs

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        epoch, within = divmod(step, self.epoch_steps)
        start = within * self.batch_rows
        return Batch(epoch=epoch, start=start, stop=min(start + self.batch_rows, self.rows))

    def epoch_end(self, step: int) -> int:
        """Number of the step after the last of the epoch that `step` lies in."""
        return (step // self.epoch_steps + 1) * self.epoch_steps


def permutation(seed: int, epoch: int, rows: int) -> Rows:
    """The order of an epoch, [rows] int64.

    Made from the bit generator's raw stream, which numpy promises to keep; `Generator.permutation` may change.
    """
    stream = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch]))
    return np.argsort(stream.random_raw(rows), kind="stable").astype(np.int64, copy=False)


def share(rows: int, ranks: int, rank: int) -> slice:
    """The part of a batch of `rows` that a rank trains on; it may be empty when ranks outnumber rows."""
    return slice(rows * rank // ranks, rows * (rank + 1) // ranks)


def extend(digest: bytes, rows: Rows) -> bytes:
    """Digest of an order after one more batch."""
    return hashlib.sha256(digest + rows.astype("<i8", copy=False).tobytes()).digest()


def undisturbed(schedule: Schedule) -> str:
    """Digest, in hex, of the order that a training without any trouble sees."""
    digest = NOTHING_YET
    for epoch in range(schedule.epochs):
        order = permutation(schedule.seed, epoch, schedule.rows)
        for step in range(epoch * schedule.epoch_steps, (epoch + 1) * schedule.epoch_steps):
            batch = schedule.batch(step)
            digest = extend(digest, order[batch.start : batch.stop])
    return digest.hex()
