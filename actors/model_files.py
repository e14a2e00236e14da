"""What kind of model a file's bytes are, told by their content, and who loads each kind.

Invariants
- A file's name is never asked, and nothing is unpickled to find out.
- What would run a stranger's code when it is read (pickles, TorchScript) is refused, with the way to save it instead.
- A loaded model takes [rows, n] float32 and gives float32: [rows], or [rows, k] where it has k > 1 numbers a row.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from raymill.runtime.errors import MissingPackage, ModelError

F32 = npt.NDArray[np.float32]
Run = Callable[[F32], F32]
Data = bytes | memoryview
"""A file's bytes, or a view of them where they lie in the object store."""
ENVELOPE = b"raymill-model/1\n"
"""Begins what `envelope.pack` writes: code by name, with weights or an estimator behind it."""


class Kind(StrEnum):
    """A kind of model file, named after what loads it."""

    XGBOOST = "xgboost"
    LIGHTGBM = "lightgbm"
    EXPORTED = "torch.export"
    ONNX = "onnxruntime"
    SKLEARN = "skops"
    CODE = "code"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model that can be asked, and what its file says of its inputs."""

    kind: Kind
    """What it was."""
    run: Run
    """[rows, n] float32 → [rows] float32, or [rows, k]."""
    columns: int | None = None
    """Inputs of a row; None: the file does not say."""
    names: tuple[str, ...] = ()
    """Their names in order; empty: the file does not say."""


_LOADERS = {
    Kind.XGBOOST: "trees",
    Kind.LIGHTGBM: "lightgbm_trees",
    Kind.EXPORTED: "program",
    Kind.ONNX: "onnx_graph",
    Kind.SKLEARN: "estimators",
    Kind.CODE: "code_model",
}
"""Kind → the module beside this one whose `load(data)` gives a `Loaded`."""
_GROWTH = {Kind.XGBOOST: 4, Kind.LIGHTGBM: 3, Kind.ONNX: 2, Kind.SKLEARN: 3, Kind.EXPORTED: 2, Kind.CODE: 1}
"""Memory of a loaded model by the bytes of its file, about: parsed text and trees grow, mapped weights do not."""
_PICKLE = "save it without pickle, which runs whatever its writer put in"
_INSTEAD = {
    "sklearn": f"{_PICKLE}: `skops.io.dump(model, 'model.skops')`, or convert it to ONNX by skl2onnx",
    "torch": "save its weights by `safetensors.torch.save_file(net.state_dict(), …)` and serve "
    "`module:Net --weights FILE`, or export it by `torch.export.save`",
    "script": "TorchScript archives hold pickles: export it by `torch.export.save`, or convert it to ONNX",
    "weights": "these are weights without the code that uses them: serve `module:Net --weights FILE`",
}


def kind_of(data: Data) -> Kind:
    """The kind of a model file.

    Raises:
        ModelError: it is none that can be served; says how to save it instead, where that is known.
    """
    head = bytes(data[:64])
    if head.startswith(ENVELOPE):
        return Kind.SKLEARN if b'"form":"skops"' in bytes(data[:256]) else Kind.CODE
    if head[:1] == b"{":
        return Kind.XGBOOST
    if head.startswith((b"tree\n", b"tree\r\n")):
        return Kind.LIGHTGBM
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_archive(data)
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x28", b"\x32", b"\x3a", b"\x42"):
        return Kind.ONNX  # a protobuf whose first field is the version of the format
    # Before pickles: the first bytes are a length, which may look like the beginning of one.
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") <= len(data):
        raise ModelError(f"the file is in the form of safetensors: {_INSTEAD['weights']}")
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        raise ModelError(f"the file is a pickle, which is never loaded: {_INSTEAD['sklearn']}")
    raise ModelError(
        f"{len(data)} bytes that begin with {head[:12]!r} are no model file: XGBoost (UBJSON, JSON), LightGBM (text), "
        "torch.export, ONNX and skops are served; of a pickle or joblib file, "
        f"{_INSTEAD['sklearn'].removeprefix(_PICKLE + ': ')}"
    )


def load(data: Data) -> Loaded:
    """The model of a file's bytes, tried on one row where the file says how wide that is.

    Raises:
        ModelError: the bytes are no model, or a damaged one.
        MissingPackage: its library is not installed.
    """
    kind = kind_of(data)
    try:
        loaded: Loaded = import_module(f"raymill.actors.{_LOADERS[kind]}").load(data)
    except ModuleNotFoundError as err:
        raise MissingPackage(
            f"a model of kind {kind} needs the package {err.name!r}: `pip install 'raymill[models]'` on every host"
        ) from err
    if loaded.columns is not None:
        loaded.run(np.zeros((1, loaded.columns), np.float32))
    return loaded


def footprint(data: Data) -> int:
    """Bytes of memory that the model takes once it is loaded, about."""
    return len(data) * _GROWTH[kind_of(data)]


def fitting(run: Callable[[F32], Any], columns: int | None) -> Run:
    """`run` for rows of that width only: contiguous ones, and at least one; its answer as `numbers_of` gives it."""

    def predict(x: F32) -> F32:
        if x.ndim != 2 or (columns is not None and x.shape[1] != columns):
            raise ModelError(f"the model takes [rows, {columns}] float32, not {list(x.shape)}: check the features")
        if not len(x):
            return np.empty(0, np.float32)
        return numbers_of(run(np.ascontiguousarray(x, dtype=np.float32)), len(x))

    return predict


def numbers_of(answer: Any, rows: int) -> F32:
    """An answer as [rows] float32, or [rows, k] where it has k > 1 numbers a row.

    Raises:
        ModelError: it has neither shape.
    """
    p = np.asarray(answer)
    if p.shape == (rows, 1):
        p = p[:, 0]
    if p.shape != (rows,) and (p.ndim != 2 or len(p) != rows or not p.shape[1]):
        raise ModelError(
            f"the model gives {list(p.shape)} for {rows} rows: [rows] is served, or [rows, k]; wrap it so that it "
            "gives the numbers of each row side by side"
        )
    return p.astype(np.float32, copy=False)


def _kind_of_archive(data: Data) -> Kind:
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except zipfile.BadZipFile as err:
        raise ModelError(f"the archive of {len(data)} bytes is damaged ({err}): save the model again") from err
    inner = {name.partition("/")[2] for name in names}
    if "schema.json" in names:
        return Kind.SKLEARN
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        return Kind.EXPORTED
    if "constants.pkl" in inner:
        raise ModelError(f"the file is TorchScript: {_INSTEAD['script']}")
    if "data.pkl" in inner:
        raise ModelError(f"the file is of `torch.save`, a pickle: {_INSTEAD['torch']}")
    raise ModelError(f"the archive holds no model that is known (it has {sorted(names)[:3]}): save it as the docs say")
