"""Served vectors beside what any state of the lake gives for the same rows, and why some of them differ.

Few states are read: those in which rows that differ were served, most rows first, and only as many before them as are
needed to find the value that was served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from raymill.actors.consistency import Cause, Explained, Vectors, agree, explain, number
from raymill.actors.evaluate import Ints
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.online import OnlineReader
from raymill.actors.point_in_time import join
from raymill.actors.served import LakeStates, at_of, events_of, instant, reach, request_rows, vectors
from raymill.runtime.errors import RequestError, SpecError, Unavailable
from raymill.runtime.stores import Online

STATES = 24
"""States of the lake that one check reads, beside the present one, at most."""
LOOK_BACK = 8
"""Batches of every source by which the online store may have lagged and still be found stale."""


@dataclass(frozen=True, eq=False)
class Definitions:
    """A pipeline's features as one training set had them."""

    text: str
    """The plan as JSON."""
    hashes: dict[str, str]
    """Feature → content hash of its definition."""

    @cached_property
    def plan(self) -> FeaturePlan:
        """The plan.

        Raises:
            SpecError: it calls a Python function that is not here, or is another one here.
        """
        return FeaturePlan.from_json(self.text)


class ServedRows:
    """Served rows of one set of definitions, and what any state of the lake gives for them."""

    def __init__(
        self, stores: tuple[Lake, Online | None], plan: FeaturePlan, part: pa.Table, pinned: dict[str, int]
    ) -> None:
        """`stores` are the lake and the place of the online store (None: it is not to be asked)."""
        self.lake, self._online = stores
        self.plan, self.part, self.pinned = plan, part, pinned
        self.rows = request_rows(part["row"].to_pylist(), plan)
        self.at: Ints = at_of(part)
        self.wall_s = part["wall_s"].to_numpy()
        self.served: Vectors = vectors(part["x"], len(plan.names))

    def has(self, versions: dict[str, int | None]) -> bool:
        """Whether the lake still has these versions: files of old ones may have been vacuumed."""
        return all(version is None or self.lake.is_whole(source, version) for source, version in versions.items())

    def joined(
        self, versions: dict[str, int | None], chosen: Ints | None, plan: FeaturePlan | None = None
    ) -> tuple[Vectors, dict[str, pa.Table]]:
        """Vectors of the chosen rows (None: all) from those versions, and the rows of the sources they are from.

        For all rows the sources are read from their beginning, so that one can say who was never seen.
        """
        plan = plan or self.plan
        at = self.at if chosen is None else self.at[chosen]
        first, last = int(at.min()), int(at.max())
        tables = {}
        for source in plan.sources:
            version = versions.get(source)
            since = None if chosen is None else reach(plan, source, first)
            known = self.pinned[source] if version is None else version
            table = events_of(self.lake, plan, source, known, last, since)
            tables[source] = table.slice(0, 0) if version is None else table
        rows = self.rows if chosen is None else self.rows.take(pa.array(chosen))
        return join(rows, plan, tables, at=at), tables

    def online(self, chosen: Ints) -> Vectors | None:
        """What the online store gives for the chosen rows now; None: it can not be asked that any more."""
        if self._online is None:
            return None
        reader = OnlineReader(self._online, self.plan)
        try:
            return reader.vectors(self.rows.take(pa.array(chosen)), self.at[chosen])
        except (RequestError, Unavailable):  # the moment is older than what it keeps, or it holds another plan
            return None
        finally:
            reader.close()


class Mismatches:
    """The rows of a sample that differ, explained."""

    def __init__(self, there: ServedRows, now: Vectors, states: LakeStates, defined: list[Definitions]) -> None:
        """The first of `defined` is what must have been served, the others are the pipeline's other definitions."""
        self._there, self._now, self._states = there, now, states
        self._defined, *self._others = defined
        self._cut_short = False

    def explained(self, wrong: Ints, states_left: list[int]) -> Iterator[tuple[Ints, Explained, dict[str, str]]]:
        """(rows, their cells, feature → one mismatch in words), the rows that were served in one state together."""
        state_of = [self._states.at(w) for w in self._there.wall_s[wrong]]
        for state, _ in Counter(state_of).most_common():
            rows = wrong[[s == state for s in state_of]]
            if states_left[0] <= 0 or not self._there.has(self._states.versions(state)):
                yield rows, self._unexamined(rows), {}
                continue
            states_left[0] -= 1
            self._cut_short = False
            then = self._there.joined(self._states.versions(state), rows)[0]
            earlier = self._earlier(state, rows, states_left)
            found = explain(self._there.served[rows], self._now[rows], then, earlier)
            if self._cut_short:  # an earlier state that was not looked at may have given it: nobody is accused
                found.codes[found.codes == number(Cause.CODE)] = number(Cause.UNEXAMINED)
            yield rows, found, self._whys(rows, found, state)

    def _earlier(self, state: tuple[int, ...], rows: Ints, states_left: list[int]) -> Iterator[Vectors]:
        for steps in range(1, LOOK_BACK + 1):
            before = self._states.before(state, steps)
            if before is None:
                return
            if states_left[0] <= 0 or not self._there.has(self._states.versions(before)):
                self._cut_short = True
                return
            states_left[0] -= 1
            yield self._there.joined(self._states.versions(before), rows)[0]

    def _unexamined(self, rows: Ints) -> Explained:
        same = agree(self._there.served[rows], self._now[rows])
        return Explained(np.where(same, 0, number(Cause.UNEXAMINED)).astype(np.int8), np.zeros(same.shape, np.int16))

    def _whys(self, rows: Ints, found: Explained, state: tuple[int, ...]) -> dict[str, str]:
        whys = {}
        for j, name in enumerate(self._there.plan.names):
            for cause in (Cause.CODE, Cause.STALE, Cause.LATE_ROW):
                cells = np.flatnonzero(found.codes[:, j] == number(cause))
                if len(cells):
                    i = int(cells[0])
                    reason = self._reason(cause, name, rows[i : i + 1], int(found.steps[i, j]), state)
                    whys[name] = f"{self._values(rows[i], j)}; {reason}"
                    break
        return whys

    def _values(self, row: int, j: int) -> str:
        there = self._there
        moment = instant(int(there.at[row])).isoformat().replace("+00:00", "Z")
        served, lake = (float(v[row, j]) for v in (there.served, self._now))
        return f"prediction {there.part['id'][row].as_py()} at {moment}: served {served:.9g}, the lake gives {lake:.9g}"

    def _reason(self, cause: Cause, name: str, row: Ints, steps: int, state: tuple[int, ...]) -> str:
        if cause is Cause.CODE:
            return self._code(name, row, state)
        source = _source_of(self._there.plan, name)
        version = self._states.versions(state)[source]
        if cause is Cause.STALE:
            batch = self._states.batch(source, state, steps)
            return (
                f"the online store did not have batch {batch!r} of {source!r}, which the lake held when it was served"
            )
        return (
            f"{source!r} was at version {version} then and is at {self._states.pinned[source]} now: a row that was "
            f"known by the moment of the prediction came after it was served"
        )

    def _code(self, name: str, row: Ints, state: tuple[int, ...]) -> str:
        """Which other definition gives the value that was served, if one does."""
        served = self._there.served[row, self._there.plan.names.index(name)]
        mine = self._defined.hashes.get(name, "")
        for other in self._others:
            theirs = other.hashes.get(name, mine)
            if theirs == mine or not self._is_computable(other):
                continue
            given = self._there.joined(self._states.versions(state), row, other.plan)[0]
            if agree(served[:, None], given[:, [other.plan.names.index(name)]]).all():
                return f"definition {theirs} was served, the model was trained with {mine}"
        online = self._there.online(row)
        if online is not None and agree(served[:, None], online[:, [self._there.plan.names.index(name)]]).all():
            return "the online store gives it, and no state of the lake does: its records are not those of the lake"
        return (
            f"no state of the lake gives it under definition {mine}: other code, or another record in the online store"
        )

    def _is_computable(self, other: Definitions) -> bool:
        """Whether another definition can be tried on these rows: here, from the columns and sources that there are."""
        try:
            plan = other.plan
        except SpecError:  # a Python function of it is gone or was changed: it stays a candidate that nobody can try
            return False
        columns, sources = set(self._there.rows.column_names), set(self._there.plan.sources)
        return set(plan.request_columns) <= columns and set(plan.sources) <= sources


def _source_of(plan: FeaturePlan, feature: str) -> str:
    return next(v.source.name for v in plan.event_views if v.name == feature.partition(".")[0])
