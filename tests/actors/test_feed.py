"""Rows that come by themselves, while feed, data actor and Redis are killed: each once in the lake, and online."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import ray
import redis
from deltalake import write_deltalake

from raymill.actors.blocks import block_batches
from raymill.actors.data import DataActor
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.features import FeatureActor
from raymill.actors.feed import Feed
from raymill.actors.files import files_in
from raymill.actors.lake import Lake
from raymill.actors.online import OnlineReader
from raymill.actors.point_in_time import join
from raymill.actors.sources import file_batches
from raymill.jobs.cli.status import _feeds
from raymill.runtime.errors import ContractError
from raymill.runtime.home import Home
from raymill.runtime.records import NAME, RecordsActor, RemoteRecords
from raymill.runtime.spawn import Remote, find, spawn
from raymill.runtime.spec import Col, DeltaTable, Directory, Source
from tests.actors import feed_host, s3_server
from tests.unit.actors.redis_server import RedisServer, running

STOPS = 20
MOMENT_US = 1_700_000_000_000_000
UTC = pa.timestamp("us", "UTC")


def send(server: RedisServer, first: int, n: int) -> None:
    """Rides `first` … in one transaction, a bad one in ten."""
    with redis.Redis.from_url(server.url) as client:
        pipe = client.pipeline(transaction=True)
        for i in range(first, first + n):
            moment = np.datetime64(MOMENT_US + i * 1000, "us")
            pipe.xadd("rides", {"ride": i, "left": f"{moment}Z", "stop": i % STOPS, "delay": -1 if i % 10 == 9 else i})
        pipe.execute()


def check(home: Path, sent: int, url: str) -> None:
    """Every ride is in the lake or in quarantine, once; the online store answers as the join does."""
    rows = Lake(Home(home).lake).read("rides")
    assert sorted(rows["ride"].to_pylist()) == [i for i in range(sent) if i % 10 != 9]
    told = feed_host.pipeline(url)
    refused = DataActor(str(home), list(told.sources), lambda events: None, told.name).quarantine()
    assert [e.reason for e in refused] == ["range:delay"] * (sent // 10)
    plan = FeaturePlan.of(told)
    asked, at = pa.table({"stop": pa.array(range(STOPS))}), np.full(STOPS, MOMENT_US + sent * 1000)
    reader = OnlineReader(Home(home).online, plan)
    assert reader.vectors(asked, at).tobytes() == join(asked, plan, {"rides": rows}, at=at).tobytes()
    reader.close()


def until(holds: Callable[[], bool], limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_answering(server: RedisServer) -> bool:
    """Whether it has read what it keeps."""
    with suppress(redis.RedisError), redis.Redis.from_url(server.url) as client:
        return bool(client.ping())
    return False


def is_drained(server: RedisServer, sent: int) -> bool:
    """Whether the group was given everything and has acknowledged it."""
    with suppress(redis.RedisError), redis.Redis.from_url(server.url) as client:
        [(newest, _)] = client.xrevrange("rides", count=1)
        done = [g["last-delivered-id"] == newest and not g["pending"] for g in client.xinfo_groups("rides")]
        return done == [True] and client.xlen("rides") == sent
    return False


class Host:
    """`feed_host.py`, to be killed and started again."""

    def __init__(self, home: Path, url: str) -> None:
        self._words = [sys.executable, feed_host.__file__, str(home), url]
        self._process: subprocess.Popen[str] | None = None

    def start(self, wait: bool) -> None:
        self._process = subprocess.Popen(self._words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if wait:
            assert self._process.stdout.readline() == "following\n"

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def killed_at_random(folder: Path, kills: int, seed: int) -> None:
    """Send rides while the following process and Redis are killed at random moments."""
    dice, home, sent = random.Random(seed), folder / "home", 0
    (folder / "redis").mkdir()
    with running(folder / "redis") as server:
        host = Host(home, server.url)
        host.start(wait=True)
        try:
            for kill in range(kills):
                for _ in range(dice.randint(1, 8)):
                    n = dice.randint(1, 400)
                    send(server, sent, n)
                    sent += n
                    time.sleep(dice.random() * 0.1)
                if kill % 3 == 2:
                    server.kill()
                    time.sleep(dice.random() * 0.3)
                    server.start()
                    until(lambda: is_answering(server))
                else:
                    host.kill()
                    host.start(wait=dice.random() < 0.7)  # else killed while it starts
            until(lambda: is_drained(server, sent))
        finally:
            host.kill()
    check(home, sent, server.url)


def test_a_feed_and_its_redis_that_are_killed_at_random_lose_and_double_nothing(tmp_path: Path) -> None:
    killed_at_random(tmp_path, kills=3, seed=3)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_a_feed_and_its_redis_that_are_killed_often_lose_and_double_nothing(tmp_path: Path, seed: int) -> None:
    killed_at_random(tmp_path, kills=15, seed=seed)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=80 << 20, log_to_driver=False)
    yield
    ray.shutdown()


class WithPid:
    """Beside an actor, its process."""

    def pid(self) -> int:
        return os.getpid()


class DataWithPid(WithPid, DataActor):
    """The data actor under test."""


class FeaturesWithPid(WithPid, FeatureActor):
    """The feature actor under test."""


class FeedWithPid(WithPid, Feed):
    """The feed under test."""


@contextmanager
def fed(home: Path, url: str) -> Iterator[None]:
    """Data, features and feed as actors."""
    told = feed_host.pipeline(url)
    spawn(RecordsActor, str(home), name=NAME)
    spawn(DataWithPid, str(home), list(told.sources), RemoteRecords(), told.name, name="data/riding")
    spawn(FeaturesWithPid, str(home), told, RemoteRecords(), name="features/riding")
    takers = [Remote("features/riding")]
    spawn(FeedWithPid, told.sources, Remote("data/riding"), takers, name="feed/riding")
    try:
        yield
    finally:
        for name in ("feed/riding", "features/riding", "data/riding", NAME):
            ray.kill(find(name))


def test_actors_that_are_killed_one_after_the_other_lose_and_double_nothing(cluster: None, tmp_path: Path) -> None:
    with running(tmp_path) as server, fed(tmp_path / "home", server.url):
        sent = 0
        for names in (("data/riding", "feed/riding"), ("features/riding",)):
            pids = [Remote(name).pid() for name in names]
            for _ in range(4):
                send(server, sent, 50)
                sent += 50
                time.sleep(0.05)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        until(lambda: is_drained(server, sent))
        until(lambda: Remote("feed/riding").health()["sources"]["rides"]["state"] == "waiting")
        (told,) = _feeds()
        assert (told["pipeline"], told["source"], told["error"]) == ("riding", "rides", "")
        assert (told["waiting"], told["behind_s"]) == (0, 0.0) and told["last_batch"].startswith("rides/")
        check(tmp_path / "home", sent, server.url)


def test_files_and_delta_tables_in_an_object_store_come_in_as_those_of_this_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = pa.table({"id": pa.array([1, 2]), "moment": pa.array([1, 2], UTC), "text": ["a", "b"]})
    with s3_server.running() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        filesystem, path = pafs.FileSystem.from_uri(server.url("in/a.parquet"))
        with filesystem.open_output_stream(path) as opened:
            pq.write_table(rows, opened)
        write_deltalake(server.url("theirs"), rows, storage_options={"aws_allow_http": "true"})
        told = [
            replace(WIDE, name="files", read=Directory(server.url("in"))),
            replace(WIDE, name="table", read=DeltaTable(server.url("theirs"))),
        ]
        data = DataActor(str(tmp_path), told, lambda events: None, "p")
        data.start()
        feed = Feed(told, data)
        feed.start()
        until(lambda: all(p["rows"] == 2 for p in feed.health()["sources"].values()))
        feed.stop()
    assert all(Lake(Home(tmp_path).lake).read(s.name).sort_by("id").equals(rows) for s in told)


WIDE = Source(
    "wide",
    key=["id"],
    time="moment",
    schema={"id": Col("int64"), "moment": Col("timestamp"), "text": Col("string")},
)


def write_wide(folder: Path, files: int, rows: int, width: int) -> None:
    texts = pa.array([f"{i}".rjust(width, "x") for i in range(64)])
    for f in range(files):
        number = np.arange(rows) + f * rows
        text = pa.DictionaryArray.from_arrays(pa.array(number % 64, pa.int32()), texts).cast(pa.string())
        table = pa.table({"id": number, "moment": pa.array(number).cast(UTC), "text": text})
        pq.write_table(table, folder / f"{f}.parquet", row_group_size=4096)


def test_a_folder_larger_than_the_object_store_comes_block_by_block_as_file_by_file(
    cluster: None, tmp_path: Path
) -> None:
    write_wide(tmp_path, files=2, rows=140_000, width=400)  # 120 MB; the store has 80
    pq.write_table(pq.read_table(tmp_path / "0.parquet").slice(0, 0), tmp_path / "0x.parquet")
    files = files_in(str(tmp_path))
    blocks = ((i, t.num_rows, t["id"][0].as_py() if len(t) else None) for i, t in block_batches(files, WIDE, {}))
    one_by_one = (
        (i, t.num_rows, t["id"][0].as_py() if len(t) else None) for f in files for i, t in file_batches(f.place, WIDE)
    )
    assert list(blocks) == list(one_by_one)


def test_a_file_that_is_damaged_is_named(cluster: None, tmp_path: Path) -> None:
    write_wide(tmp_path, files=1, rows=10, width=1)
    (tmp_path / "1.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(ContractError, match=r"1\.parquet"):
        list(block_batches(files_in(str(tmp_path)), WIDE, {}))
