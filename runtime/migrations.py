"""How the columns of a source came to be what they are: declared steps, oldest first, each carried out once.

Invariant: no two states of a history are the same, so that a table's columns alone tell how far it has come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic.dataclasses import dataclass

from raymill.runtime.column_spec import VALUE, DType

WIDENS: dict[DType, tuple[DType, ...]] = {"bool": ("int64",), "int64": ("float64",)}
"""Type → the types that hold all of its values (an integer beyond 2⁵³ refuses to become a float)."""


@dataclass(frozen=True, config=VALUE)
class AddColumn:
    """A column came; rows from before have null in it."""

    name: str
    """The new column."""


@dataclass(frozen=True, config=VALUE)
class DropColumn:
    """A column went."""

    name: str
    """The column."""
    was: DType
    """Its type."""


@dataclass(frozen=True, config=VALUE)
class RenameColumn:
    """A column has another name."""

    old: str
    """The name before."""
    new: str
    """The name since."""


@dataclass(frozen=True, config=VALUE)
class Widen:
    """A column has a wider type: bool → int64 or int64 → float64."""

    name: str
    """The column."""
    was: DType
    """The type before."""


Migration = AddColumn | DropColumn | RenameColumn | Widen


def states(columns: Mapping[str, DType], migrations: Sequence[Migration]) -> list[dict[str, DType]]:
    """The columns before the first step, and after each; the last are those declared now.

    Raises:
        ValueError: a step does not lead to the columns after it, or the history comes back to where it was.
    """
    found = [dict(columns)]
    for number, step in reversed(list(enumerate(migrations, 1))):
        try:
            found.insert(0, _before(step, found[0]))
        except ValueError as err:
            raise ValueError(f"migration {number}, {step}, {err}") from err
    for number, state in enumerate(found):
        if state in found[:number]:
            raise ValueError(
                f"migrations {found.index(state) + 1} to {number} lead back to the columns before them: leave them out"
            )
    return found


def _before(step: Migration, after: Mapping[str, DType]) -> dict[str, DType]:
    name = step.new if isinstance(step, RenameColumn) else step.name
    if isinstance(step, DropColumn) == (name in after):
        raise ValueError(f"but the columns after it are {', '.join(after)}")
    if isinstance(step, AddColumn):
        return {n: t for n, t in after.items() if n != name}
    if isinstance(step, DropColumn):
        return {**after, name: step.was}
    if isinstance(step, RenameColumn):
        if step.old in after:
            raise ValueError(f"but after it {step.old!r} is still there")
        return {step.old if n == name else n: t for n, t in after.items()}
    if after[name] not in WIDENS.get(step.was, ()):
        raise ValueError(f"but {step.was} does not widen to {after[name]}: add a column instead")
    return {**after, name: step.was}
