"""Many files of rows, larger together than any node's memory: read by Ray Data's tasks, handed on batch by batch.

Invariants
- Batches and ids are those of `sources.file_batches`: what was begun without Ray, or with other files beside, goes on.
- What is read ahead stays within `AHEAD_BYTES` of the object store, however much there is to read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from raymill.actors.files import File
from raymill.actors.sources import named, read_batches
from raymill.runtime.errors import ContractError
from raymill.runtime.spec import Source

AHEAD_BYTES = 256 << 20
"""Of the object store, for what is read and not taken yet."""
TASKS = 4
"""Files that are read at once."""
_TASK_CPUS = 0.1
"""So little that reading asks the autoscaler for no node: nodes come for leases alone."""
_FILE, _BATCH = "__file", "__batch"
"""Columns beside the rows' own: number of the file, number of its batch."""


def block_batches(files: Sequence[File], source: Source, placement: dict[str, Any]) -> Iterator[tuple[str, pa.Table]]:
    """The batches of all files, in their order, with their ids; Ray is started.

    Args:
        files: what is read, each by a task of its own.
        source: what the rows are.
        placement: options of the tasks: where they may run, since a path is one host's.

    Raises:
        ContractError: a file can not be read.
    """
    at = 0
    try:
        for number, batches in groupby(_cut_again(_blocks(files, source, placement)), key=lambda batch: batch[0]):
            for empty in range(at, number):
                yield from named(files[empty].id, (), source)
            yield from named(files[number].id, (rows for _, rows in batches), source)
            at = number + 1
    except RayTaskError as err:
        cause = err.cause if isinstance(err.cause, ContractError) else ContractError(f"files can not be read: {err}")
        raise cause from err
    for empty in range(at, len(files)):
        yield from named(files[empty].id, (), source)


def _blocks(files: Sequence[File], source: Source, placement: dict[str, Any]) -> Iterator[pa.Table]:
    """The files' batches as Ray Data's blocks, which cut and join them as they like, in order."""
    context = ray.data.DataContext.get_current().copy()
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells its plan and progress at every run
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=AHEAD_BYTES
    )
    context.enable_progress_bars = False
    items = [
        {"place": file.place, "size": file.size, "mtime_ns": file.mtime_ns, "number": number}
        for number, file in enumerate(files)
    ]

    def read(item: pa.Table) -> Iterator[pa.Table]:
        facts = item.to_pylist()[0]
        number = facts.pop("number")
        for i, rows in enumerate(read_batches(File(**facts), source)):
            for name, value in ((_FILE, number), (_BATCH, i)):
                rows = rows.append_column(name, pa.array(np.full(len(rows), value, np.int32)))
            yield rows

    with ray.data.DataContext.current(context):
        blocks = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            read,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=min(TASKS, len(items))),
            num_cpus=_TASK_CPUS,
            **placement,
        )
        yield from blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _cut_again(blocks: Iterator[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """(number of the file, batch) as the batches were before they became blocks."""
    waiting: list[pa.Table] = []
    at: tuple[int, int] | None = None
    for block in blocks:
        marks = np.column_stack([block[_FILE].to_numpy(), block[_BATCH].to_numpy()])
        starts = np.flatnonzero(np.r_[True, (np.diff(marks, axis=0) != 0).any(axis=1)])
        for start, end in zip(starts, [*starts[1:], len(block)], strict=True):
            mark = (int(marks[start, 0]), int(marks[start, 1]))
            if at is not None and mark != at:
                yield at[0], pa.concat_tables(waiting)
                waiting = []
            at = mark
            waiting.append(block.slice(start, end - start).drop_columns([_FILE, _BATCH]))
    if at is not None:
        yield at[0], pa.concat_tables(waiting)
