"""What a user declares of a source of rows: names, columns and what is valid in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from raymill.runtime.column_spec import VALUE, Col
from raymill.runtime.expressions import duration_us
from raymill.runtime.migrations import AddColumn, DropColumn, RenameColumn, Widen, states

_NAME = re.compile(r"^[a-z][a-z0-9_-]{0,62}$")


def _checked_name(name: str) -> str:
    if not _NAME.match(name):
        raise ValueError(
            f"{name!r}: a name is lower case letters, digits, - and _, at most 63, and begins with a letter"
        )
    return name


def _checked_duration(text: str) -> str:
    duration_us(text)
    return text


def _checked_place(place: str) -> str:
    if "://" not in place and not place.startswith("/"):
        raise ValueError(f"{place!r}: give an absolute path or a URL, since actors have another working directory")
    return place


def _checked_redis(url: str) -> str:
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError(f"{url!r}: a Redis URL begins with redis://, rediss:// or unix://")
    if ":" in url.split("://", 1)[1].rpartition("@")[0]:
        raise ValueError("a Redis URL must not hold a password: put it into the environment, RAYMILL_REDIS_PASSWORD")
    return url


Name = Annotated[str, AfterValidator(_checked_name)]
Duration = Annotated[str, AfterValidator(_checked_duration)]


@dataclass(frozen=True, config=VALUE)
class Directory:
    """A folder that is watched: each complete file in it is taken once, by name, size and time of change."""

    path: Annotated[str, AfterValidator(_checked_place)]
    """Absolute path, or URL such as `s3://bucket/rows`."""
    pattern: str = "*"
    """Names that count, e.g. `*.parquet`; those that begin with `.` or `_` never do."""
    settle: Duration = "2s"
    """How long a CSV file must not have changed before it is taken; Parquet and Arrow files show their end."""


@dataclass(frozen=True, config=VALUE)
class DeltaTable:
    """Another team's Delta table, followed version by version; its appended rows are taken, once."""

    path: Annotated[str, AfterValidator(_checked_place)]
    """Absolute path, or URL such as `s3://bucket/table`."""
    version: Annotated[int, Field(ge=0)] | None = None
    """Take this version alone, and no later one; absent: the newest, and then every append."""


@dataclass(frozen=True, config=VALUE | ConfigDict(hide_input_in_errors=True))
class RedisStream:
    """A stream on a Redis server; each entry is one row, its fields the columns."""

    url: Annotated[str, AfterValidator(_checked_redis)]
    """`redis://`, `rediss://` (TLS) or `unix://` URL; the password comes from RAYMILL_REDIS_PASSWORD."""
    stream: str
    """Key of the stream."""
    group: str = "raymill"
    """Consumer group; each group gets every entry."""


@dataclass(frozen=True, config=VALUE)
class Source:
    """A stream of rows with a contract; its rows land in the lake table of the same name."""

    name: Name
    """Name of the source and of its lake table."""
    schema: dict[str, Col]
    """The contract: every column and what is valid in it; other columns are refused."""
    key: tuple[str, ...] | list[str]
    """Columns that identify a row; a second row with the same key is quarantined, unless it corrects the first."""
    time: str
    """Timestamp column: when the event happened."""
    known_at: str | None = None
    """Timestamp column: when the event's values became known; null: never. Absent: at `time`."""
    corrected: bool = False
    """Whether a row with the key of an earlier one and another `known_at` is a version of it, and taken in."""
    read: str | Directory | DeltaTable | RedisStream | Callable[[], Any] | None = None
    """A Parquet, CSV or Arrow file (path or URL), a function that returns an Arrow table, or what `raymill feed`
    follows: a `Directory`, `DeltaTable` or `RedisStream`; absent: rows are only sent in."""
    freshness: Duration | None = None
    """How old the newest row of a live batch may be when it is ingested, in event time."""
    migrations: tuple[AddColumn | DropColumn | RenameColumn | Widen, ...] = ()
    """How the columns came to be what they are, oldest first; add to the end, and the lake's table follows."""

    @model_validator(mode="after")
    def _columns_exist(self) -> Source:
        wanted = [*self.key, self.time, *([self.known_at] if self.known_at else [])]
        missing = [c for c in wanted if c not in self.schema]
        if missing:
            raise ValueError(f"source {self.name!r}: key, time or known_at name {missing}, which its schema lacks")
        if self.corrected and self.known_at is None:
            raise ValueError(f"source {self.name!r}: corrected rows are told apart by `known_at`: name such a column")
        media = [c for c in self.key if self.schema[c].dtype == "media"]
        if media:
            raise ValueError(f"source {self.name!r}: key columns {media} are media: take an id or the checksum as key")
        for c in (self.time, self.known_at):
            if c and self.schema[c].dtype != "timestamp":
                raise ValueError(f"source {self.name!r}: column {c!r} must be a timestamp, not {self.schema[c].dtype}")
        try:
            states({name: c.dtype for name, c in self.schema.items()}, self.migrations)
        except ValueError as err:
            raise ValueError(f"source {self.name!r}: {err}") from err
        return self

    @property
    def version_key(self) -> tuple[str, ...]:
        """Columns in which no two rows of the lake are alike: the key; with corrections, key and `known_at`."""
        versions = (self.known_at,) if self.corrected and self.known_at not in (None, *self.key) else ()
        return (*self.key, *versions)

    @property
    def parents(self) -> dict[str, tuple[str, str]]:
        """Column → the (source, column) that it refers to."""
        told = {name: c.references.split(".") for name, c in self.schema.items() if c.references}
        return {name: (parent, column) for name, (parent, column) in told.items()}


def parents_first(sources: Iterable[Source]) -> tuple[Source, ...]:
    """The sources, each after those that its rows refer to, else in their order.

    Raises:
        ValueError: a reference is to no source or column of them, to another type, or leads round in a circle.
    """
    waiting = {s.name: s for s in sources}
    every, placed = dict(waiting), {}
    for source in every.values():
        for name, (parent, column) in source.parents.items():
            _check_reference(source, name, every.get(parent), f"{parent}.{column}")
    while waiting:
        free = [s for s in waiting.values() if all(parent in placed for parent, _ in s.parents.values())]
        if not free:
            raise ValueError(f"sources {sorted(waiting)} refer to each other in a circle: drop one reference")
        placed[free[0].name] = waiting.pop(free[0].name)
    return tuple(placed.values())


def _check_reference(source: Source, name: str, parent: Source | None, place: str) -> None:
    column = place.rpartition(".")[2]
    if parent is None or column not in parent.schema:
        raise ValueError(
            f"source {source.name!r}: column {name!r} refers to {place!r}, which is no column of a source of this "
            f"pipeline: a view has to read that source"
        )
    wanted, has = source.schema[name].dtype, parent.schema[column].dtype
    if wanted != has:
        raise ValueError(f"source {source.name!r}: column {name!r} is {wanted}, but {place!r}, its reference, is {has}")
