"""The features of the point-in-time benchmark."""

from __future__ import annotations

from raymill.actors.feature_plan import FeaturePlan
from raymill.runtime.expressions import col
from raymill.runtime.spec import Col, FeatureView, Source

VALUES = [f"x{i}" for i in range(10)]
SCHEMA = {
    "id": Col("int64"),
    "at": Col("timestamp"),
    "known": Col("timestamp"),
    "entity": Col("int64"),
    **{c: Col("float64") for c in VALUES},
}
COLUMNS = len(SCHEMA)
AT_ONCE = Source("events", key=["id"], time="at", schema=SCHEMA)
LATER = Source("events", key=["id"], time="at", known_at="known", schema=SCHEMA)
NAMED = Source("named", key=["id"], time="at", schema={**SCHEMA, "name": Col("string")})
TOTALS = {
    "mean_6h": col("x0").mean("6h"),
    "mean_7d": col("x0").mean("7d"),
    "count_6h": col("x0").count("6h"),
    "count_7d": col("x0").count("7d"),
}
_NEWEST = FeatureView("newest", AT_ONCE, entity="entity", features=VALUES)
NEWEST = FeaturePlan.of_views([_NEWEST], AT_ONCE)
WINDOWS = FeaturePlan.of_views([FeatureView("windows", LATER, entity="entity", features=TOTALS)], LATER)
NEWEST_BY_NAME = FeaturePlan.of_views([FeatureView("named", NAMED, entity="name", features=VALUES)], NAMED)
NEWEST_AND_WINDOWS = FeaturePlan.of_views(
    [_NEWEST, FeatureView("windows", AT_ONCE, entity="entity", features=TOTALS)], AT_ONCE
)
