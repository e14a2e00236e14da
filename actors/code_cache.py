"""Entities of stored parts as dense codes, kept beside the parts: to number ten million strings takes a second, once.

A cache of a row group and the columns of an entity is one file: code of each row (uint32), and the entities in the
order of their codes. It is derived: it may be deleted at any time, whoever needs it makes it anew.

Invariants
- A part never changes, so a cache named by the part's name and size is right as long as it lies there.
- A cache comes to be by rename; one that can not be read, or has other rows than its row group, is made anew.
- Whoever adds a cache removes those whose part is gone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.evaluate import Ints
from raymill.actors.merge import densify
from raymill.actors.parts import Block, Parts
from raymill.runtime.expressions import digest
from raymill.runtime.ids import new_ids

FROM_ROWS = 1 << 16
"""Rows of a row group from which a cache is worth its file."""
_PREFIX = "_codes-"
"""Delta passes over what begins with an underscore."""
_log = logging.getLogger(__name__)

Codes = npt.NDArray[np.uint32]


def cached(parts: Parts, block: Block, columns: Sequence[str]) -> tuple[Codes, pa.Table] | None:
    """Code of each row (the number of entities for none) and the entities, as they were kept; None: they were not."""
    try:
        with pa.memory_map(str(_path(parts, block, columns))) as file:
            kept = pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowInvalid):
        return None
    if kept.num_rows != 1 or kept.column_names != ["", *columns]:
        return None
    codes = kept.column("").chunk(0).flatten().to_numpy()
    entities = pa.table({c: kept.column(c).chunk(0).flatten() for c in columns})
    return (codes, entities) if len(codes) == block.rows else None


def keep(parts: Parts, block: Block, columns: Sequence[str], codes: Codes, entities: pa.Table) -> None:
    """Keep what `cached` gives; where the folder can not be written it is logged, since a cache may be missing."""
    path = _path(parts, block, columns)
    row = {"": pa.LargeListArray.from_arrays([0, len(codes)], pa.array(codes))}
    for name in columns:
        values = entities.column(name).combine_chunks()
        row[name] = pa.LargeListArray.from_arrays([0, len(values)], values)
    whole = pa.table(row)
    half = path.with_name(f"{path.name}.{new_ids(1)[0]}")
    try:
        with pa.OSFile(str(half), "wb") as file, pa.ipc.new_file(file, whole.schema) as writer:
            writer.write_table(whole)
        half.replace(path)
        _clean(path.parent)
    except OSError as err:
        half.unlink(missing_ok=True)
        _log.warning("codes of entities could not be kept at %s: %s", path, err)


def encoded(codes: Ints, entities: pa.Table) -> tuple[Codes, pa.Table]:
    """Codes with gaps, −1 for none, and the rows' entities: as dense codes, and the distinct entities."""
    codes = codes.copy()
    n = densify(codes, np.empty(0, dtype=np.int64), -1)
    firsts = np.empty(n, dtype=np.int64)
    has = np.flatnonzero(codes >= 0)[::-1]
    firsts[codes[has]] = has  # of what is written several times the last stays: the first row
    return np.where(codes < 0, n, codes).astype(np.uint32), entities.take(pa.array(firsts))


def _path(parts: Parts, block: Block, columns: Sequence[str]) -> Path:
    path, group = Path(parts.path(block)), block.origin[1]
    kinds = [str(parts.kind(c)) for c in columns]
    return path.with_name(f"{_PREFIX}{group}-{digest(list(columns), kinds)}-{path.stat().st_size}-{path.name}")


def _clean(folder: Path) -> None:
    with os.scandir(folder) as entries:
        names = {e.name for e in entries}
    for name in names:
        if name.startswith(_PREFIX) and name.split("-", 4)[-1] not in names:
            (folder / name).unlink(missing_ok=True)
