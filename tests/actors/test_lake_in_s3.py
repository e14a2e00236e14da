"""The lake in a real S3 server: exactly once, whoever writes, and its parts read by the join as from a disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pyarrow as pa
import pytest

from raymill.actors import lake_place
from raymill.actors.lake import Lake
from raymill.runtime.errors import StoreError
from tests.actors import s3_server
from tests.actors.s3_server import S3Server

WRITER = """
import sys
import pyarrow as pa
from raymill.actors import lake_place
from raymill.actors.lake import Lake
lake = Lake(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for n in range(6):
    lake.append("numbers", pa.table({"n": [n]}), batch_id=f"shared-{n}")
    lake.append("numbers", pa.table({"n": [int(sys.argv[2]) + n]}), batch_id=f"own-{sys.argv[2]}-{n}")
"""


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
    url = server.url("two-writers")
    command = [sys.executable, "-c", WRITER, url]
    writers = [
        subprocess.Popen([*command, own], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for own in ("100", "200")
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [w.wait(60) for w in writers] == [0, 0]
    for writer in writers:
        writer.communicate()
    assert numbers(Lake(url)) == sorted([*range(6), *range(100, 106), *range(200, 206)])


def test_an_endpoint_that_does_not_answer_is_told_with_what_to_check(server: S3Server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(lake_place, "RETRY_FOR", "1s")
    with pytest.raises(StoreError, match=r"s3://lakes/nobody.*AWS_"):
        Lake("s3://lakes/nobody").version("numbers")
