"""What `raymill serve` was pointed at, read and tried in this process before anything starts: a file, or code by name.

The bytes it gives are what the registry keeps: a model file as it is, code in an envelope.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raymill.actors import envelope, model_files
from raymill.actors.envelope import Envelope
from raymill.actors.model_files import Loaded
from raymill.actors.named_inputs import check_names
from raymill.runtime.errors import ModelError, SpecError, Usage

_CODE = re.compile(r"(?P<module>[\w./-]+?)(\.py)?:(?P<name>[A-Za-z_]\w*)")
_PICKLED = b"PK"
"""Begins what `torch.save` writes; safetensors begin with a length."""
_WEIGHTS_ALONE = "save `net.state_dict()`, best by `safetensors.torch.save_file`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model that can be registered and served."""

    name: str
    """Name it is served by."""
    kind: str
    """Kind of its file."""
    data: bytes
    """Its file, or the envelope around its code."""
    inputs: tuple[str, ...]
    """Names of its inputs, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user said beside the target."""

    name: str | None = None
    """Name to serve it by; absent: the file's or function's."""
    features: str | None = None
    """Names of the inputs, by commas, or how many there are; absent: what the file says."""
    weights: Path | None = None
    """Weights of a torch net."""
    compiled: bool = False
    """Whether the net is compiled."""
    trust: tuple[str, ...] = ()
    """Types of an estimator's archive that the user trusts."""


def read_target(text: str, wish: Wish) -> Target:
    """The model, loaded once and asked for a row.

    Raises:
        Usage: there is no such file or code, it is no model that can be served, or its inputs are not known.
    """
    path = Path(text)
    data = _read(path, wish) if path.exists() else _code(text, wish)
    try:
        loaded = model_files.load(data)
        inputs = _inputs(loaded, wish.features, text)
        check_names(inputs)
        answer = loaded.run(np.zeros((2, len(inputs)), np.float32))
    except ModelError as err:
        raise Usage(f"{text}: {err.message}") from err
    except SpecError as err:
        raise Usage(err.message) from err
    if not np.isfinite(answer).all():
        raise Usage(
            f"{text} answers {answer[0]} where all inputs are 0: a model has to answer ordinary rows by numbers"
        )
    return Target(name=_name(wish.name, text), kind=str(loaded.kind), data=data, inputs=inputs)


def _read(path: Path, wish: Wish) -> bytes:
    if wish.weights or wish.compiled:
        raise Usage(f"{path} is a file: --weights and --compile are for a net that is named by module:Net")
    data = _bytes(path)
    return envelope.pack(Envelope(form="skops", trusted=wish.trust, payload=data)) if wish.trust else data


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise Usage(f"{path} can not be read ({err.strerror}): name a model file") from err


def _code(text: str, wish: Wish) -> bytes:
    said = _CODE.fullmatch(text)
    if said is None:
        raise Usage(f"there is no file {text!r}, and it is no module:function either: check the path")
    module, source = said["module"], ""
    file = Path(f"{module}.py")
    if file.is_file():
        module, source = file.stem, _bytes(file).decode(errors="replace")
    elif not _is_installed(module):
        raise Usage(
            f"there is no module {module!r} for {sys.executable}, and no file {file} here: install it, or put it on "
            "PYTHONPATH"
        )
    payload = b"" if wish.weights is None else _weights(wish.weights)
    return envelope.pack(
        Envelope(form="code", target=f"{module}:{said['name']}", source=source, compiled=wish.compiled, payload=payload)
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _weights(path: Path) -> bytes:
    """Weights in the form of safetensors; of a file of `torch.save`, whatever in it is no tensor is refused."""
    data = _bytes(path)
    if not data.startswith(_PICKLED):
        return data
    import io
    import pickle

    import torch
    from safetensors.torch import save

    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        return save({name: tensor.contiguous() for name, tensor in state.items()})
    except pickle.UnpicklingError as err:  # its text tells how to read the file all the same
        strange = re.search(r"GLOBAL (\S+)", str(err))
        what = f" ({strange[1].rstrip('.,')})" if strange else ""
        raise Usage(f"{path} holds more than a net's weights{what}: {_WEIGHTS_ALONE}") from err
    except (RuntimeError, AttributeError, ValueError) as err:
        why = " ".join(str(err).split())[:200]
        raise Usage(f"{path} holds no net's weights that can be read ({why}): {_WEIGHTS_ALONE}") from err


def _inputs(loaded: Loaded, features: str | None, text: str) -> tuple[str, ...]:
    """Names of the inputs: those given, else those of the file, else f0, f1 and so on."""
    if features is None:
        if loaded.columns is None:
            raise Usage(f"{text} does not say how many inputs it takes: give --features 12, or --features a,b,c")
        return loaded.names or _numbered(loaded.columns)
    count = int(features) if re.fullmatch(r"\s*[+-]?[0-9]+\s*", features) else None
    named = tuple(n.strip() for n in features.split(",")) if count is None else ()
    count = len(named) if count is None else count
    if count < 1 or count != (loaded.columns or count):
        raise Usage(f"--features says {count} inputs, and {text} takes {loaded.columns or 'at least one'}")
    return named or loaded.names or _numbered(count)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"f{i}" for i in range(count))


def _name(wanted: str | None, text: str) -> str:
    name = wanted or re.sub(r"[^A-Za-z0-9_-]+", "-", text.rpartition(":")[2] if ":" in text else Path(text).stem)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise Usage(f"{name!r} is no name for a model: give one of letters, digits, - and _ by --name")
    return name
