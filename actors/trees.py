"""Tree models of XGBoost as programs: the model file's own bytes (UBJSON or JSON), no pickle."""

from __future__ import annotations

import ctypes
import json
import re
import threading
from typing import Any

import numpy as np

from raymill.actors.model_files import F32, Data, Kind, Loaded, numbers_of
from raymill.actors.tree_walk import FEW_ROWS, walk_of
from raymill.runtime.errors import ModelError


def load(data: Data) -> Loaded:
    """The program of a model file: [rows, n] float32, NaN for unknown, → probability or value [rows] float32.

    Of several classes or targets it gives [rows, k].

    Raises:
        ModelError: the bytes are no such model; or, from the program, its answer is of another form.
    """
    import xgboost

    booster = xgboost.Booster()
    try:
        booster.load_model(bytearray(data))
    except xgboost.core.XGBoostError as err:
        why = _told(err)
        raise ModelError(f"{len(data)} bytes are no model of XGBoost ({why}): save it with `save_model`") from err
    booster.set_param({"nthread": 1})  # replicas share their cores with everything else
    columns = booster.num_features()
    call = _Call(booster)
    walk = walk_of(booster, call) if columns else None

    def predict(x: F32) -> F32:
        if x.ndim != 2 or x.shape[1] != columns:
            raise ModelError(f"the trees take [rows, {columns}] float32, not {list(x.shape)}: check the features")
        if not len(x):
            return np.empty(0, np.float32)
        x = np.ascontiguousarray(x, dtype="<f4")
        return walk(x) if walk is not None and len(x) <= FEW_ROWS else call(x)

    return Loaded(kind=Kind.XGBOOST, run=predict, columns=columns, names=tuple(booster.feature_names or ()))


class _Call:
    """`Booster.inplace_predict` by the C API that it wraps: the wrapper costs more than a small batch's trees.

    https://xgboost.readthedocs.io/en/stable/c.html (XGBoosterPredictFromDense)
    """

    def __init__(self, booster: Any) -> None:
        import xgboost

        self._booster = booster  # keeps the handle alive
        self._library, self._check = xgboost.core._LIB, xgboost.core._check_call
        self._error = xgboost.core.XGBoostError
        settings = {"type": 0, "training": False, "iteration_begin": 0, "iteration_end": 0, "strict_shape": False}
        # Python writes the missing value as `NaN`, which is what XGBoost's JSON reads.
        self._settings = json.dumps(settings | {"missing": float("nan"), "cache_id": 0}).encode()
        self._shape = ctypes.POINTER(ctypes.c_uint64)()
        self._dimensions = ctypes.c_uint64()
        self._found = ctypes.POINTER(ctypes.c_float)()
        self._out = [ctypes.byref(held) for held in (self._shape, self._dimensions, self._found)]
        self._lock = threading.Lock()

    def __call__(self, x: F32) -> F32:
        """Of rows that lie in memory one after the other."""
        rows, columns = x.shape
        array = b'{"data":[%d,true],"shape":[%d,%d],"typestr":"<f4","version":3}' % (x.ctypes.data, rows, columns)
        with self._lock:  # the answer lies in memory of the booster's, until its next call
            try:
                self._check(
                    self._library.XGBoosterPredictFromDense(
                        self._booster.handle, array, self._settings, None, *self._out
                    )
                )
            except self._error as err:
                raise ModelError(f"XGBoost does not predict with this model ({_told(err)}): trees are served") from err
            if self._dimensions.value == 1:
                return np.ctypeslib.as_array(self._found, (rows,)).copy()
            shape = tuple(self._shape[i] for i in range(self._dimensions.value))
            return numbers_of(np.ctypeslib.as_array(self._found, shape).copy(), rows)


def _told(err: Exception) -> str:
    """What XGBoost says, without time, place and the trace of its C++ behind it."""
    said = str(err).partition("Stack trace:")[0]
    return " ".join(re.sub(r"^\[[\d:]+\] \S+: ", "", said).rstrip(" \n~^").split())
