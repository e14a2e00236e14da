"""What a pipeline file and a notebook import, each name loaded when first asked for: importing this is light."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymill.runtime.client import Client, connect
    from raymill.runtime.errors import RaymillError
    from raymill.runtime.expressions import col, greatest, least, when
    from raymill.runtime.row_functions import python
    from raymill.runtime.spec import (
        AddColumn,
        Budget,
        Col,
        Cost,
        DeltaTable,
        Directory,
        Drills,
        DropColumn,
        Feature,
        FeatureView,
        Label,
        Lookup,
        Monitor,
        OnDemand,
        Pipeline,
        RedisStream,
        RenameColumn,
        Replay,
        Serve,
        Source,
        Stores,
        Train,
        Widen,
    )

_HOME_OF = {
    "Client": "client",
    "connect": "client",
    "RaymillError": "errors",
    "col": "expressions",
    "greatest": "expressions",
    "least": "expressions",
    "python": "row_functions",
    "when": "expressions",
} | dict.fromkeys(
    (
        "AddColumn", "Budget", "Col", "Cost", "DeltaTable", "Directory", "Drills", "DropColumn", "Feature",
        "FeatureView", "Label", "Lookup", "Monitor", "OnDemand", "Pipeline", "RedisStream", "RenameColumn", "Replay",
        "Serve", "Source", "Stores", "Train", "Widen",
    ),
    "spec",
)  # fmt: skip

__all__ = [
    "AddColumn",
    "Budget",
    "Client",
    "Col",
    "Cost",
    "DeltaTable",
    "Directory",
    "Drills",
    "DropColumn",
    "Feature",
    "FeatureView",
    "Label",
    "Lookup",
    "Monitor",
    "OnDemand",
    "Pipeline",
    "RaymillError",
    "RedisStream",
    "RenameColumn",
    "Replay",
    "Serve",
    "Source",
    "Stores",
    "Train",
    "Widen",
    "col",
    "connect",
    "greatest",
    "least",
    "python",
    "when",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"raymill.runtime.{_HOME_OF[name]}"), name)
