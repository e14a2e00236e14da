"""Feast: `get_online_features` of its SQLite and Redis online stores, as its quickstart shows."""

from __future__ import annotations

import sys
import tempfile
import time
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
def store(events: str, columns: tuple[str, ...], redis: str | None) -> FeatureStore:
    folder = tempfile.mkdtemp(prefix="raymill-feast-")
    sqlite = {"type": "sqlite", "path": f"{folder}/online.db"}
    opened = FeatureStore(
        config=RepoConfig(
            registry=f"{folder}/registry.db",
            project="bench",
            provider="local",
            online_store={"type": "redis", "connection_string": redis} if redis else sqlite,
            entity_key_serialization_version=3,
        )
    )
    entity = Entity(name="entity", join_keys=["entity"], value_type=ValueType.INT64)
    source = FileSource(path=events, timestamp_field="at")
    fields = [Field(name=c, dtype=Float64) for c in columns]
    view = FeatureView(name="v", entities=[entity], ttl=timedelta(days=36500), schema=fields, source=source)
    opened.apply([entity, view])
    opened.write_to_online_store("v", pd.read_parquet(events))
    return opened


def read(told: dict[str, Any]) -> dict[str, float]:
    """`told["calls"]` reads of `told["keys"]` random entities; the first `told["warm"]` are not counted."""
    opened = store(told["events"], tuple(told["columns"]), told.get("redis"))
    asked = [f"v:{c}" for c in told["columns"]]
    dice = np.random.default_rng(0)
    took = []
    for _ in range(told["warm"] + told["calls"]):
        rows = [{"entity": int(e)} for e in dice.integers(0, told["entities"], told["keys"])]
        begun = time.perf_counter()
        opened.get_online_features(features=asked, entity_rows=rows).to_dict()
        took.append(time.perf_counter() - begun)
    p50, p99 = np.percentile(took[told["warm"] :], [50, 99]) * 1e6
    return {"p50_us": float(p50), "p99_us": float(p99)}


answer({"read": read})
