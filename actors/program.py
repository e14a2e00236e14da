"""A trained model as a program: imputation, standardisation, net and sigmoid in one `torch.export` archive.

A program takes [rows, n] float32, where what is not finite counts as unknown, and returns [rows] float32
probabilities (one that was made elsewhere may have several numbers a row, [rows, k]); the number of rows is free. It
loads without the user's class. The logistic baseline is a program of the same kind, so that whoever runs one runs the
other.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raymill.actors.model_files import Data, Kind, Loaded, numbers_of
from raymill.actors.scores import auc, log_loss
from raymill.actors.training_data import columns_of
from raymill.runtime.errors import ModelError, SpecError, TrainingError
from raymill.runtime.messages import EpochMetrics, TrainingSet, TrainResult

F32 = npt.NDArray[np.float32]
Program = Callable[[F32], F32]

CLIP = 10.0
"""Standardised inputs are cut at this many standard deviations: any finite input gives a finite answer."""
_EXAMPLE_ROWS = 4
"""Rows of the example that `torch.export` traces; not 0 or 1, which it would take for fixed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnStats:
    """What standardisation knows of the training rows; unknown values are left out of it."""

    mean: tuple[float, ...]
    """Mean of each column."""
    std: tuple[float, ...]
    """Standard deviation of each column, 1 where it does not vary."""
    sometimes_missing: tuple[int, ...]
    """Columns that had unknown values; each gives the net one input more, 1 where unknown."""

    @property
    def inputs(self) -> int:
        """Inputs of the net."""
        return len(self.mean) + len(self.sometimes_missing)


def measure(x: F32) -> ColumnStats:
    """Statistics of [rows, n] float32, column by column (a copy of one column at a time)."""
    mean, std, missing = [], [], []
    for j in range(x.shape[1]):
        column = x[:, j].astype(np.float64)
        known = column[np.isfinite(column)]
        spread = float(known.std()) if known.size else 0.0
        mean.append(float(known.mean()) if known.size else 0.0)
        std.append(spread if spread > 0 else 1.0)
        if known.size < column.size:
            missing.append(j)
    return ColumnStats(mean=tuple(mean), std=tuple(std), sometimes_missing=tuple(missing))


class Prepare(torch.nn.Module):
    """[rows, n] as they come → [rows, `stats.inputs`]: standardised, unknown as 0, then the missing indicators."""

    def __init__(self, stats: ColumnStats) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(stats.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(stats.std, dtype=torch.float32))
        self.register_buffer("flagged", torch.tensor(stats.sometimes_missing, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        known = torch.isfinite(x)
        z = torch.where(known, (torch.where(known, x, self.mean) - self.mean) / self.std, 0.0).clamp(-CLIP, CLIP)
        return torch.cat([z, (~known).index_select(1, self.flagged).to(z.dtype)], dim=1)


class Logits(torch.nn.Module):
    """Rows as they come → logits [rows]: what a rank trains."""

    def __init__(self, stats: ColumnStats, net: torch.nn.Module) -> None:
        super().__init__()
        self.prepare = Prepare(stats)
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.prepare(x))


class _Probability(torch.nn.Module):
    def __init__(self, logits: torch.nn.Module) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.logits(x).to(torch.float32))


def build_net(model: Callable[[int], Any], inputs: int) -> torch.nn.Module:
    """The user's net, tried on two rows.

    Raises:
        SpecError: it can not be made, does not give one logit a row, or mixes the rows of a batch (batch norm).
    """
    try:
        net = model(inputs)
        with torch.no_grad():
            shape = tuple(net(torch.zeros(2, inputs)).shape)
    except Exception as err:  # the user's code may raise anything, and the user is told what
        raise SpecError(f"train.model({inputs}) fails on a [2, {inputs}] batch: {type(err).__name__}: {err}") from err
    if shape != (2,):
        raise SpecError(f"train.model: a [2, {inputs}] batch gives {list(shape)}, not [2]: return one logit a row")
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            raise SpecError(
                f"train.model has {type(module).__name__}, whose result depends on how many ranks share a batch: "
                "use LayerNorm"
            )
    return net


def export_program(logits: torch.nn.Module, columns: int) -> bytes:
    """A net as a program's bytes; it is put into evaluation mode.

    Raises:
        ModelError: `torch.export` can not trace it.
    """
    whole = _Probability(logits).eval()
    rows = torch.export.Dim("rows", min=1)
    try:
        with torch.no_grad():
            program = torch.export.export(
                whole, (torch.zeros(_EXAMPLE_ROWS, columns),), dynamic_shapes={"x": {0: rows}}
            )
        file = io.BytesIO()
        torch.export.save(program, file)
    except Exception as err:  # the tracer raises dozens of kinds
        why = " ".join(str(err).split())[:300]
        raise ModelError(f"the model can not be exported: {why}: write its forward without Python branches") from err
    return file.getvalue()


def load(data: Data) -> Loaded:
    """A program and the number of its inputs; errors as `load_program`."""
    torch.set_num_threads(1)  # replicas share their cores with everything else
    run, columns = _read(data)
    return Loaded(kind=Kind.EXPORTED, run=run, columns=columns)


def load_program(data: Data) -> Program:
    """A program as a function from [rows, n] float32 (NaN: unknown) to [rows] float32 probabilities.

    `torch.export.load` unpickles parts of the archive: bytes from a stranger can run the stranger's code. Load only
    bytes that a raymill rank or `export_program` made (the registry finds them by their SHA-256). The function may
    be called from several threads.

    Raises:
        ModelError: the bytes are no program; or, from the function: the rows do not fit it, or an answer is not
            finite.
    """
    return _read(data)[0]


def _read(data: Data) -> tuple[Program, int]:
    try:
        exported = torch.export.load(io.BytesIO(data))
        run = exported.module()
        columns = _input_columns(exported)
    except Exception as err:  # a damaged archive raises dozens of kinds
        why = " ".join(str(err).split())[:300]
        raise ModelError(
            f"{len(data)} bytes are no program of torch.export with one input [rows, n] ({why}): export it anew"
        ) from err

    def predict(x: F32) -> F32:
        if x.ndim != 2 or x.shape[1] != columns:
            raise ModelError(f"the program takes [rows, {columns}] float32, not {list(x.shape)}: check the features")
        if not len(x):
            return np.empty(0, np.float32)
        rows = np.ascontiguousarray(x, dtype=np.float32)
        if not rows.flags.writeable:  # torch warns of what it could write to; a view of the object store is read-only
            rows = rows.copy()
        with torch.inference_mode():
            try:
                p = numbers_of(run(torch.from_numpy(rows)).numpy(), len(rows))
            except AssertionError as err:  # what the trace took for fixed, the number of rows first of all
                raise ModelError(
                    f"the program does not take {list(x.shape)} ({' '.join(str(err).split())[:200]}): export it with a "
                    "free number of rows, `dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)`"
                ) from err
        if not np.isfinite(p).all():
            raise ModelError("the model answers with NaN or infinity: roll back to the version before")
        return p

    return predict, columns


def _input_columns(exported: Any) -> int:
    names = exported.graph_signature.user_inputs
    if len(names) != 1:
        raise ValueError(f"it has {len(names)} inputs")
    (node,) = (n for n in exported.graph.nodes if n.name == names[0])
    return int(node.meta["val"].shape[1])


def baseline(training_set: TrainingSet, *, training_id: str = "baseline") -> TrainResult:
    """Logistic regression on the same prepared columns, as a program like any other.

    Raises:
        TrainingError: the training rows are of one class only.
    """
    from sklearn.linear_model import LogisticRegression

    began = time.perf_counter()
    x, y = columns_of(training_set.train_ref)
    if len(np.unique(y > 0.5)) < 2:
        raise TrainingError(f"{training_id}: all {len(y)} training rows have the same label: train on a longer range")
    stats = measure(x)
    with torch.no_grad():
        fitted = LogisticRegression(max_iter=200).fit(Prepare(stats)(torch.from_numpy(x.copy())).numpy(), y > 0.5)
    net = torch.nn.Sequential(torch.nn.Linear(stats.inputs, 1), torch.nn.Flatten(0))
    with torch.no_grad():
        net[0].weight.copy_(torch.from_numpy(fitted.coef_))
        net[0].bias.copy_(torch.from_numpy(fitted.intercept_))
    program = export_program(Logits(stats, net), x.shape[1])
    predict = load_program(program)
    x_later, y_later = columns_of(training_set.evaluate_ref)
    later = predict(x_later)
    seconds = time.perf_counter() - began
    metrics = EpochMetrics(
        epoch=0,
        train_loss=log_loss(predict(x), y),
        evaluate_log_loss=log_loss(later, y_later),
        evaluate_auc=auc(later, y_later),
        seconds=seconds,
        ranks=1,
    )
    return TrainResult(
        training_id=training_id,
        program=program,
        epochs=(metrics,),
        changes=(),
        steps=int(fitted.n_iter_[0]),
        data_order="",
        seconds=seconds,
    )
