"""Models that are code: a callable, or a torch net with its weights, by `module:name`; weights in safetensors' form.

Code runs only because the operator of this cluster named it (`raymill serve module:name`); none comes by a request.
A module that is one file travels with the version, under a name of its own: versions of it live beside each other.
Weights are read where they lie: a net's parameters are views of the object store's memory.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from raymill.actors import envelope
from raymill.actors.envelope import Envelope
from raymill.actors.model_files import F32, Data, Kind, Loaded, fitting
from raymill.runtime.errors import ModelError


def load(data: Data) -> Loaded:
    """The program of an envelope with code.

    A function is asked itself; a class, or a function that has weights, is called without arguments first. A net is
    put into evaluation mode.

    Raises:
        ModelError: the code can not be imported or made, the weights do not fit it, or it can not be called.
    """
    sealed = envelope.unpack(data)
    found = _resolve(sealed)
    if inspect.isclass(found) or len(sealed.payload):
        try:
            found = found()
        except Exception as err:  # the user's code may raise anything, and the user is told what
            raise ModelError(f"{sealed.target}() fails: {type(err).__name__}: {err}") from err
    if _is_net(found):
        run = _net(found, sealed)
    elif len(sealed.payload):
        raise ModelError(f"{sealed.target}() gives {type(found).__name__}, and weights are for a torch.nn.Module")
    elif not callable(found):
        raise ModelError(f"{sealed.target} is {type(found).__name__}, which can not be called")
    else:
        run = found
    return Loaded(kind=Kind.CODE, run=fitting(_told(run, sealed.target), None))


def weights_of(data: Data) -> dict[str, Any]:
    """Name → tensor of bytes in the form of safetensors; the tensors are views of `data`, not to be written to.

    Raises:
        ModelError: the bytes are not in that form.
    """
    import torch

    types = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip
    view = memoryview(data)
    try:
        begin = 8 + int.from_bytes(view[:8], "little")
        said = json.loads(bytes(view[8:begin]))
        found = {}
        for name, tensor in said.items():
            if name != "__metadata__":
                first, last = tensor["data_offsets"]
                raw = view[begin + first : begin + last]
                found[name] = _tensor(raw, types[tensor["dtype"]]).reshape(tensor["shape"])
        return found
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as err:
        raise ModelError(f"the weights are not in the form of safetensors ({err}): save them anew") from err


def _tensor(raw: memoryview, dtype: Any) -> Any:
    import torch

    if not len(raw):
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they can not be written to is what is wanted
        return torch.frombuffer(raw, dtype=dtype)


def _resolve(sealed: Envelope) -> Any:
    module_name, _, name = sealed.target.partition(":")
    try:
        module = _from_source(sealed, module_name) if sealed.source else import_module(module_name)
        return getattr(module, name)
    except Exception as err:  # the user's module may raise anything
        remedy = "mend it, and serve it again"
        if isinstance(err, ModuleNotFoundError):
            remedy = "install that module, or put it on PYTHONPATH before `raymill up`"
        raise ModelError(
            f"{sealed.target} can not be imported by {sys.executable} ({type(err).__name__}: {err}): {remedy}"
        ) from err


def _from_source(sealed: Envelope, module_name: str) -> ModuleType:
    digest = hashlib.sha256(sealed.source.encode()).hexdigest()[:12]
    name = f"raymill_model_{digest}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__file__ = f"<{module_name} {digest}>"
        sys.modules[name] = module  # dataclasses and torch look their module up
        try:
            exec(compile(sealed.source, module.__file__, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _is_net(found: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(found, torch.nn.Module)


def _net(net: Any, sealed: Envelope) -> Callable[[F32], Any]:
    import torch

    torch.set_num_threads(1)  # replicas share their cores with everything else
    if len(sealed.payload):
        try:
            net.load_state_dict(weights_of(sealed.payload), assign=True)
        except RuntimeError as err:
            raise ModelError(f"the weights do not fit {sealed.target}(): {' '.join(str(err).split())[:400]}") from err
    net = net.eval().requires_grad_(False)
    call = _compiled(net) if sealed.compiled else net

    def run(x: F32) -> Any:
        with torch.inference_mode():
            return call(torch.from_numpy(x if x.flags.writeable else x.copy())).to(torch.float32).numpy()

    return run


def _compiled(net: Any) -> Any:
    """The net for any number of rows; it is compiled while the replica warms up."""
    import torch
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # its pool of compilers takes every core of the host
    return torch.compile(net, dynamic=True)


def _told(run: Callable[[F32], Any], target: str) -> Callable[[F32], Any]:
    """`run`, whose errors name it: they are the user's code's."""

    def call(x: F32) -> Any:
        try:
            return np.asarray(run(x))
        except Exception as err:  # the user's code may raise anything, and the caller is told what
            raise ModelError(f"{target} fails on {list(x.shape)} float32: {type(err).__name__}: {err}") from err

    return call
