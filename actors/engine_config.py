"""DeepSpeed's configuration for one gang, derived from the user's `Train`: what does not fit a gang is refused here.

Every rank holds the whole state (ZeRO stage 0), so any survivor can carry on alone; the global batch stays what
the user asked for, whatever the number of ranks.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from raymill.runtime.errors import SpecError
from raymill.runtime.spec import Train

_OURS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
_SPLITTING = ("tensor_parallel", "pipeline", "sequence_parallel_size", "autotuning", "elasticity", "compile")
_COMPILED_OPTIMIZERS = ("lamb", "lion", "muon", "onebitadam", "onebitlamb", "zerooneadam", "muadam", "muadamw", "musgd")
"""DeepSpeed optimizers that compile C++ at their first use, or keep state that differs between ranks."""
_NEVER = 10**9


def declared_config(train: Train) -> dict[str, Any]:
    """The user's DeepSpeed configuration, read from its file if it is one.

    Raises:
        SpecError: the file can not be read, or asks for something a gang can not do.
    """
    config = _read(train) if isinstance(train.config, str) else dict(train.config or {})
    _refuse(config, train)
    return config


def engine_config(train: Train, declared: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets on each of `ranks` ranks.

    `bf16` becomes autocast: compute in bfloat16, weights and optimizer state float32 and whole on every rank
    (DeepSpeed's own bf16 optimizer keeps another form of state).
    """
    config = {k: v for k, v in declared.items() if k not in (*_OURS, "bf16", "fp16", "zero_optimization")}
    optimizer = dict(config.get("optimizer") or {"type": "AdamW"})
    params = {"lr": train.learning_rate, **optimizer.get("params", {})}
    if optimizer["type"].lower() in ("adam", "adamw"):
        params["torch_adam"] = True  # the others compile C++ when they are made
    config["optimizer"] = {**optimizer, "params": params}
    if declared.get("bf16", {}).get("enabled"):
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    config["zero_optimization"] = {"stage": 0}
    config.setdefault("gradient_clipping", 0.0)
    config.setdefault("steps_per_print", _NEVER)
    config["train_micro_batch_size_per_gpu"] = -(-train.batch_rows // ranks)
    config["gradient_accumulation_steps"] = 1
    return config


def _read(train: Train) -> dict[str, Any]:
    path = Path(str(train.config))
    if not path.is_absolute():
        path = _pipeline_folder(train) / path
    try:
        config = json.loads(path.read_text())
    except OSError as err:
        raise SpecError(f"train.config: {path} can not be read ({err.strerror}): put the file there") from err
    except ValueError as err:
        raise SpecError(f"train.config: {path} is not JSON ({err}): mend the file") from err
    if not isinstance(config, dict):
        raise SpecError(f"train.config: {path} holds no JSON object: mend the file")
    return config


def _pipeline_folder(train: Train) -> Path:
    """Folder of the file that defines the model, beside which its configuration lies."""
    try:
        return Path(inspect.getfile(train.model)).parent
    except TypeError:  # a callable object, not a function or class
        return Path(inspect.getfile(type(train.model))).parent


def _refuse(config: dict[str, Any], train: Train) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage:
        raise SpecError(
            f"train.config asks for ZeRO stage {stage}: it spreads the optimizer's state over the ranks, a lost rank "
            "would take its part with it, and a gang goes on from what its survivors hold; set "
            "zero_optimization.stage to 0"
        )
    autocast = config.get("torch_autocast", {})
    to_half = autocast.get("enabled") and autocast.get("dtype") in ("float16", "fp16", "half")
    if config.get("fp16", {}).get("enabled") or to_half:
        raise SpecError("train.config asks for fp16, which CPU ranks do not have: use bf16 or float32")
    for name in _SPLITTING:
        if config.get(name):
            raise SpecError(f"train.config sets {name!r}, which a gang of equal ranks can not honour: remove it")
    if config.get("train_batch_size", train.batch_rows) != train.batch_rows:
        raise SpecError(
            f"train.config.train_batch_size={config['train_batch_size']} contradicts batch_rows={train.batch_rows}: "
            "remove it"
        )
    for name in _OURS[:2]:
        if name in config:
            raise SpecError(
                f"train.config sets {name!r}: it follows from batch_rows and the number of ranks, which may change; "
                "remove it"
            )
    if "type" not in config.get("optimizer", {"type": ""}):
        raise SpecError("train.config.optimizer.type is missing: name an optimizer, such as AdamW")
    optimizer = str(config.get("optimizer", {}).get("type", ""))
    if optimizer.lower() in _COMPILED_OPTIMIZERS:
        raise SpecError(
            f"train.config.optimizer: a gang does not run {optimizer}: use AdamW, Adam or one of torch.optim"
        )
