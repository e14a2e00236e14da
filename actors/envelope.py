"""raymill's own wrapping of a model that is no file by itself: code by name, weights behind it; pure.

Layout: a magic line; one line of JSON, filled with blanks so that what follows begins at a multiple of 64; the payload.
The same content gives the same bytes, so that its digest names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import orjson

from raymill.actors.model_files import ENVELOPE, Data
from raymill.runtime.errors import ModelError

_ALIGNED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What is wrapped."""

    form: Literal["code", "skops"]
    """`code`: a class or function, with its weights; `skops`: an estimator whose types somebody trusts."""
    target: str = ""
    """`module:name` of the code."""
    source: str = ""
    """Text of the module, where it is one file that travels along; empty: it is imported."""
    compiled: bool = False
    """Whether a net is given to `torch.compile`."""
    trusted: tuple[str, ...] = ()
    """Types of an estimator that the operator trusts."""
    payload: Data = b""
    """Weights in the form of safetensors, or the estimator's archive."""


def pack(sealed: Envelope) -> bytes:
    """The bytes of a wrapped model."""
    said = {
        "form": sealed.form,
        "target": sealed.target,
        "source": sealed.source,
        "compiled": sealed.compiled,
        "trusted": list(sealed.trusted),
    }
    head = ENVELOPE + orjson.dumps(said)
    return head + b" " * (-(len(head) + 1) % _ALIGNED) + b"\n" + bytes(sealed.payload)


def unpack(data: Data) -> Envelope:
    """What `pack` was given; the payload is a view of `data`.

    Raises:
        ModelError: the bytes are damaged.
    """
    view = memoryview(data)
    try:
        text = bytes(view).partition(b"\n")[2].partition(b"\n")[0]
        said: dict[str, Any] = orjson.loads(text)
        said["trusted"] = tuple(said["trusted"])
        return Envelope(**said, payload=view[len(ENVELOPE) + len(text) + 1 :])
    except (ValueError, KeyError, TypeError) as err:
        raise ModelError(f"the model's wrapping is damaged ({err}): serve the model anew") from err
