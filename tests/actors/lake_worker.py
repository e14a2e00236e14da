"""Processes that work on a lake, some until they are killed: what one tells as done is done."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

import pyarrow as pa

from raymill.actors import lake as lake_module
from raymill.actors.lake import Lake
from raymill.runtime.migrations import RenameColumn
from raymill.runtime.spec import Col, Source

TABLE = "facts"
ROWS = 3


def source(generation: int) -> Source:
    """The source after that many renames of its column: each one writes the whole table anew."""
    names = [f"x{g}" for g in range(generation + 1)]
    return Source(
        TABLE,
        schema={"n": Col("int64"), "t": Col("timestamp"), names[-1]: Col("int64")},
        key=["n"],
        time="t",
        migrations=[RenameColumn(old, new) for old, new in pairwise(names)],
    )


def batch(number: int, generation: int) -> pa.Table:
    """The rows of a batch: numbers that no other batch has."""
    n = pa.array(range(ROWS * number, ROWS * (number + 1)), pa.int64())
    return pa.table({"n": n, "t": n.cast(pa.timestamp("us", "UTC")), f"x{generation}": n})


def work(root: str, environment: dict[str, str], first: int, generation: int, vacuum: bool, told: Connection) -> None:
    """Migrate, then append batches from number `first` on, telling each that is acknowledged; merge between them."""
    os.environ |= environment
    lake_module.UPKEEP_EVERY = 8
    dice, lake = random.Random(first), Lake(root)
    told.send("ready")
    lake.migrate(source(generation))
    number = first
    while True:
        lake.append(TABLE, batch(number, generation), batch_id=str(number), by="t")
        told.send(number)
        number += 1
        if dice.random() < 0.3:
            lake.compact(TABLE, fewest=2)
        if vacuum and dice.random() < 0.3:  # as if hours had passed: only where nobody else is at work
            lake.vacuum(TABLE, pins=(), older_than_s=0, now_s=time.time() + 2 * 3600)


def share(root: str, environment: dict[str, str], own: int, pipe: Connection) -> None:
    """Once told to, append batches that the other process appends too, between batches of one's own."""
    os.environ |= environment
    lake = Lake(root)
    pipe.send("ready")
    pipe.recv()
    for n in range(6):
        lake.append("numbers", pa.table({"n": [n]}), batch_id=f"shared-{n}")
        lake.append("numbers", pa.table({"n": [own + n]}), batch_id=f"own-{own}-{n}")


def processes() -> BaseContext:
    """Where processes come from that have all modules loaded, in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
