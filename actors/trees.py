"""Tree models of XGBoost as programs: the model file's own bytes (UBJSON or JSON), no pickle."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from raymill.actors.models import Program
from raymill.runtime.errors import ModelError

F32 = npt.NDArray[np.float32]


def is_trees(data: bytes) -> bool:
    """Whether the bytes are a model file of XGBoost: a document, where `torch.export` writes an archive."""
    return data[:1] == b"{"


def load_trees(data: bytes) -> Program:
    """The program of a model file: [rows, n] float32, NaN for unknown, → probability or value [rows] float32.

    Raises:
        ModelError: the bytes are no such model, or it gives more than one number a row.
    """
    import xgboost

    booster = xgboost.Booster()
    try:
        booster.load_model(bytearray(data))
    except xgboost.core.XGBoostError as err:
        raise ModelError(f"{len(data)} bytes are no model of XGBoost ({err}): save it with `save_model`") from err
    booster.set_param({"nthread": 1})  # replicas share their cores with everything else
    columns = booster.num_features()

    def predict(x: F32) -> F32:
        if x.ndim != 2 or x.shape[1] != columns:
            raise ModelError(f"the trees take [rows, {columns}] float32, not {list(x.shape)}: check the features")
        if not len(x):
            return np.empty(0, np.float32)
        p: F32 = np.asarray(booster.inplace_predict(x, validate_features=False), dtype=np.float32)
        if p.shape != (len(x),):
            raise ModelError(f"the trees give {list(p.shape[1:])} numbers a row: one is served")
        return p

    return predict
