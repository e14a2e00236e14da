"""JSON bodies of one row each, of callers who ask the same model: read together, a column of all of them at a time.

Invariant: what is read is what `wire.read_json` reads of each alone; whatever is not certain is left to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raymill.actors.rollout import ModelSpec
from raymill.actors.wire import Rows, objects_of, rows_of_objects
from raymill.runtime.errors import RaymillError

_LONGEST = 16 << 10
"""Bytes of a body that is read with others."""


def is_one_row(body: bytes) -> bool:
    """Whether the body, if it is one that can be read, has one row at most: there is no more than one object in it."""
    return len(body) <= _LONGEST and body.count(b"{") == 2


def read_together(bodies: Sequence[bytes], model: ModelSpec, now_us: int) -> list[Rows | None]:
    """The row of each body; None: it is to be read alone, and its caller told what is wrong with it."""
    found: list[Rows | None] = [None] * len(bodies)
    alike: dict[tuple[str, ...], list[tuple[int, dict[str, Any], Any]]] = {}
    for place, body in enumerate(bodies):
        try:
            rows, at = objects_of(body)
        except RaymillError:
            continue
        if len(rows) == 1 and type(rows[0]) is dict:
            row = rows[0]
            own = row.get("at")
            alike.setdefault(tuple(row), []).append((place, row, at if own is None else own))
    for group in alike.values():
        try:
            whole = rows_of_objects([row for _, row, _ in group], [at for _, _, at in group], model, now_us)
        except RaymillError:  # one of them is wrong, or two have the same id
            continue
        for i, (place, _, _) in enumerate(group):
            found[place] = Rows(
                ids=whole.ids[i : i + 1],
                at=whole.at[i : i + 1],
                columns=whole.columns.slice(i, 1),
                keys=whole.keys[i : i + 1],
                texts=whole.texts[i : i + 1],
            )
    return found
