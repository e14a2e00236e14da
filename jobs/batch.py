"""What a batch job predicts with: a model as the endpoint serves it, and a version from the registry."""

from __future__ import annotations

from pathlib import Path

from raymill.actors.rollout import ModelSpec, Role, Route
from raymill.cluster.session import Session
from raymill.jobs.planning import refuse_other_host
from raymill.jobs.reach import endpoint_of
from raymill.runtime.errors import UnknownModel, Usage
from raymill.runtime.records import RemoteRecords
from raymill.runtime.spawn import driver_and_head

_COPIES = "runtime_resources"
"""Folder in which Ray keeps its copies of working directories."""


def served(session: Session, model: str, version: int | None) -> tuple[ModelSpec, Route | None]:
    """A served model, and the version named as it is in the registry, whatever its stage.

    Raises:
        UnknownModel: it is not served.
        UnknownVersion: the registry has no such version.
        SpecError: this process is not on the head's host, so that paths mean other files.
    """
    refuse_other_host(*driver_and_head(), str(session.home.root))
    endpoint = endpoint_of(session)
    models = {m.name: m for m in endpoint.models()}
    endpoint.close()
    if model not in models:
        raise UnknownModel(f"there is no model {model!r} on the endpoint: served are {sorted(models)}")
    if version is None:
        return models[model], None
    found = RemoteRecords().get(model, version)
    return models[model], Route(version=found.version, digest=found.digest, role=Role.LIVE, threshold=found.threshold)


def place_of(text: str, here: Path) -> str:
    """A path as workers see it, or the URL."""
    return text if "://" in text else str(here / text)


def lasting_place_of(text: str, here: Path) -> str:
    """The same of what is to stay.

    Raises:
        Usage: it would lie in the copy of a working directory that Ray makes for a submitted job, and deletes.
    """
    place = place_of(text, here)
    if _COPIES in Path(place).parts:
        raise Usage(
            f"--out {text} would lie in {place}, Ray's copy of the job's working directory, which Ray deletes: give a "
            "path that begins with /, or a URL"
        )
    return place
