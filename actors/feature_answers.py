"""What `POST /raymill/features/{model}` answers: vectors by name, and on request what they rest on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors import wire
from raymill.actors.models import LoadedModel
from raymill.runtime.errors import RequestError

if TYPE_CHECKING:  # it brings the kernels along, which a model without features does not need
    from raymill.actors.online_reader import LookUp

AGE = "age_us:"
"""Begins the name of a column with a view's ages."""


@runtime_checkable
class LooksUp(Protocol):
    """A reader that can tell how old what it gives is."""

    def look_up(self, rows: pa.Table, at: npt.NDArray[np.int64]) -> LookUp:
        """Vectors, and the ages of what they rest on."""


def wants_ages(query: Mapping[str, str]) -> bool:
    """Whether the request asks for ages.

    Raises:
        RequestError: it says so in other words than are known.
    """
    told = query.get("ages", "0")
    if told not in ("0", "1"):
        raise RequestError(f"ages={told!r}: give ages=1, or leave it out")
    return told == "1"


def features_of(model: LoadedModel, rows: wire.Rows, ages: bool) -> pa.Table:
    """`id`, `at`, a float32 column a feature: NaN where unknown.

    With `ages` features are null where unknown, and there is a column `age_us:<view>` for every view of events: µs
    from its newest event to the row's moment, null where the store has none.

    Raises:
        RequestError: the model has no features to look up, or no store that they come from.
    """
    name, reader = model.spec.name, model.reader
    if reader is None:
        raise RequestError(f"model {name!r} has no features to look up")
    columns = {"id": pa.array(rows.ids), "at": pa.array(rows.at).cast(wire.TIMESTAMP)}
    if not ages:
        x = reader.vectors(rows.columns, rows.at)
        columns |= {n: pa.array(np.ascontiguousarray(x[:, j])) for j, n in enumerate(model.spec.inputs)}
        return pa.table(columns)
    if not isinstance(reader, LooksUp):
        raise RequestError(f"model {name!r} gets its inputs with the request: they have no ages")
    found = reader.look_up(rows.columns, rows.at)
    for j, feature in enumerate(model.spec.inputs):
        columns[feature] = pa.array(np.ascontiguousarray(found.x[:, j]), mask=found.missing[:, j])
    for j, view in enumerate(found.views):
        columns[AGE + view] = pa.array(np.ascontiguousarray(found.ages[:, j]), mask=found.ages[:, j] < 0)
    return pa.table(columns)
