"""Readers and writers at once: no reader ever sees half of a batch. Seconds here, minutes in `make soak`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.online import OnlineReader, OnlineStore
from raymill.runtime.expressions import col
from raymill.runtime.spec import Col, FeatureView, Source

KEYS = 20
WITHIN_US = 3_599_999_999
"""A moment whose last hour holds every round."""
NAMES = [f"x{i}" for i in range(8)]
TICKS = Source(
    "ticks",
    key=["id"],
    time="at",
    schema={
        "id": Col("int64"),
        "at": Col("timestamp"),
        "who": Col("int64"),
        "name": Col("string"),
        **{c: Col("float64") for c in NAMES},
    },
)
PLAN = FeaturePlan.of_views(
    [
        FeatureView("newest", TICKS, entity="who", features=NAMES),
        FeatureView("named", TICKS, entity="name", features=NAMES),
        FeatureView(
            "windows", TICKS, entity="who", features={"last": col("x0").last("1h"), "max": col("x7").max("1h")}
        ),
    ],
    TICKS,
)


def batch(writer: int, round_: int) -> pa.Table:
    """Every key of the writer at one moment, all values the round's number."""
    who = np.arange(KEYS) * 2 + writer
    at = pa.array(np.full(KEYS, round_ * 1000)).cast(pa.timestamp("us", "UTC"))
    columns = {"id": who * 10**9 + round_, "at": at, "who": who, "name": [f"n{w}" for w in who]}
    return pa.table({**columns, **{c: np.full(KEYS, float(round_)) for c in NAMES}})


def write(path: str, writer: int, seconds: float) -> None:
    until_s = time.time() + seconds
    store = OnlineStore(path, PLAN)
    round_ = 1
    while time.time() < until_s:
        store.ingest("ticks", batch(writer, round_))
        round_ += 1
    store.close()


def read(path: str, seconds: float) -> int:
    """Vectors read; every one of a writer's must be of one round, and rounds never go back."""
    ask, done, seen = OnlineReader(path, PLAN), 0, np.zeros(2)
    until_s = time.time() + seconds
    while time.time() < until_s:
        for writer in (0, 1):
            asked = batch(writer, 0)
            x = ask.vectors(asked, np.full(KEYS, WITHIN_US, dtype=np.int64))
            assert len(np.unique(x)) == 1, f"torn: {np.unique(x)}"
            values, _ = ask.latest("newest", asked.column("who").to_pylist(), WITHIN_US)
            assert len(np.unique(values)) == 1, f"torn: {np.unique(values)}"
            assert seen[writer] <= x[0, 0] <= values[0, 0]
            seen[writer] = values[0, 0]
            done += 2
    ask.close()
    return done


CODE = "import sys; sys.path.insert(0, {tests!r}); import test_online_stress as t; print(t.{call})"


def stress(path: Path, seconds: float) -> int:
    """Two writers, four readers, each a process; how many reads."""
    store = OnlineStore(path, PLAN)
    for writer in (0, 1):
        store.ingest("ticks", batch(writer, 0))
    store.close()
    calls = [f"write({str(path)!r}, {w}, {seconds})" for w in (0, 1)] + [f"read({str(path)!r}, {seconds})"] * 4
    tests = str(Path(__file__).parent)
    processes = [
        subprocess.Popen([sys.executable, "-c", CODE.format(tests=tests, call=call)], stdout=subprocess.PIPE, text=True)
        for call in calls
    ]
    told: list[Any] = [(p.communicate()[0].strip(), p.returncode) for p in processes]
    assert [code for _, code in told] == [0] * 6, told
    return sum(int(text) for text, _ in told[2:])


def test_no_read_is_torn_while_two_writers_write(tmp_path: Path) -> None:
    assert stress(tmp_path / "online", 2.0) > 0


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_no_read_is_torn_in_minutes(tmp_path: Path) -> None:
    assert stress(tmp_path / "online", 180.0) > 1000
