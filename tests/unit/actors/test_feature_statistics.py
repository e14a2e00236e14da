"""Statistics of features against numpy, and who was never seen against the obvious loop."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.feature_statistics import QUANTILE_ROWS, describe, unseen, unseen_shares
from raymill.runtime.expressions import col
from raymill.runtime.spec import Col, FeatureView, Source

UTC_US = pa.timestamp("us", "UTC")
VISITS = Source(
    "visits", key=["n"], time="came", known_at="told",
    schema={
        "n": Col("int64"), "came": Col("timestamp"), "told": Col("timestamp", nullable=True),
        "who": Col("string", nullable=True), "what": Col("int64"),
    },
)  # fmt: skip
PLAN = FeaturePlan.of_views(
    [FeatureView("who", VISITS, entity=["who", "what"], features={"n": col("n").count("5s")})], VISITS
)
WHO, WHAT, WHEN = st.sampled_from(["a", "b", None]), st.integers(0, 2), st.integers(0, 9)


def visits(rows):
    who, what, came, told = zip(*rows, strict=True) if rows else ((), (), (), ())
    columns = [range(len(rows)), came, told, who, what]
    types = [pa.int64(), UTC_US, UTC_US, pa.string(), pa.int64()]
    return pa.table([pa.array(list(c), t) for c, t in zip(columns, types, strict=True)], names=list(VISITS.schema))


@settings(deadline=None)
@given(
    some.arrays(
        np.float32, st.tuples(st.integers(1, 40), st.just(2)), elements=st.floats(-99, 99, width=32) | st.just(np.nan)
    )
)
def test_statistics_are_those_of_numpy(x):
    for j, (name, told) in enumerate(describe(x, ["a", "b"]).items()):
        known = x[:, j][~np.isnan(x[:, j])].astype(np.float64)
        assert name == "ab"[j] and told["count"] == len(known)
        assert told["null_share"] == 1 - len(known) / len(x)
        if len(known):
            assert (told["mean"], told["std"]) == (known.mean(), known.std())
            deciles = np.quantile(known.astype(np.float32), np.linspace(0, 1, 11), method="inverted_cdf")
            assert told["quantiles"] == deciles.tolist()
        else:
            assert told["mean"] is told["std"] is told["quantiles"] is None


def test_quantiles_of_many_rows_are_taken_of_some_that_are_spread_over_all():
    x = np.arange(10 * QUANTILE_ROWS, dtype=np.float32)[:, None]
    quantiles = np.array(describe(x, ["a"])["a"]["quantiles"])
    assert np.allclose(quantiles, np.linspace(0, len(x), 11), atol=0.005 * len(x))


@settings(deadline=None)
@given(
    st.lists(st.tuples(WHO, WHAT, WHEN, st.none() | WHEN), max_size=8),
    st.lists(st.tuples(WHO, WHAT, WHEN), min_size=1, max_size=8),
)
def test_an_entity_is_unseen_until_its_first_event_is_known(events, asked):
    at = np.array([t for *_, t in asked], np.int64)
    rows = visits([(who, what, t, t) for who, what, t in asked])
    found = unseen(PLAN.event_views[0], visits(events), rows, at)
    slow = [
        who is None or not any((w, h) == (who, what) and k is not None and max(c, k) <= t for w, h, c, k in events)
        for who, what, t in asked
    ]
    assert found.tolist() == slow
    assert unseen_shares(PLAN, {"visits": visits(events)}, rows, at) == {"who": np.mean(slow)}
