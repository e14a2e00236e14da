"""Tree models of LightGBM as programs: the text that `Booster.save_model` writes, no pickle."""

from __future__ import annotations

import re

from raymill.actors.model_files import F32, Data, Kind, Loaded, fitting
from raymill.runtime.errors import ModelError

_SIZES = re.compile(r"^tree_sizes=([\d ]*)$", re.MULTILINE)
_END = "end of trees"


def load(data: Data) -> Loaded:
    """The model of a text file: [rows, n] float32, NaN for unknown, → probability or value; [rows, k] of k classes.

    Raises:
        ModelError: the bytes are no such model.
    """
    import lightgbm

    lightgbm.register_logger(_Quiet())
    try:
        text = bytes(data).decode()
        _check_whole(text)
        booster = lightgbm.Booster(model_str=text)
    except (UnicodeDecodeError, lightgbm.basic.LightGBMError) as err:
        raise ModelError(f"{len(data)} bytes are no model of LightGBM ({err}): save it with `save_model`") from err
    columns = booster.num_feature()

    def run(x: F32) -> F32:
        return booster.predict(x, num_threads=1)  # replicas share their cores with everything else

    return Loaded(kind=Kind.LIGHTGBM, run=fitting(run, columns), columns=columns, names=tuple(booster.feature_name()))


def _check_whole(text: str) -> None:
    """Refuse a text that was cut off: LightGBM takes it for a model with fewer trees, or ends the process."""
    said = _SIZES.search(text)
    begin = text.find("\nTree=0\n") + 1
    sizes = [int(size) for size in said[1].split()] if said else []
    if not begin or not said or not text.startswith(_END, begin + sum(sizes)):
        raise ModelError(f"the model of LightGBM, {len(text)} bytes, is cut off or damaged: save it again")


class _Quiet:
    """LightGBM's words go nowhere: what is wrong comes as an error."""

    def info(self, message: str) -> None:
        """Nothing."""

    def warning(self, message: str) -> None:
        """Nothing."""
