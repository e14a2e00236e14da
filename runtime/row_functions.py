"""Python functions in feature definitions: `python(km, col("a"), col("b"))`, called once a row, the same on both sides.

A definition travels as JSON, so a function is named by where it is imported from, never sent; its version is a hash of
its source text. Whoever computes imports it and refuses another text than the definition was made with.

The function gets a float, a string or None for each operand (a timestamp as µs, a truth value as 1.0 or 0.0) and
returns a number, a truth value or None. It must depend on nothing else: what it reads elsewhere differs between then
and now.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from raymill.runtime.errors import SpecError
from raymill.runtime.expressions import Expr, Python, lift

_LIMIT_S = 60
"""Seconds that importing the functions' modules may take."""
_CHECK = """
import json, sys
from raymill.runtime.row_functions import resolve
for function in json.loads(sys.argv[1]):
    resolve(*function)
"""


def python(function: Callable[..., Any], *operands: Any) -> Expr:
    """A function of row expressions: slow, once a row in Python.

    Raises:
        SpecError: the function can not be named by module and name, e.g. a lambda.
    """
    name = getattr(function, "__qualname__", "")
    module = getattr(function, "__module__", None)
    if not inspect.isfunction(function) or not name.isidentifier() or module in (None, "__main__"):
        raise SpecError(
            f"{function!r} can not be a feature: replicas import it by name; "
            "write it with `def` at the top of a module that is installed or on PYTHONPATH"
        )
    return Python(f"{module}:{name}", _version(function), tuple(lift(e) for e in operands))


@lru_cache(maxsize=256)
def resolve(function: str, source: str) -> Callable[..., Any]:
    """The function that a definition names.

    Raises:
        SpecError: it can not be imported here, or its text is another one.
    """
    module, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as err:
        raise SpecError(
            f"feature function {function} can not be imported by {sys.executable} ({err}): "
            "install its module, or put it on PYTHONPATH before `raymill up`"
        ) from err
    if not inspect.isfunction(found) or _version(found) != source:
        raise SpecError(
            f"feature function {function} is not the one that the definition was made with: "
            "its source text differs; deploy the same version, or declare the feature anew"
        )
    return found


def check_importable(functions: Iterable[Python]) -> None:
    """See to it that any process of this environment can import the functions, wherever it was started.

    Raises:
        SpecError: one can not be imported, or is another one there.
    """
    wanted = sorted({(f.function, f.source) for f in functions})
    if not wanted:
        return
    done = subprocess.run(
        [sys.executable, "-c", _CHECK, json.dumps(wanted)],
        cwd="/",  # not where the pipeline file happens to lie: replicas do not start there
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    if done.returncode:
        told = done.stderr.strip().splitlines()[-1:] or ["no word of why"]
        raise SpecError(f"replicas can not call the feature functions of this pipeline: {told[0]}")


def _version(function: Callable[..., Any]) -> str:
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as err:
        raise SpecError(f"{function!r} has no source text ({err}): define it in a file") from err
    return hashlib.sha256(text.encode()).hexdigest()[:16]
