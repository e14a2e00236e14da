"""A model that is served without a pipeline: its inputs come with the request, by name or as ready vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.rollout import ColumnForm, ModelSpec, reroute
from raymill.runtime.errors import SpecError
from raymill.runtime.messages import ModelVersion

ANSWER = "prediction"
"""Name of such a model's answer."""
RESERVED = ("id", "at")
"""Fields of a request's row that are no inputs."""


def spec_alone(name: str, inputs: Sequence[str], versions: Iterable[ModelVersion]) -> ModelSpec:
    """The served model: rows carry its inputs by name, each a number or null; errors as `check_names`."""
    check_names(inputs)
    columns = {n: ColumnForm("float64", True) for n in inputs}
    bare = ModelSpec(name=name, label=ANSWER, inputs=tuple(inputs), routes=(), columns=columns, required=tuple(inputs))
    return reroute(bare, versions)


def check_names(inputs: Sequence[str]) -> None:
    """Refuse names that rows can not carry.

    Raises:
        SpecError: an input has no name, or one of a row's own fields, or two have the same.
    """
    twice = sorted({n for n in inputs if list(inputs).count(n) > 1})
    taken = sorted({n for n in inputs if n in RESERVED})
    if twice or taken or "" in inputs:
        why = "there are two of each" if twice else "a row has such fields of its own" if taken else "one has no name"
        raise SpecError(
            f"inputs {twice or taken or list(inputs)} can not come by name ({why}): give others by --features a,b,c"
        )


class NamedInputs:
    """Reads the vectors out of the rows themselves."""

    def vectors(self, rows: pa.Table, at: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """[rows, inputs] float32 in the columns' order; NaN where null."""
        x = np.empty((rows.num_rows, rows.num_columns), dtype=np.float32)
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and its answer is refused
            for j, column in enumerate(rows.columns):
                x[:, j] = column.to_numpy(zero_copy_only=False)
        return x
