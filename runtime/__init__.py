"""What a pipeline file and a notebook import, each name loaded when first asked for: importing this is light."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymill.runtime.client import Client, connect
    from raymill.runtime.errors import RaymillError
    from raymill.runtime.expressions import col
    from raymill.runtime.spec import (
        Budget,
        Col,
        Cost,
        DeltaTable,
        Directory,
        Drills,
        Feature,
        FeatureView,
        Label,
        Monitor,
        OnDemand,
        Pipeline,
        RedisStream,
        Replay,
        Serve,
        Source,
        Stores,
        Train,
    )

_HOME_OF = {
    "Client": "client",
    "connect": "client",
    "RaymillError": "errors",
    "col": "expressions",
} | dict.fromkeys(
    (
        "Budget", "Col", "Cost", "DeltaTable", "Directory", "Drills", "Feature", "FeatureView", "Label", "Monitor",
        "OnDemand", "Pipeline", "RedisStream", "Replay", "Serve", "Source", "Stores", "Train",
    ),
    "spec",
)  # fmt: skip

__all__ = [
    "Budget",
    "Client",
    "Col",
    "Cost",
    "DeltaTable",
    "Directory",
    "Drills",
    "Feature",
    "FeatureView",
    "Label",
    "Monitor",
    "OnDemand",
    "Pipeline",
    "RaymillError",
    "RedisStream",
    "Replay",
    "Serve",
    "Source",
    "Stores",
    "Train",
    "col",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"raymill.runtime.{_HOME_OF[name]}"), name)
