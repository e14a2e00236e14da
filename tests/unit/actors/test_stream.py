"""Cut in time or by entity, the join answers what it answers at once, bit for bit, in the memory it is given."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.point_in_time import join
from raymill.actors.slices import Span, cut
from raymill.actors.stream import stream
from raymill.runtime.errors import ContractError
from tests.unit.actors.slow_join import PLAN, random_events, random_rows, table

UTC = pa.timestamp("us", "UTC")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), memory_bytes=st.sampled_from([3_000, 20_000]))
@pytest.mark.long
def test_slices_in_time_together_answer_what_the_whole_does(seed: int, memory_bytes: int) -> None:
    dice = random.Random(seed)
    facts, asked = random_events(dice, dice.randrange(60)), random_rows(dice, dice.randrange(1, 26))
    if dice.random() < 0.3:
        facts.sort(key=lambda e: e["happened"])
    facts += dice.sample(facts, dice.randrange(len(facts) // 4 + 1))
    at = np.array([r["at"] for r in asked], dtype=np.int64)
    whole = join(table(asked), PLAN, {"events": table(facts)}, at=at)
    pieces = list(stream(table(asked), PLAN, {"events": table(facts)}, at=at, memory_bytes=memory_bytes))
    rows = np.concatenate([r for r, _ in pieces])
    assert sorted(rows.tolist()) == list(range(len(asked)))
    assert (np.diff(at[rows]) >= 0).all()
    assert np.concatenate([x for _, x in pieces]).tobytes() == whole[rows].tobytes()


def test_source_that_is_missing_is_named_before_anything_is_read() -> None:
    with pytest.raises(ContractError, match="'events'"):
        next(stream(table(random_rows(random.Random(0), 3)), PLAN, {}, at=np.zeros(3, dtype=np.int64)))


@settings(max_examples=100, deadline=None)
@given(
    moments=st.lists(st.integers(0, 10_000), min_size=1, max_size=60).map(sorted),
    spans=st.lists(st.tuples(st.integers(0, 9_000), st.integers(0, 2_000), st.integers(1, 500)), max_size=8),
    most_rows=st.integers(1, 20),
)
def test_cuts_end_at_the_last_moment_and_hold_no_more_than_was_said(
    moments: list[int], spans: list[tuple[int, int, int]], most_rows: int
) -> None:
    events = [Span(a, a + n, float(size)) for a, n, size in spans]
    ends = cut(np.array(moments), events, -1, most_rows, 200.0)
    assert ends == sorted(set(ends))
    assert ends[-1] == moments[-1]
    for low, high in zip([-1, *ends], ends, strict=False):
        asked = [m for m in moments if low < m <= high]
        assert len(asked) <= most_rows or len(set(asked[most_rows - 1 :])) == 1
        inside = sum(
            s.size_bytes * (min(high, s.last_us) - max(low, s.first_us - 1)) / (s.last_us - s.first_us + 1)
            for s in events
            if min(high, s.last_us) > max(low, s.first_us - 1)
        )
        # A cut lies on a whole microsecond: what lies in one comes on top.
        assert inside <= 200 + sum(s.size_bytes / (s.last_us - s.first_us + 1) for s in events) + 1e-6


JOINED = """
import json, sys
import numpy as np
import pyarrow as pa
from raymill.actors.lake import Lake
from raymill.actors.stream import stream
from tests.unit.actors.test_stream import memory, wide_plan

def answer(name, memory_bytes):
    lake = Lake(sys.argv[1])
    parts, labels = lake.parts(name, by="at"), lake.read("labels")
    total = 0.0
    for _, x in stream(labels, wide_plan(), {"facts": parts}, at="at", memory_bytes=memory_bytes):
        total += float(np.nansum(x.astype(np.float64)))
    return total

answer("small", 1 << 20)
before = memory()
total = answer("facts", int(sys.argv[2]))
print(json.dumps({"total": total, "grown_bytes": memory() - before}))
"""
VALUES = [f"x{i}" for i in range(10)]


def wide_plan() -> FeaturePlan:
    from raymill.runtime.expressions import col
    from raymill.runtime.spec import Col, FeatureView, Source

    schema = {"id": Col("int64"), "at": Col("timestamp"), "who": Col("int64"), **{c: Col("float64") for c in VALUES}}
    source = Source("facts", key=["id"], time="at", schema=schema)
    features = {c: col(c) for c in VALUES}
    return FeaturePlan.of_views([FeatureView("v", source, entity="who", features=features)], source)


def memory() -> int:
    """Most memory that this process has had, bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) << 10


@pytest.mark.long
@pytest.mark.parametrize("n", [1_040_000, pytest.param(2_600_000, marks=pytest.mark.soak)])
def test_table_of_five_times_the_memory_is_joined_in_that_memory(tmp_path: Path, n: int) -> None:
    lake, dice, memory_bytes = Lake(tmp_path), np.random.default_rng(0), n * 20
    at = pa.array(np.arange(n) * 1_000).cast(UTC)
    rows = {"id": pa.array(np.arange(n)), "at": at, "who": pa.array(dice.integers(0, 2_000, n))}
    facts = pa.table(rows | {c: pa.array(dice.normal(size=n)) for c in VALUES})
    assert facts.nbytes > 5 * memory_bytes
    for first in range(0, n, n // 5):
        lake.append("facts", facts.slice(first, n // 5), batch_id=str(first))
    lake.append("small", facts.slice(0, 1000), batch_id="0")
    labels = facts.select(["id", "at", "who"]).take(pa.array(np.sort(dice.integers(0, n, 20_000))))
    lake.append("labels", labels, batch_id="0")
    command = [sys.executable, "-c", JOINED, str(tmp_path), str(memory_bytes)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd()).stdout)
    whole = join(labels, wide_plan(), {"facts": facts}, at="at")
    assert told["total"] == pytest.approx(float(np.nansum(whole.astype(np.float64))), rel=1e-9)
    assert told["grown_bytes"] < memory_bytes
