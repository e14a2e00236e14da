"""Reads a pipeline file: a Python file that binds one `Pipeline`, checked before anything starts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import traceback
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from raymill.runtime.errors import RaymillError, SpecError
from raymill.runtime.expressions import Expr
from raymill.runtime.spec import Pipeline, Train

_PREFIX = "raymill_pipeline_"
_USER_CODE = "a pipeline file is plain Python: `python {path}` must run without an error"


def load(path: Path) -> Pipeline:
    """The one `Pipeline` that the file binds at its top level, DeepSpeed's configuration file read in.

    Raises:
        SpecError: no such file, it does not run, or it binds no pipeline, several, or a wrong one.
    """
    if not path.is_file():
        raise SpecError(f"there is no pipeline file at {path}: give the path of one, e.g. jobs/flights.py")
    module = _execute(path)
    found = [(name, value) for name, value in vars(module).items() if isinstance(value, Pipeline)]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise SpecError(f"{path} must bind exactly one Pipeline at its top level; found: {names}")
    return _with_engine_config(found[0][1], path)


def loaded() -> list[ModuleType]:
    """The modules of the pipeline files that this process has loaded."""
    return [module for name, module in sys.modules.items() if name.startswith(_PREFIX)]


def resolved(pipeline: Pipeline) -> str:
    """The pipeline with every default filled in, as JSON (what a run writes beside its output)."""
    return json.dumps(_plain(pipeline), indent=1)


def _execute(path: Path) -> ModuleType:
    name = (
        f"raymill_pipeline_{path.stem.replace('-', '_')}_{hashlib.sha1(str(path.resolve()).encode()).hexdigest()[:8]}"
    )
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{path} is no Python file: a pipeline file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except RaymillError as err:
        raise SpecError(f"{_where(path, err)}: {err.message}") from err
    except ValidationError as err:
        raise SpecError(f"{_where(path, err)}: {_explain(err)}") from err
    except Exception as err:  # the user's own code may raise anything
        raise SpecError(f"{_where(path, err)}: {type(err).__name__}: {err}; {_USER_CODE.format(path=path)}") from err
    return module


def _where(path: Path, err: BaseException) -> str:
    lines = [f.lineno for f in traceback.extract_tb(err.__traceback__) if f.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _explain(err: ValidationError) -> str:
    parts = []
    for problem in err.errors(include_url=False):
        field = ".".join(str(p) for p in problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        parts.append(f"{err.title}: {field}: {text}" if field else f"{err.title}: {text}")
    return "; ".join(parts)


def _with_engine_config(pipeline: Pipeline, path: Path) -> Pipeline:
    if not isinstance(pipeline.train.config, str):
        return pipeline
    file = path.parent / pipeline.train.config
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as err:
        raise SpecError(
            f"train.config of {path}: {file} is not readable JSON ({err}): give DeepSpeed's configuration"
        ) from err
    fields = {name: getattr(pipeline.train, name) for name in Train.__dataclass_fields__}
    train = Train(**fields | {"config": config})
    return Pipeline(**{name: getattr(pipeline, name) for name in Pipeline.__dataclass_fields__} | {"train": train})


def _plain(value: Any) -> Any:
    """JSON values of a declared value; expressions as their tree, classes and functions by name."""
    if isinstance(value, Expr):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return getattr(value, "__qualname__", repr(value)) if callable(value) else value
