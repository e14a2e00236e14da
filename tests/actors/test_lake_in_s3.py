"""The lake in a real S3 server: exactly once, whoever writes, and its parts read by the join as from a disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raymill.actors import lake_place
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.point_in_time import join
from raymill.runtime.errors import StoreError
from raymill.runtime.expressions import col
from raymill.runtime.spec import Col, FeatureView, RenameColumn, Source
from tests.actors import s3_server
from tests.actors.lake_worker import processes, share
from tests.actors.s3_server import S3Server

SCHEMA = {"id": Col("int64"), "t": Col("timestamp"), "x": Col("float64")}
FACTS = Source("facts", schema=SCHEMA, key=["id"], time="t")
PLAN = FeaturePlan.of_views([FeatureView("v", FACTS, entity="id", features={"sum": col("x").sum("1h")})], FACTS)
WIDE = Source(
    "facts",
    schema={"id": Col("int64"), "t": Col("timestamp"), "y": Col("float64")},
    key=["id"],
    time="t",
    migrations=[RenameColumn("x", "y")],
)


def facts(number: int) -> pa.Table:
    i = np.arange(500 * number, 500 * (number + 1))
    return pa.table({"id": i % 7, "t": pa.array(i * 1_000_000, pa.timestamp("us", "UTC")), "x": i / 7})


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server.running() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


def numbers(lake: Lake) -> list[int]:
    return sorted(lake.read("numbers")["n"].to_pylist())


def test_a_lake_in_a_bucket_appends_each_batch_once_and_keeps_every_version(server: S3Server):
    lake = Lake(server.url("once"))
    assert (lake.tables(), lake.version("numbers"), lake.count("numbers")) == ([], None, 0)
    with pytest.raises(StoreError, match="no lake table 'numbers'"):
        lake.read("numbers")
    first = lake.append("numbers", pa.table({"n": [1, 2]}), batch_id="a")
    assert lake.append("numbers", pa.table({"n": [1, 2]}), batch_id="a") == first
    assert Lake(server.url("once")).append("numbers", pa.table({"n": [3]}), batch_id="b") == first + 1
    assert (lake.version("numbers"), lake.count("numbers"), lake.tables()) == (first + 1, 3, ["numbers"])
    assert numbers(lake) == [1, 2, 3]
    assert lake.read("numbers", version=first)["n"].to_pylist() == [1, 2]


def test_two_processes_that_write_at_once_lose_and_double_nothing(server: S3Server):
    url, context, pipes, writers = server.url("two-writers"), processes(), [], []
    for own in (100, 200):
        ours, theirs = context.Pipe()
        writers.append(context.Process(target=share, args=(url, server.environment, own, theirs), daemon=True))
        writers[-1].start()
        pipes.append(ours)
    assert [pipe.recv() for pipe in pipes] == ["ready", "ready"]
    for pipe in pipes:
        pipe.send("go")
    for writer in writers:
        writer.join(60)
    assert [w.exitcode for w in writers] == [0, 0]
    assert numbers(Lake(url)) == sorted([*range(6), *range(100, 106), *range(200, 206)])


def test_upkeep_and_parts_of_a_lake_in_a_bucket_are_as_on_a_disk(server: S3Server, tmp_path: Path):
    local, remote = Lake(tmp_path / "lake"), Lake(server.url("parts"), tmp_path / "copies")
    for lake in (local, remote):
        for number in (2, 0, 1):
            lake.append("facts", facts(number), batch_id=str(number), by="t")
    pinned = remote.version("facts")
    for merge in (False, True):
        if merge:
            assert remote.compact("facts", fewest=2) is not None
        stored = [lake.parts("facts", by="t") for lake in (local, remote)]
        assert stored[0].table(["id", "t", "x"]).equals(stored[1].table(["id", "t", "x"]))
        assert all(stored[1].place(block, "x") is not None for block in stored[1].blocks())
        vectors = [join(facts(3), PLAN, {"facts": parts}, at="t").tobytes() for parts in stored]
        assert vectors[0] == vectors[1]
    copies = sorted((tmp_path / "copies").iterdir())
    remote.parts("facts")
    assert len(copies) == 4 and sorted((tmp_path / "copies").iterdir()) == copies  # each is fetched once
    later = time.time() + 86_400
    assert remote.vacuum("facts", pins={pinned}, older_than_s=3600, now_s=later).files == []
    assert len(remote.vacuum("facts", pins=(), older_than_s=3600, now_s=later).files) == 3
    assert remote.migrate(WIDE) == remote.version("facts")
    assert remote.read("facts").sort_by("t")["y"].to_pylist() == local.read("facts").sort_by("t")["x"].to_pylist()


def test_an_endpoint_that_does_not_answer_is_told_with_what_to_check(server: S3Server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(lake_place, "RETRY_FOR", "1s")
    with pytest.raises(StoreError, match=r"s3://lakes/nobody.*AWS_"):
        Lake("s3://lakes/nobody").version("numbers")
