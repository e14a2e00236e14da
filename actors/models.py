"""A model inside a replica: its versions, asked in batches.

Invariants
- A batch sees one state of its model from beginning to end.
- One caller's bad row is that caller's error alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.attempts import Attempts, Batch
from raymill.actors.prediction_rows import Scored
from raymill.actors.rollout import ModelSpec, Role, Route, choose
from raymill.runtime.errors import ContractError, ModelError, RaymillError, RequestError, UnknownVersion
from raymill.runtime.errors import Unavailable as NotThere

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Program = Callable[[Floats], Floats]
"""[rows, n] float32 → probability [rows] float32, or [rows, k] of a model with k > 1 numbers a row."""


def away(x: Floats) -> Floats:
    """Stands for a program that is not in memory.

    Raises:
        Unavailable: always; whoever asks brings the model back first.
    """
    raise NotThere("the model is not in memory: send the request again in a moment")


@dataclass(frozen=True, slots=True)
class KnownOnly:
    """A program that has no answer where an input is unknown (NaN)."""

    program: Program

    def __call__(self, x: Floats) -> Floats:
        return self.program(x)


class FeatureReader(Protocol):
    """Looks feature vectors up, as of a moment."""

    def vectors(self, rows: pa.Table, at: npt.NDArray[np.int64]) -> Floats:
        """[rows, features] float32, NaN where unknown."""


class Log(Protocol):
    """Takes down what is answered."""

    def record(self, scored: Scored, shadows: list[Scored]) -> tuple[npt.NDArray[np.int64], Floats]:
        """Versions and answers to give: the logged ones for ids that are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The rows of one caller, with features to look up (`columns`) or ready (`x`)."""

    ids: list[str]
    at: npt.NDArray[np.int64]
    keys: list[str | None]
    texts: list[bytes | None]
    columns: pa.Table | None = None
    x: Floats | None = None
    pinned: int | None = None
    """Version that is to answer, whatever the weights."""
    together: bool = False
    """Whether one version answers all rows, chosen by the first id."""
    apart: bool = False
    """Whether each row is a caller of its own, who gets an answer where others get an error."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a caller gets for its rows."""

    ids: list[str]
    versions: npt.NDArray[np.int64]
    p: Floats
    """[rows], or [rows, k]."""
    errors: Mapping[int, RaymillError] = field(default_factory=dict)
    """Place of a row of callers apart → why it has no answer; what stands there otherwise means nothing."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch whose features are looked up."""

    batch: list[Question]
    found: list[tuple[Question, Floats]]
    """Questions that can be asked, with their vectors [rows, n]."""
    errors: dict[int, RaymillError]
    """Identity of a question → why it can not."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with every program that answers or shadows."""

    spec: ModelSpec
    programs: Mapping[int, Program]
    reader: FeatureReader | None
    attempts: Attempts = field(default_factory=Attempts)

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        """The versions that are loaded."""
        return tuple(r for r in self.spec.routes if r.version in self.programs)

    @cached_property
    def ready(self) -> bool:
        """Whether a version answers."""
        return any(r.role.answers and r.weight > 0 for r in self.routes)

    def is_ready(self, version: int | None) -> bool:
        """Whether it answers and is not ill, or that version of it is loaded."""
        return self.ready and not self.illness if version is None else version in self.programs

    @property
    def illness(self) -> str:
        """Why its answers are errors, where most of them are lately; empty: it is well."""
        live = [r for r in self.routes if r.role is Role.LIVE and r.weight > 0]
        return next(filter(None, (self.attempts.illness(self.spec.name, r.version) for r in live)), "")

    @cached_property
    def is_away(self) -> bool:
        """Whether a program of it is not in memory."""
        return any(p is away for p in self.programs.values())

    @cached_property
    def takes_unknown(self) -> bool:
        """Whether every version has an answer where an input is NaN."""
        return not any(isinstance(p, KnownOnly) for p in self.programs.values())

    def unloaded(self) -> LoadedModel:
        """The same model, its programs out of memory."""
        return replace(self, programs=dict.fromkeys(self.programs, away))

    def check(self, question: Question) -> None:
        """Refuse what can not be answered, before it waits.

        Raises:
            UnknownVersion: the pinned version is not served.
            Unavailable: no version answers.
        """
        if question.pinned is not None and question.pinned not in self.programs:
            raise UnknownVersion(
                f"model {self.spec.name!r} does not serve version {question.pinned}: it serves {sorted(self.programs)}"
            )
        if question.pinned is None and not self.ready:
            raise NotThere(f"model {self.spec.name!r} has no version that answers: promote one")

    def ask(self, batch: list[Question], log: Log) -> list[Answer | RaymillError]:
        """Answer a batch and log it; an answer or an error for each question, in order.

        Raises:
            Unavailable: its programs are not in memory.
        """
        return self.score([self.prepare(batch)], log)

    def prepare(self, batch: list[Question]) -> Prepared:
        """The first stage: features looked up.

        Raises:
            Unavailable: its programs are not in memory.
        """
        if self.is_away:
            away(np.empty(0, np.float32))
        found, errors = self._vectors(batch)
        fine = []
        for question, x in found:
            try:
                self.check(question)
                self._check_known(x)
                fine.append((question, x))
            except RaymillError as err:
                errors[id(question)] = err
        return Prepared(batch, fine, errors)

    def score(self, prepared: Sequence[Prepared], log: Log) -> list[Answer | RaymillError]:
        """The second stage, of batches that this model has prepared, together; as `ask`."""
        found = prepared[0].found if len(prepared) == 1 else [pair for one in prepared for pair in one.found]
        errors = {name: err for one in prepared for name, err in one.errors.items()}
        answers = self._score(found, log, errors) if found else {}
        return [answers.get(id(q)) or errors[id(q)] for one in prepared for q in one.batch]

    def _check_known(self, x: Floats) -> None:
        if not self.takes_unknown and bool(np.isnan(x).any()):
            raise ContractError(
                f"model {self.spec.name!r} has no answer where an input is unknown (null or NaN): send numbers only"
            )

    def _vectors(self, batch: list[Question]) -> tuple[list[tuple[Question, Floats]], dict[int, RaymillError]]:
        wanting = [q for q in batch if q.columns is not None]
        ready = [(q, q.x) for q in batch if q.x is not None]
        if not wanting:
            return ready, {}
        try:
            return ready + self._look_up(wanting), {}
        except RaymillError as err:
            if len(wanting) == 1:
                return ready, {id(wanting[0]): err}
        errors: dict[int, RaymillError] = {}
        for question in wanting:
            try:
                ready += self._look_up([question])
            except RaymillError as err:
                errors[id(question)] = err
        return ready, errors

    def _look_up(self, batch: list[Question]) -> list[tuple[Question, Floats]]:
        if self.reader is None:
            raise RequestError(
                f"model {self.spec.name!r} has no features to look up: "
                f"send ready vectors to /v2/models/{self.spec.name}/infer"
            )
        tables = [q.columns for q in batch]
        rows = tables[0] if len(tables) == 1 else pa.concat_tables(tables).combine_chunks()
        x = self.reader.vectors(rows, np.concatenate([q.at for q in batch]))
        edges = np.cumsum([len(q) for q in batch])[:-1]
        return list(zip(batch, np.split(x, edges), strict=True))

    def _score(
        self, found: list[tuple[Question, Floats]], log: Log, errors: dict[int, RaymillError]
    ) -> dict[int, Answer]:
        x = found[0][1] if len(found) == 1 else np.concatenate([x for _, x in found])
        routes, questions = self.routes, [q for q, _ in found]
        # A caller's rows stand or fall together.
        callers: list[int] = []
        pinned: list[bool] = []
        for q in questions:
            callers += [1] * len(q) if q.apart else [len(q)]
            pinned += [q.pinned is not None] * (len(callers) - len(pinned))
        batch = Batch(
            spec=self.spec,
            routes=routes,
            programs=self.programs,
            x=x,
            rows=callers,
            pinned=pinned,
            chosen=self._choose(questions, routes),
        )
        self.attempts.compute(batch)
        versions, p = np.array([r.version for r in routes], dtype=np.int64)[batch.chosen], batch.p
        scored = self._scored(questions, versions, _roles(routes, batch.chosen), x, p)
        if not batch.errors:
            versions, p = log.record(scored, self._shadows(scored))
        elif len(keep := np.flatnonzero(np.repeat([i not in batch.errors for i in range(len(callers))], callers))):
            scored = scored.take(keep.tolist())
            versions[keep], p[keep] = log.record(scored, self._shadows(scored))
        return self._answers(questions, batch, versions, p, errors)

    def _answers(
        self,
        questions: list[Question],
        batch: Batch,
        versions: npt.NDArray[np.int64],
        p: Floats,
        errors: dict[int, RaymillError],
    ) -> dict[int, Answer]:
        answers, row, caller = {}, 0, 0
        for q in questions:
            callers, end = len(q) if q.apart else 1, row + len(q)
            failed = {}
            if batch.errors:
                failed = {i: batch.errors[caller + i] for i in range(callers) if caller + i in batch.errors}
            if failed and not q.apart:
                errors[id(q)] = failed[0]
            else:
                answers[id(q)] = Answer(q.ids, versions[row:end], p[row:end], failed)
            row, caller = end, caller + callers
        return answers

    def _choose(self, questions: list[Question], routes: tuple[Route, ...]) -> npt.NDArray[np.int64]:
        ids: list[str] = []
        rows: list[int] = []  # how many rows each of these ids decides for
        if len(routes) == 1:
            return np.zeros(sum(map(len, questions)), dtype=np.int64)
        for q in questions:
            if q.together or q.pinned is not None:
                ids.append(q.ids[0])
                rows.append(len(q))
            else:
                ids += q.ids
                rows += [1] * len(q)
        # Where no version answers every row is pinned: `check` saw to it.
        chosen = np.repeat(choose(ids, routes) if self.ready else np.zeros(len(ids), dtype=np.int64), rows)
        if any(q.pinned is not None for q in questions):
            place = {r.version: i for i, r in enumerate(routes)}
            at = 0
            for q in questions:
                if q.pinned is not None:
                    chosen[at : at + len(q)] = place[q.pinned]
                at += len(q)
        return chosen

    def _run(self, route: Route, x: Floats) -> Floats:
        try:
            return self.programs[route.version](x)
        except (RuntimeError, ValueError, TypeError) as err:
            raise ModelError(f"version {route.version} of model {self.spec.name!r} failed: {err}") from err

    def _shadows(self, answered: Scored) -> list[Scored]:
        found = []
        for route in (r for r in self.routes if r.role is Role.SHADOW):
            try:
                p = self._run(route, answered.x)
                if p.shape != answered.p.shape:
                    raise ModelError(f"version {route.version} answers {list(p.shape)} for {len(answered.ids)} rows")
            except ModelError as err:  # a shadow's failure is nobody's answer
                _log.warning("shadow: %s", err)
                continue
            versions = np.full(len(p), route.version, dtype=np.int64)
            found.append(replace(answered, versions=versions, roles=[str(route.role)] * len(p), p=p))
        return found

    def _scored(
        self, questions: list[Question], versions: npt.NDArray[np.int64], roles: list[str], x: Floats, p: Floats
    ) -> Scored:
        first = questions[0]
        alone = len(questions) == 1
        return Scored(
            model=self.spec.name,
            ids=first.ids if alone else list(chain.from_iterable(q.ids for q in questions)),
            versions=versions,
            roles=roles,
            at=first.at if alone else np.concatenate([q.at for q in questions]),
            keys=first.keys if alone else list(chain.from_iterable(q.keys for q in questions)),
            texts=first.texts if alone else list(chain.from_iterable(q.texts for q in questions)),
            x=x,
            p=p,
        )


def _roles(routes: Sequence[Route], chosen: npt.NDArray[np.int64]) -> list[str]:
    if len(routes) == 1:
        return [str(routes[0].role)] * len(chosen)
    return [str(routes[i].role) for i in chosen.tolist()]
