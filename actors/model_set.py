"""The models of a replica: loaded, warmed up, swapped whole; those not asked for lately leave memory and come back.

Invariants
- A model changes over only when every version of its new configuration is loaded and has answered a trial batch;
  else it stays as it was, and the failure is told by `failures`.
- A model whose programs are away is still there to its callers: whoever asks waits until they are back.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raymill.actors.answering import version_of
from raymill.actors.attempts import Attempts
from raymill.actors.gently import beside_traffic
from raymill.actors.model_files import Data
from raymill.actors.models import FeatureReader, KnownOnly, LoadedModel, Program, away
from raymill.actors.residency import Resident, to_unload
from raymill.actors.rollout import ModelSpec, answer_shape, from_user_config, generation, odd_ones
from raymill.actors.wire import ARROW_TYPES, LATEST_AT
from raymill.runtime.errors import ModelError, RequestError, UnknownModel, UnknownVersion
from raymill.runtime.errors import Unavailable as NotThere

_log = logging.getLogger(__name__)

_TRIAL_ROWS = (1, 2, 64)
_MIB = 1 << 20
MAX_OUTPUTS = 4096
"""Numbers a row that a model may answer with: each answer is logged, and a batch of them is in memory at once."""


@dataclass
class ModelSet:
    """Every model of a replica; `apply` and `bring_back` run in threads of their own while the models answer."""

    fetch: Callable[[str], Data]
    """Program bytes by digest."""
    load: Callable[[Data], Program]
    """Bytes → program."""
    open_reader: Callable[[ModelSpec], FeatureReader | None]
    """Feature reader of a model with a plan."""
    measure: Callable[[Data], int] = len
    """Memory that the program of these bytes takes, about."""
    guard: Callable[[ModelSpec, str, Data], AbstractContextManager[None]] = lambda spec, digest, data: nullcontext()
    """Inside it the program of a digest is loaded; it raises where that must not be."""
    is_busy: Callable[[str], bool] = lambda name: False
    """Whether callers wait for a model."""
    models: dict[str, LoadedModel] = field(default_factory=dict)
    """What answers now; replaced whole."""
    failures: dict[str, dict[int, str]] = field(default_factory=dict)
    """Model → version → why it could not be loaded; that model stayed as it was."""
    generation: str = ""
    """Name of the configuration applied last."""
    attempts: Attempts = field(default_factory=Attempts)
    """What each version did lately."""
    used_s: dict[str, float] = field(default_factory=dict)
    """Model → when it was last asked, on the monotonic clock."""
    _coming: dict[str, LoadedModel] = field(default_factory=dict)
    """Models of the configuration that is being applied."""
    _sizes: dict[str, int] = field(default_factory=dict)
    """Digest → memory of its program."""
    _outputs: dict[str, int] = field(default_factory=dict)
    """Digest → numbers a row that its program answers with."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever loads."""

    def apply(self, config: Mapping[str, Any]) -> None:
        """Bring the models to `config`; what can not be loaded is told by `failures` and takes no traffic."""
        with self._lock:
            try:
                self._apply(config)
            finally:
                self._coming = {}

    def bring_back(self, name: str) -> None:
        """Load the programs of a model that were unloaded; nothing, if they are there or the model is not.

        Raises:
            RaymillError: they can not be had now.
        """
        with self._lock:
            model = self.models.get(name)
            if model is None or not model.is_away:
                return
            began = time.monotonic()
            programs = {r.version: self._program(model.spec, r.digest, again=True) for r in model.routes}
            self.models = {**self.models, name: replace(model, programs=programs)}
            _log.info("model %s is back in memory after %.2f s", name, time.monotonic() - began)

    def named(self, name: str) -> LoadedModel:
        """A served model.

        Raises:
            UnknownModel: there is none of that name.
        """
        model = self.models.get(name)
        if model is None:
            raise UnknownModel(f"there is no model {name!r} here: served are {sorted(self.models)}")
        return model

    def with_version(self, name: str, version: str | None) -> LoadedModel:
        """A served model, which has that version if one is named.

        Raises:
            UnknownModel, UnknownVersion: it is not here.
        """
        model = self.named(name)
        known = {*model.programs, *self.failures.get(name, {})}
        if version is not None and version_of(version) not in known:
            raise UnknownVersion(f"model {name!r} has no version {version!r} here: it has {sorted(model.programs)}")
        return model

    @property
    def lacks(self) -> bool:
        """Whether a model has nothing that answers, for what was to could not be loaded."""
        return any(name in self.failures and not model.ready for name, model in self.models.items())

    @property
    def is_ready(self) -> bool:
        """Whether every model has a version that answers, and is not ill."""
        return bool(self.models) and all(m.is_ready(None) for m in self.models.values())

    def asked(self, name: str) -> None:
        """A model is being asked now."""
        self.used_s[name] = time.monotonic()

    def residents(self) -> list[Resident]:
        """The models in memory."""
        found = []
        for name, model in {**self.models, **self._coming}.items():
            here = {r.digest for r in model.routes if model.programs[r.version] is not away}
            if here:
                size = sum(self._sizes.get(digest, 0) for digest in here)
                used_s = self.used_s.get(name, 0.0)
                found.append(Resident(name=name, size_bytes=size, used_s=used_s, busy=self.is_busy(name)))
        return found

    def _apply(self, config: Mapping[str, Any]) -> None:
        failures: dict[str, dict[int, str]] = {}
        for name, spec in from_user_config(config).items():
            before = self.models.get(name)
            loaded, failed = self._load(spec, before)
            if failed:
                failures[name] = failed
                _log.error("model %s: versions %s were not loaded", name, failed)
            if loaded is not None:
                self._coming[name] = before if failed and before is not None else loaded
            elif before is not None:
                self._coming[name] = before
        models = self._coming
        answering = [
            (name, r.version) for name, m in models.items() for r in m.routes if r.role.answers and r.weight > 0
        ]
        self.attempts.follow(answering)
        self.models, self.failures, self.generation = models, failures, generation(config)
        served = {r.digest for m in models.values() for r in m.routes}
        self._sizes = {digest: size for digest, size in self._sizes.items() if digest in served}
        self._outputs = {digest: k for digest, k in self._outputs.items() if digest in served}
        self.used_s = {name: at for name, at in self.used_s.items() if name in models}

    def _load(self, spec: ModelSpec, before: LoadedModel | None) -> tuple[LoadedModel | None, dict[int, str]]:
        try:
            same = before is not None and (before.spec.plan, before.spec.stores) == (spec.plan, spec.stores)
            reader = before.reader if before is not None and same else self._open(spec)
        except Exception as err:  # noqa: BLE001 - whatever a damaged store raises, the model must not take traffic
            why = f"its features can not be read: {type(err).__name__}: {err}"
            return None, {r.version: why for r in spec.routes}
        programs: dict[int, Program] = {}
        failed: dict[int, str] = {}
        for route in spec.routes:
            try:
                program = self._program(spec, route.digest)
                _check_outputs(spec, self._outputs[route.digest])
                programs[route.version] = program
            except NotThere:
                if before is None:  # a replica that starts without the registry has nothing to go on with
                    raise
                failed[route.version] = "the registry does not answer"
            except (Exception, SystemExit) as err:  # noqa: BLE001 - whatever a bad program raises, it must not take traffic
                failed[route.version] = f"{type(err).__name__}: {err}"
        outputs, odd = odd_ones(
            spec, {r.version: self._outputs[r.digest] for r in spec.routes if r.version in programs}
        )
        programs = {version: program for version, program in programs.items() if version not in odd}
        return LoadedModel(replace(spec, outputs=outputs), programs, reader, self.attempts), failed | odd

    def _program(self, spec: ModelSpec, digest: str, *, again: bool = False) -> Program:
        """The program of a digest: the one that is here, also as one that is away unless `again`; else loaded."""
        for model in (*self._coming.values(), *self.models.values()):
            for route in model.routes:
                held = model.programs[route.version]
                if route.digest == digest and not (again and held is away):
                    return held
        data = self.fetch(digest)
        size = self.measure(data)
        self._make_room(spec, size)
        with self.guard(spec, digest, data), beside_traffic():
            program, outputs = self._warm(spec, self.load(data))
        self._sizes[digest], self._outputs[digest] = size, outputs
        return program

    def _make_room(self, spec: ModelSpec, coming_bytes: int) -> None:
        models = {**self.models, **self._coming}
        # One budget for the replica: where its models say different ones, the largest.
        budget = max([spec.memory_mib, *(m.spec.memory_mib for m in models.values())]) * _MIB
        names = to_unload(self.residents(), budget_bytes=budget, coming_bytes=coming_bytes, keep=spec.name)
        for name in names:
            self._unload(name)
        if names:
            gc.collect()  # nets hold themselves by cycles
            _log.info("models %s left memory for %s", names, spec.name)

    def _unload(self, name: str) -> None:
        self._coming |= {n: m.unloaded() for n, m in self._coming.items() if n == name}
        if name in self.models:
            self.models = {**self.models, name: self.models[name].unloaded()}

    def _open(self, spec: ModelSpec) -> FeatureReader | None:
        """A reader that has its kernels compiled."""
        reader = self.open_reader(spec)
        if reader is not None:
            fields = [pa.field(c, ARROW_TYPES[spec.columns[c].dtype]) for c in spec.required]
            row = pa.table([pa.nulls(1, f.type) for f in fields], schema=pa.schema(fields))
            with suppress(RequestError):  # a required entity is refused: that was computed, too
                reader.vectors(row, np.full(1, LATEST_AT, dtype=np.int64))
        return reader

    def _warm(self, spec: ModelSpec, program: Program) -> tuple[Program, int]:
        """A trial: zeros and unknowns, several sizes; what answers them wrongly is refused. Tells the numbers a row.

        A model without a plan need not know what to do with unknowns: callers are then told, before it is asked.
        """
        known_only, outputs = False, 0
        for rows in _TRIAL_ROWS:
            x = np.zeros((rows, len(spec.inputs)), dtype=np.float32)
            p = program(x)
            outputs = outputs or (p.shape[1] if p.ndim == 2 else 1)
            _check_answer(p, rows, outputs)
            x[rows // 2 :] = np.nan
            try:
                _check_answer(program(x), rows, outputs)
            except Exception:  # what a user's program makes of unknowns may be anything
                if spec.plan is not None:
                    raise
                known_only = True
        return (KnownOnly(program) if known_only else program), outputs


def _check_outputs(spec: ModelSpec, outputs: int) -> None:
    if outputs > 1 and spec.plan is not None:
        raise ModelError(
            f"it answers with {outputs} numbers a row, and a pipeline's model with one, which threshold, gate and "
            "monitor weigh: serve it alone, `raymill serve FILE`"
        )
    if outputs > MAX_OUTPUTS:
        raise ModelError(f"it answers with {outputs} numbers a row, {MAX_OUTPUTS} may be: have it give those wanted")


def _check_answer(p: Any, rows: int, outputs: int) -> None:
    shape = answer_shape(rows, outputs)
    if p.shape != shape or p.dtype != np.float32 or not bool(np.isfinite(p).all()):
        raise ModelError(
            f"a trial batch of {rows} rows got {p.dtype}{list(p.shape)} {p[:2]}: not finite float32 {list(shape)}"
        )
