"""Computes rows by the versions chosen for them, and answers in a canary's place where it fails; counts both.

Invariants
- A version that fails (it raises, or an answer is not finite) costs no caller an answer, as long as the live version
  has one: its rows are computed by that, and are logged as that version's. Who pinned the version is told instead.
- A canary that has to go by what it did in this replica alone gets no more rows here, at once; the actor `rollouts`
  then takes it from all.
- One caller's bad row is that caller's error alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from raymill.actors.rollout import ModelSpec, Role, Route, answer_shape
from raymill.actors.version_health import Tally, illness, slow_s, verdict
from raymill.runtime.errors import ContractError, ModelError, RaymillError

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
WINDOW_S = 60.0
"""Wall time over which a version is judged."""
_SLICES = 6
_SLICE_S = WINDOW_S / _SLICES
_ORDINARY = 1e6
"""Inputs up to this size must get a finite answer; beyond, an overflow is the caller's doing."""


@dataclass(kw_only=True)
class Batch:
    """Rows with the version chosen for each; `compute` fills in the rest."""

    spec: ModelSpec
    routes: Sequence[Route]
    programs: Mapping[int, Callable[[Floats], Floats]]
    x: Floats
    rows: Sequence[int]
    """Rows of each question."""
    pinned: Sequence[bool]
    """Whether a question named its version."""
    chosen: Ints
    """Place in `routes` for each row; where a version fails it becomes that of the live one."""
    p: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    """Answers, in the form of `blank`; those of questions in `errors` mean nothing."""
    errors: dict[int, RaymillError] = field(default_factory=dict)
    """Place of a question → why it has no answer."""

    @cached_property
    def edges(self) -> Ints:
        """Where each question's rows begin, and the end."""
        return np.cumsum([0, *self.rows])

    def questions(self, rows: npt.NDArray[np.bool_]) -> list[int]:
        """Places of the questions that one of these rows belongs to."""
        found = np.searchsorted(self.edges, np.flatnonzero(rows), side="right") - 1
        return list(dict.fromkeys(found.tolist()))

    def span(self, question: int) -> slice:
        """Rows of a question."""
        return slice(int(self.edges[question]), int(self.edges[question + 1]))

    def blank(self) -> Floats:
        """Room for the answers."""
        return np.empty(answer_shape(len(self.x), self.spec.outputs), dtype=np.float32)


class Attempts:
    """The versions of all models of a replica: what they did lately, and which of them get no rows here any more."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._counts: dict[tuple[str, int], _Counts] = {}
        self.benched: dict[tuple[str, int], str] = {}
        """(model, version) → why it gets no rows in this replica."""

    def follow(self, answering: Iterable[tuple[str, int]]) -> None:
        """From now on these (model, version) answer; one that did not before begins anew."""
        names = set(answering)
        for name, counts in list(self._counts.items()):
            if name not in names:
                counts.answers = False
        for name in names:
            if name not in self._counts or not self._counts[name].answers:
                self._counts[name] = _Counts()
        self.benched = {k: why for k, why in self.benched.items() if k in names}

    def tallies(self) -> dict[str, dict[int, Tally]]:
        """Model → version → what it did in the last `WINDOW_S`; those that answer no more too, until they age out."""
        now_s = self._clock()
        found: dict[str, dict[int, Tally]] = {}
        for (model, version), counts in list(self._counts.items()):
            tally = counts.tally(now_s)
            if counts.answers or tally.calls:
                found.setdefault(model, {})[version] = tally
            else:
                self._counts.pop((model, version), None)
        return found

    def illness(self, model: str, version: int) -> str:
        """Why a live version is ill, by the last `WINDOW_S`; empty: it is well."""
        counts = self._counts.get((model, version))
        return "" if counts is None else illness(counts.tally(self._clock()))

    def benched_by_model(self) -> dict[str, dict[int, str]]:
        """Model → version → why it gets no rows in this replica."""
        found: dict[str, dict[int, str]] = {}
        for (model, version), why in list(self.benched.items()):
            found.setdefault(model, {})[version] = why
        return found

    def compute(self, batch: Batch) -> None:
        """Fill in answers and errors."""
        if len(batch.routes) == 1:
            self._compute_all(batch)
            return
        batch.p = batch.blank()
        stable = _stable(batch.routes)
        if self.benched and stable is not None:
            self._leave_out_benched(batch, stable)
        first = int(batch.chosen[0])
        if bool((batch.chosen == first).all()) and stable in (first, None):
            self._compute_last(batch, first)
            return
        for place in np.unique(batch.chosen).tolist():
            if stable is None:
                self._compute_last(batch, place)
            elif place != stable:
                self._try(batch, place, stable)
        if stable is not None and bool((batch.chosen == stable).any()):
            self._compute_last(batch, stable)

    def _leave_out_benched(self, batch: Batch, stable: int) -> None:
        places = [i for i, r in enumerate(batch.routes) if (batch.spec.name, r.version) in self.benched and i != stable]
        for question in batch.questions(np.isin(batch.chosen, places)):
            if not batch.pinned[question]:
                rows = batch.chosen[batch.span(question)]
                rows[np.isin(rows, places)] = stable

    def _try(self, batch: Batch, place: int, stable: int) -> None:
        """Let a version that is not the stable one compute its rows; those it fails on become the stable one's."""
        rows, route = batch.chosen == place, batch.routes[place]
        why: RaymillError
        try:
            batch.p[rows] = self._run(batch, route, batch.x[rows])
            failed, why = rows & ~_is_finite(batch.p), _not_finite(batch.spec)
        except ModelError as err:
            failed, why = rows, err
        hit = batch.questions(failed) if failed.any() else []
        taken_over = [q for q in hit if not batch.pinned[q]]
        batch.errors |= {q: why for q in hit if batch.pinned[q]}
        for question in taken_over:
            mine = batch.chosen[batch.span(question)]
            mine[mine == place] = stable
        if taken_over and self._stable_answers(batch, taken_over, stable):
            self._of(batch, route).failed(self._clock(), why.message)
            _log.warning("version %d of %s failed, another answered its rows: %s", *_named(batch, route), why.message)
        self._bench_if_ill(batch, route, stable)

    def _stable_answers(self, batch: Batch, questions: list[int], stable: int) -> bool:
        """Whether the stable version has an answer where the other had none: else it is the rows."""
        x = np.concatenate([batch.x[batch.span(q)] for q in questions])
        try:
            return bool(np.isfinite(batch.programs[batch.routes[stable].version](x)).all())
        except Exception:  # noqa: BLE001 - edge of a user's program, as in `_run`
            return False

    def _compute_all(self, batch: Batch) -> None:
        """All rows, by the only version: as `_compute_last`, which takes longer than a small model does."""
        try:
            batch.p = self._run(batch, batch.routes[0], batch.x)
            if math.isfinite(float(batch.p.sum())):  # a sum that overflows is looked at closely, too
                return
            batch.p = np.array(batch.p)
        except ModelError as err:
            batch.p = batch.blank()
            self._each_alone(batch, batch.routes[0], np.ones(len(batch.x), np.bool_), err)
        self._look_at(batch, batch.routes[0], ~_is_finite(batch.p))

    def _compute_last(self, batch: Batch, place: int) -> None:
        """Rows of the version after which none comes; several questions are asked one by one if together they fail."""
        rows, route = batch.chosen == place, batch.routes[place]
        for question in batch.errors:
            rows[batch.span(question)] = False
        if not rows.any():
            return
        try:
            batch.p[rows] = self._run(batch, route, batch.x if bool(rows.all()) else batch.x[rows])
        except ModelError as err:
            self._each_alone(batch, route, rows, err)
        self._look_at(batch, route, ~_is_finite(batch.p) & rows)

    def _look_at(self, batch: Batch, route: Route, bad: npt.NDArray[np.bool_]) -> None:
        """Rows whose answer is not finite are errors; where the inputs were ordinary, the version's failure too."""
        if bad.any():
            if (np.isnan(batch.x[bad]) | (np.abs(batch.x[bad]) <= _ORDINARY)).all(axis=1).any():
                self._of(batch, route).failed(self._clock(), "its answer to ordinary inputs is not finite")
            for question in batch.questions(bad):
                batch.errors.setdefault(question, _not_finite(batch.spec))

    def _each_alone(self, batch: Batch, route: Route, rows: npt.NDArray[np.bool_], why: ModelError) -> None:
        questions = batch.questions(rows)
        failed: dict[int, RaymillError] = {}
        for question in questions:
            mine = np.zeros(len(rows), dtype=bool)
            mine[batch.span(question)] = rows[batch.span(question)]
            try:
                if len(questions) == 1:
                    raise why
                batch.p[mine] = self._run(batch, route, batch.x[mine])
            except ModelError as err:
                failed[question] = err
                batch.p[mine] = 0  # no answer, and none that is not finite
        batch.errors |= failed
        if len(failed) == len(questions):
            calls = 1 if len(questions) == 1 else 1 + len(questions)
            self._of(batch, route).failed(self._clock(), why.message, calls)
            _log.error("version %d of %s failed: %s", *_named(batch, route), why.message)

    def _run(self, batch: Batch, route: Route, x: Floats) -> Floats:
        begun = self._clock()
        try:
            p = batch.programs[route.version](x)
            if p.shape != answer_shape(len(x), batch.spec.outputs):
                raise ValueError(f"{len(x)} rows got answers of shape {list(p.shape)}")
            return p
        except Exception as err:  # whatever a program raises is the version's failure
            raise ModelError(f"version {route.version} of model {batch.spec.name!r} failed: {err}") from err
        finally:
            now_s = self._clock()
            self._of(batch, route).called(now_s, len(x), now_s - begun, now_s - begun > slow_s(batch.spec.p99_ms))

    def _of(self, batch: Batch, route: Route) -> _Counts:
        name = (batch.spec.name, route.version)
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = _Counts()
        return counts

    def _bench_if_ill(self, batch: Batch, route: Route, stable: int) -> None:
        name, now_s = (batch.spec.name, route.version), self._clock()
        counts = self._of(batch, route)
        if name in self.benched or not counts.suspect:
            return
        counts.suspect = False
        why = verdict(counts.tally(now_s), self._of(batch, batch.routes[stable]).tally(now_s), canary=True)
        if why:
            self.benched[name] = why
            _log.error("version %d of %s gets no more rows here: %s", *_named(batch, route), why)


class _Counts:
    """Counts of one version, in slices of the window."""

    __slots__ = ("_slices", "answers", "suspect")

    def __init__(self) -> None:
        self.answers = True
        self.suspect = False
        """Whether it failed or was slow since it was last judged."""
        self._slices: deque[_Slice] = deque([_Slice(-_SLICES)], maxlen=_SLICES)

    def called(self, now_s: float, rows: int, seconds: float, slow: bool) -> None:
        now = self._slice(now_s)
        now.calls += 1
        now.slow += slow
        now.rows += rows
        now.seconds += seconds
        self.suspect = self.suspect or slow

    def failed(self, now_s: float, why: str, calls: int = 1) -> None:
        now = self._slice(now_s)
        now.failed += calls
        now.why = why
        self.suspect = True

    def tally(self, now_s: float) -> Tally:
        oldest = int(now_s / _SLICE_S) - _SLICES
        return sum((s.tally() for s in list(self._slices) if s.number > oldest), Tally())

    def _slice(self, now_s: float) -> _Slice:
        number, now = int(now_s / _SLICE_S), self._slices[-1]
        if now.number != number:
            now = _Slice(number)
            self._slices.append(now)
        return now


@dataclass(slots=True)
class _Slice:
    number: int
    calls: int = 0
    failed: int = 0
    slow: int = 0
    rows: int = 0
    seconds: float = 0.0
    why: str = ""

    def tally(self) -> Tally:
        """As the window adds it up; a failure that is counted after its slice began is no more than its calls."""
        return Tally(
            calls=self.calls,
            failed=min(self.failed, self.calls),
            slow=self.slow,
            rows=self.rows,
            seconds=self.seconds,
            why=self.why,
        )


def _stable(routes: Sequence[Route]) -> int | None:
    """Place of the version that answers in another's place: the live one with the largest share."""
    live = [i for i, r in enumerate(routes) if r.role is Role.LIVE and r.weight > 0]
    return max(live, key=lambda i: routes[i].weight, default=None)


def _is_finite(p: Floats) -> npt.NDArray[np.bool_]:
    """[rows] whether all that a row is answered with is finite."""
    finite: npt.NDArray[np.bool_] = np.isfinite(p)
    return finite if finite.ndim == 1 else np.logical_and.reduce(finite, axis=1)


def _not_finite(spec: ModelSpec) -> ContractError:
    return ContractError(
        f"model {spec.name!r} has no finite answer for a row of this request: its inputs are too large"
    )


def _named(batch: Batch, route: Route) -> tuple[int, str]:
    return route.version, batch.spec.name
