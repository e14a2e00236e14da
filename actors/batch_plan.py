"""What a batch job does, as a value: written down before its first answer, so that whoever goes on does the same.

Invariant: model version, versions of the lake, the table's files and the moment of rows that name none are pinned by
the plan; so a piece that is answered again, by whomever and whenever, gets the same answers under the same ids.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from raymill.actors.rollout import ModelSpec, Role, Route, from_user_config, to_user_config
from raymill.runtime.errors import Conflict, RequestError, StoreError

PART_ROWS = 131_072
"""Rows that are read, answered and written at once."""
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """What a caller asks of a batch job."""

    table: str
    """Path or URL of a file, a folder of files, or a Delta table."""
    out: str
    """Folder or URL that gets the answers; a job's own."""
    at: str | None = None
    """Column that holds each row's moment, or one moment for all (ISO-8601 with a zone); absent: column `at`, else
    the moment at which the job was planned."""
    keep: tuple[str, ...] = ()
    """Columns of the table that stand beside the answers; `*`: all of them."""
    vectors: bool = False
    """Whether the table holds the model's inputs by their names, and no features are to be looked up."""
    log: bool = False
    """Whether the answers go to the prediction log, and so to the monitor."""
    delta_version: int | None = None
    """Version of a Delta table; absent: the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of the table that one worker reads at a time; answered in parts of at most `PART_ROWS` rows."""

    number: int
    place: str
    """Path or URL of the file, or of the Delta table."""
    size: int = 0
    """Bytes of the file when the job was planned."""
    mtime_ns: int = 0
    """Time of its last change then."""
    fragment: str = ""
    """Of a Delta table: path of the file in it."""
    version: int | None = None
    """Of a Delta table: its version."""
    groups: tuple[int, int] | None = None
    """Of a Parquet file: first row group, and the one after the last; absent: the whole file."""
    row: int = 0
    """Number of its first row in the file."""

    def part(self, number: int) -> str:
        """Name of one of its parts; names sort in the order of the table's rows."""
        return f"part-{self.number:06d}-{number:04d}.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """A batch job."""

    job: str
    """Its id, which names its rows where they have no `id` of their own."""
    model: ModelSpec
    """The model, with the version that answers as its only route."""
    request: BatchRequest
    """What was asked for."""
    now_us: int
    """Moment of rows that name none."""
    pieces: tuple[Piece, ...]
    """The table, in its order."""
    features: bool
    """Whether features are looked up; else the rows are the model's inputs."""
    lake_versions: dict[str, int] = field(default_factory=dict)
    """Version of each lake table that features are made of."""

    @property
    def version(self) -> int:
        """The version that answers."""
        return self.model.routes[0].version

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(
            {
                "format": _FORMAT,
                "job": self.job,
                "model": to_user_config([self.model]),
                "request": asdict(self.request),
                "now_us": self.now_us,
                "pieces": [asdict(p) for p in self.pieces],
                "features": self.features,
                "lake_versions": self.lake_versions,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, where: str) -> BatchPlan:
        """The plan that `to_json` wrote.

        Raises:
            StoreError: it is none.
        """
        try:
            tree: dict[str, Any] = json.loads(text)
            if tree["format"] != _FORMAT:
                raise ValueError(f"its format is {tree['format']}, this is {_FORMAT}")
            [model] = from_user_config(tree["model"]).values()
            request = {**tree["request"], "keep": tuple(tree["request"]["keep"])}
            return cls(
                job=tree["job"],
                model=model,
                request=BatchRequest(**request),
                now_us=tree["now_us"],
                pieces=tuple(_piece_of(p) for p in tree["pieces"]),
                features=tree["features"],
                lake_versions=tree["lake_versions"],
            )
        except (ValueError, KeyError, TypeError) as err:
            raise StoreError(
                f"{where} is no batch job's plan ({type(err).__name__}: {err}): give the job another folder"
            ) from err


def pinned(model: ModelSpec, route: Route | None) -> ModelSpec:
    """The model as a batch job asks it: the version named answers all rows, else the live one.

    Raises:
        RequestError: no version is live.
    """
    if route is None:
        live = [r for r in model.routes if r.role is Role.LIVE]
        if not live:
            raise RequestError(f"model {model.name!r} has no live version: promote one, or name a version")
        route = max(live, key=lambda r: (r.weight, r.version))
    return replace(model, routes=(replace(route, role=Role.LIVE, weight=1.0),))


def check_same(plan: BatchPlan, model: str, version: int | None, request: BatchRequest, job: str | None) -> None:
    """Refuse to go on with a job that was asked for something else.

    Raises:
        Conflict: it differs, with what.
    """
    asked = {"model": model, **asdict(request)}
    begun = {"model": plan.model.name, **asdict(plan.request)}
    if version is not None:
        asked["version"], begun["version"] = version, plan.version
    if job is not None:
        asked["job"], begun["job"] = job, plan.job
    differs = [f"{name}={begun[name]!r}, not {asked[name]!r}" for name in asked if asked[name] != begun[name]]
    if differs:
        raise Conflict(
            f"{request.out} holds batch job {plan.job} of {', '.join(differs)}: give the new job another folder"
        )


def is_id(dtype: pa.DataType) -> bool:
    """Whether a column of this type can be `id`."""
    return bool(pa.types.is_string(dtype) or pa.types.is_integer(dtype))


def _piece_of(tree: dict[str, Any]) -> Piece:
    groups = tree["groups"]
    return Piece(**{**tree, "groups": None if groups is None else (groups[0], groups[1])})
