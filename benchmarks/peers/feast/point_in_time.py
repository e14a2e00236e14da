"""Feast: `get_historical_features` of its file offline store (Parquet), as its quickstart shows."""

from __future__ import annotations

import sys
import tempfile
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Float64

sys.path.insert(0, str(Path(__file__).parents[1]))
from answering import answer


@cache
def store(events: str, columns: tuple[str, ...]) -> FeatureStore:
    folder = tempfile.mkdtemp(prefix="raymill-feast-")
    opened = FeatureStore(
        config=RepoConfig(
            registry=f"{folder}/registry.db",
            project="bench",
            provider="local",
            online_store={"type": "sqlite", "path": f"{folder}/online.db"},
            entity_key_serialization_version=3,
        )
    )
    entity = Entity(name="entity", join_keys=["entity"], value_type=ValueType.INT64)
    source = FileSource(path=events, timestamp_field="at")
    fields = [Field(name=c, dtype=Float64) for c in columns]
    view = FeatureView(
        name="v", entities=[entity], ttl=timedelta(days=3650), schema=fields, source=source, online=False
    )
    opened.apply([entity, view])
    return opened


def latest(told: dict[str, Any]) -> Any:
    opened = store(told["events"], tuple(told["columns"]))
    labels = pd.read_parquet(told["labels"]).rename(columns={"at": "event_timestamp"})
    asked = [f"v:{c}" for c in told["columns"]]
    found = opened.get_historical_features(entity_df=labels, features=asked).to_df()
    return lambda: found.sort_values("row")[told["columns"]].to_numpy(np.float32)


answer({"latest": latest})
