"""A batch is in the lake once, whatever happens; versions stay readable."""

import threading
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from raymill.actors.lake import Lake
from raymill.runtime.errors import Conflict, ContractError, StoreError

MOMENT = pa.timestamp("us", "UTC")


def rows(*numbers: int) -> pa.Table:
    return pa.table({"n": pa.array(numbers, pa.int64()), "t": pa.array(numbers, MOMENT)})


def numbers(lake: Lake, **how) -> list[int]:
    return sorted(lake.read("numbers", **how)["n"].to_pylist())


def test_a_table_that_nobody_wrote_is_told_as_absent(tmp_path):
    lake = Lake(tmp_path)
    assert (lake.tables(), lake.version("numbers"), lake.count("numbers")) == ([], None, 0)
    assert not lake.has_batch("numbers", "a")
    with pytest.raises(StoreError, match="numbers"):
        lake.read("numbers")


def test_a_repeated_batch_writes_nothing_and_returns_a_version_that_holds_it(tmp_path):
    lake = Lake(tmp_path)
    first = lake.append("numbers", rows(1, 2), batch_id="a")
    assert lake.append("numbers", rows(1, 2), batch_id="a") == first
    assert Lake(tmp_path).append("numbers", rows(1, 2), batch_id="a") == first
    assert numbers(lake, version=first) == [1, 2]
    assert lake.tables() == ["numbers"]


def test_an_empty_batch_is_remembered_too(tmp_path):
    lake = Lake(tmp_path)
    lake.append("numbers", rows(), batch_id="empty")
    assert Lake(tmp_path).batch_rows("numbers", "empty") == 0
    assert lake.batch_rows("numbers", "other") is None


def test_every_version_stays_readable_and_what_another_writer_adds_is_seen(tmp_path):
    one, other = Lake(tmp_path), Lake(tmp_path)
    versions = [one.append("numbers", rows(1), batch_id="1")]
    versions.append(other.append("numbers", rows(2), batch_id="2"))
    versions.append(one.append("numbers", rows(3), batch_id="3"))
    assert [numbers(one, version=v) for v in versions] == [[1], [1, 2], [1, 2, 3]]
    assert other.version("numbers") == one.version("numbers") == versions[-1]
    assert other.batch_rows("numbers", "3") == 1


def test_microseconds_are_found_where_the_statistics_of_files_hold_milliseconds(tmp_path):
    lake = Lake(tmp_path)
    lake.append("numbers", rows(1_000_000_000_123_456, 1_000_000_000_123_999), batch_id="a")
    exact, last = (datetime.fromtimestamp(1_000_000_000, UTC).replace(microsecond=m) for m in (123_456, 123_999))
    assert numbers(lake, where=[("t", "=", exact)]) == [1_000_000_000_123_456]
    assert numbers(lake, where=[("t", ">=", last)]) == [1_000_000_000_123_999]
    assert numbers(lake, where=[("n", "in", [5])], columns=["n"]) == []


def test_rows_of_other_columns_or_types_are_refused_by_name(tmp_path):
    lake = Lake(tmp_path)
    lake.append("numbers", rows(1), batch_id="a")
    with pytest.raises(ContractError, match="t is missing"):
        lake.append("numbers", rows(1).select(["n"]), batch_id="b")
    with pytest.raises(ContractError, match="n is"):
        lake.append("numbers", rows(1).set_column(0, "n", pa.array(["x"])), batch_id="b")
    assert lake.append("numbers", rows(2).select(["t", "n"]), batch_id="b") == 2
    assert numbers(lake) == [1, 2]


def test_the_columns_of_predictions_come_back_as_they_went_in(tmp_path):
    lake = Lake(tmp_path)
    sent = pa.table(
        {"x": pa.array([[1.5, None], []], pa.list_(pa.float32())), "p": pa.array([0.5, None], pa.float32())}
    )
    lake.append("predictions", sent, batch_id="a")
    assert lake.read("predictions").to_pylist() == sent.to_pylist()
    assert lake.read("predictions").schema.field("p").type == pa.float32()


def test_a_name_that_leads_out_of_the_lake_is_refused(tmp_path):
    with pytest.raises(StoreError, match="can not name"):
        Lake(tmp_path).append("../numbers", rows(1), batch_id="a")


def test_writers_at_once_with_the_same_and_other_batches_lose_and_double_nothing(tmp_path):
    lakes = [Lake(tmp_path) for _ in range(4)]  # each with its own view of the table, as processes have
    failed = []

    def write(lake: Lake) -> None:
        try:
            for n in range(6):
                lake.append("numbers", rows(n), batch_id=f"shared-{n}")
                lake.append(
                    "numbers", rows(1000 + 100 * lakes.index(lake) + n), batch_id=f"own-{lakes.index(lake)}-{n}"
                )
        except BaseException as err:
            failed.append(err)
            raise

    threads = [threading.Thread(target=write, args=(lake,)) for lake in lakes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert numbers(lakes[0]) == sorted([*range(6), *(1000 + 100 * w + n for w in range(4) for n in range(6))])


def test_writers_that_make_the_same_table_at_once_make_one(tmp_path):
    for n in range(6):
        start, failed = threading.Barrier(4), []

        def write(writer: int, n=n, start=start, failed=failed) -> None:
            start.wait()
            try:
                Lake(tmp_path / str(n)).append("numbers", rows(writer), batch_id=str(writer))
            except BaseException as err:
                failed.append(err)
                raise

        threads = [threading.Thread(target=write, args=(w,)) for w in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        commits = [c.read_text() for c in (tmp_path / str(n) / "numbers/_delta_log").glob("*.json")]
        assert not failed
        assert sum('"metaData"' in c for c in commits) == 1
        assert numbers(Lake(tmp_path / str(n))) == [0, 1, 2, 3]


def test_rows_since_a_version_are_those_of_later_files(tmp_path):
    lake = Lake(tmp_path)
    first = lake.append("t", pa.table({"a": [1, 2], "b": [0, 0]}), batch_id="1")
    last = lake.append("t", pa.table({"a": [3, 4], "b": [0, 0]}), batch_id="2")
    lake.append("t", pa.table({"a": [5], "b": [0]}), batch_id="3")
    assert sorted(lake.read("t", since=first, columns=["a"]).to_pydict()["a"]) == [3, 4, 5]
    assert lake.read("t", since=first, version=last, where=[("a", ">", 3)]).to_pydict() == {"a": [4], "b": [0]}
    assert lake.read("t", since=last, version=last).num_rows == 0
    assert lake.read("t", since=99).num_rows == 5


def test_rows_that_hold_for_one_version_are_not_appended_to_a_later_one(tmp_path):
    one, other = Lake(tmp_path), Lake(tmp_path)
    rows = pa.table({"a": [1]})
    seen = one.append("t", rows, batch_id="1")
    later = other.append("t", rows, batch_id="2")
    with pytest.raises(Conflict, match="no longer at"):
        one.append("t", rows, batch_id="3", after=seen)
    assert one.append("t", rows, batch_id="3", after=later) == later + 1
    assert one.append("t", rows, batch_id="3", after=later) == later + 1
    assert one.count("t") == 3
