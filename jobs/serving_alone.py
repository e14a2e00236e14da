"""A model without a pipeline on a cluster's endpoint: registered, loaded by the replicas, given its stage, taken off.

A version takes traffic before the registry calls it live or canary, never after: one that does not load stays a
candidate, and what was served goes on. Every step may be done again.

The replica that comes up for it has a grant of the pool's scheduler, as a pipeline's have; what is put beside what is
served already needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from raymill.actors.endpoint import Endpoint, Placement
from raymill.actors.named_inputs import spec_alone
from raymill.actors.rollout import ModelSpec
from raymill.jobs.model_target import Target
from raymill.runtime.errors import Conflict, ModelError, RaymillError, UnknownModel, Usage
from raymill.runtime.messages import Granted, Lease, LeaseRequest, ModelVersion, Purpose, Stage


class Scheduler(Protocol):
    """The pool's scheduler, as far as it is needed here."""

    def grant(self, request: LeaseRequest) -> Granted:
        """Leases for replicas."""

    def leases(self, owner: str) -> list[Lease]:
        """What the owner holds."""

    def release(self, lease_ids: Sequence[str], reason: str) -> None:
        """Give back."""


OWNER = "serve"
"""Owner of the grant of replicas that no pipeline asked for."""
_BY = "raymill serve"


def put_up(
    target: Target, records: Any, endpoint: Endpoint, scheduler: Scheduler, placement: Placement, *, promote: bool
) -> ModelVersion:
    """Serve the target beside what is served already; the version that it is then.

    The first version of a name is live; another file under it becomes the next version, a canary, or live at once
    with `promote`.

    Raises:
        Usage: its inputs are not those of the versions that are served.
        Conflict: the name is a pipeline's, or the version was taken out before.
        LeaseError: the quota allows no replica.
        ModelError: the replicas can not load it; what was served goes on.
    """
    with endpoint.turn():
        served = endpoint.models()
        _check_fits(target, next((m for m in served if m.name == target.name), None), records.versions(target.name))
        mine = records.register(target.name, target.kind, target.data, None, "", {}, 0.5)
        stages = plan_stages(records.versions(target.name), mine.version, promote=promote)
        spec = spec_alone(target.name, target.inputs, stages)
        models = [m for m in served if m.name != target.name] + [spec]
        if served:
            endpoint.set_models(models)
        else:
            _deploy(endpoint, scheduler, models, placement)
        return _set_stages(records, stages, mine.version)


def take_off(model: str, endpoint: Endpoint, scheduler: Scheduler) -> list[str]:
    """Serve the model no longer; those that are served still. With the last one go the replicas and their grant.

    Its versions stay in the registry as they are: its file again, or another one, puts it back.

    Raises:
        UnknownModel: it is not served.
        Conflict: it is a pipeline's.
    """
    with endpoint.turn():
        served = endpoint.models()
        mine = next((m for m in served if m.name == model), None)
        if mine is None:
            raise UnknownModel(f"{model!r} is not served; served: {', '.join(m.name for m in served) or 'nothing'}")
        if mine.plan is not None:
            raise Conflict(f"{model!r} is the model of a pipeline, whose monitor counts on it: `raymill down` ends it")
        rest = [m for m in served if m.name != model]
        if rest:
            endpoint.set_models(rest)
        else:
            endpoint.delete()
            endpoint.forget()
            give_up_grant(scheduler, reason=f"{model} was the last model that was served")
        return [m.name for m in rest]


def bring_back(endpoint: Endpoint, scheduler: Scheduler, placement: Placement) -> tuple[list[str], list[str]]:
    """Serve again what was served when the cluster ended in a crash; the names, and those of pipelines' models.

    A pipeline's are brought back by its own run, with the monitor that they need.

    Raises:
        SpecError: what was served can not be read.
        LeaseError, ModelError, ClusterError: as of `put_up`; the next start tries again.
    """
    with endpoint.turn():
        if endpoint.models():
            return [], []
        found = endpoint.remembered()
        alone = [m for m in found if m.plan is None]
        if alone:
            _deploy(endpoint, scheduler, alone, placement)
        return [m.name for m in alone], [m.name for m in found if m.plan is not None]


def _deploy(endpoint: Endpoint, scheduler: Scheduler, models: list[ModelSpec], placement: Placement) -> None:
    """Bring the application up under a grant; nothing of both stays if that fails."""
    resources = {"CPU": placement.cpus, **placement.resources}
    count = placement.replicas
    wanted = LeaseRequest(owner=OWNER, purpose=Purpose.SERVING, count=count, min_count=1, resources=resources)
    granted = scheduler.grant(wanted)
    try:
        endpoint.deploy(models, replace(placement, replicas=len(granted.leases)))
    except RaymillError as err:
        if isinstance(err, ModelError):
            endpoint.delete()
        give_up_grant(scheduler, reason=f"its replicas did not come up: {err.message[:200]}")
        raise


def give_up_grant(scheduler: Scheduler, *, reason: str) -> None:
    """Release what replicas without a pipeline were granted; nothing where there is nothing."""
    if held := scheduler.leases(OWNER):
        scheduler.release([lease.lease_id for lease in held], reason)


def plan_stages(versions: Sequence[ModelVersion], version: int, *, promote: bool) -> list[ModelVersion]:
    """The versions as they are to be once `version` is served.

    Raises:
        Conflict: it was rejected, or it is retired and not to be promoted.
    """
    before = next(v for v in versions if v.version == version)
    live = next((v for v in versions if v.stage is Stage.LIVE), None)
    if before.stage is Stage.REJECTED:
        raise Conflict(f"{before.model}/{version} is this very file, and was rejected for good: serve another one")
    if before.stage is Stage.LIVE:
        return list(versions)
    wanted = Stage.LIVE if promote or live is None else Stage.CANARY
    if before.stage is Stage.RETIRED and wanted is Stage.CANARY:
        raise Conflict(f"{before.model}/{version} is this very file, and was retired: --promote makes it live again")
    gone = Stage.RETIRED if wanted is Stage.LIVE else Stage.REJECTED
    others = {wanted: gone, Stage.CANARY: Stage.REJECTED}
    return [replace(v, stage=wanted if v.version == version else others.get(v.stage, v.stage)) for v in versions]


def _set_stages(records: Any, stages: Sequence[ModelVersion], version: int) -> ModelVersion:
    """Bring the registry to these stages; gives the version."""
    for v in stages:
        if v.stage is Stage.REJECTED and v.version != version:
            records.reject(v.model, v.version, reason=f"version {version} took its place")
    mine = next(v for v in stages if v.version == version)
    change = records.promote if mine.stage is Stage.LIVE else records.start_canary
    changed: ModelVersion = change(mine.model, version, reason=_BY)
    return changed


def _check_fits(target: Target, served: ModelSpec | None, versions: Sequence[ModelVersion]) -> None:
    if (served is not None and served.plan is not None) or any(v.manifest is not None for v in versions):
        raise Conflict(f"{target.name!r} is the model of a pipeline: give this one another name by --name")
    if served is not None and served.inputs != target.inputs:
        raise Usage(
            f"the versions of {target.name!r} that are served take {len(served.inputs)} inputs "
            f"({', '.join(served.inputs[:5])}, …), this one {len(target.inputs)} ({', '.join(target.inputs[:5])}, …): "
            "give it another name by --name, or the same names by --features"
        )
