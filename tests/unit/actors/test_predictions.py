"""The prediction log: on disk before it is sent, shipped once, whoever dies when."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors import predictions
from raymill.actors.lake import Lake
from raymill.actors.prediction_rows import Scored, decode, encode
from raymill.actors.prediction_sink import LakeSink
from raymill.actors.predictions import PredictionLog, read_segment
from raymill.runtime.errors import StoreError
from tests.unit.actors.serving_parts import ListSink


def scored(*ids, p=0.5, version=1, role="live", model="taxi", text=b'{"a":1}'):
    n = len(ids)
    return Scored(
        model=model,
        ids=list(ids),
        versions=np.full(n, version),
        roles=[role] * n,
        at=np.arange(n),
        keys=[f"[{i}]" for i in range(n)],
        texts=[text] * n,
        x=np.arange(2 * n, dtype=np.float32).reshape(n, 2),
        p=np.full(n, p, dtype=np.float32),
    )


@pytest.fixture
def log(tmp_path):
    found = PredictionLog(tmp_path / "spool", ListSink(), replica="r1")
    found.start()
    yield found
    found.stop()


def test_a_logged_row_has_every_column(tmp_path, log):
    log.record(scored("a", "b"), [scored("a", "b", p=0.75, version=2, role="shadow")])
    log.flush()
    rows = log._sink.rows()
    assert [(r["id"], r["version"], r["role"], r["p"]) for r in rows] == [
        ("a", 1, "live", 0.5),
        ("b", 1, "live", 0.5),
        ("a", 2, "shadow", 0.75),
        ("b", 2, "shadow", 0.75),
    ]
    assert rows[1]["x"] == [2.0, 3.0]
    assert (rows[1]["key"], rows[1]["row"], rows[1]["replica"]) == ("[1]", '{"a":1}', "r1")


def test_an_id_that_comes_again_gets_its_first_answer_and_is_logged_once(log):
    log.record(scored("a", "b", p=0.5), [])
    versions, p = log.record(scored("b", "c", p=0.75, version=2), [scored("b", "c", version=3, role="shadow")])
    assert (versions.tolist(), p.tolist()) == ([1, 2], [0.5, 0.75])
    log.record(scored("a", p=0.25, model="other"), [])
    log.flush()
    logged = [(r["model"], r["id"], r["role"]) for r in log._sink.rows()]
    assert logged == [("taxi", i, "live") for i in "abc"] + [("taxi", "c", "shadow"), ("other", "a", "live")]


def test_the_next_replica_ships_what_a_killed_one_left_and_knows_its_answers(tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        import numpy as np
        from raymill.actors.prediction_rows import Scored
        from raymill.actors.predictions import PredictionLog
        log = PredictionLog(Path(sys.argv[1]), None, replica="dead")
        log.start()
        log.record(Scored(
            model="taxi", ids=["a", "b"], versions=np.array([1, 1]), roles=["live"] * 2, at=np.arange(2),
            keys=[None] * 2, texts=[b"{}"] * 2, x=np.zeros((2, 2), np.float32), p=np.full(2, 0.5, np.float32),
        ), [])
        print("answered", flush=True)
        time.sleep(60)
    """
    spool = tmp_path / "spool"
    dead = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(spool)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert dead.stdout.readline() == "answered\n"
    heir = PredictionLog(spool, ListSink(), replica="heir")
    heir.start()
    heir.flush()
    assert heir._sink.rows() == []  # it lives: its segments are its own
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    versions, p = heir.record(scored("a", "new", p=0.75, version=2), [])
    assert (versions.tolist(), p.tolist()) == ([1, 2], [0.5, 0.75])
    assert heir.flush()
    assert sorted((r["id"], r["replica"]) for r in heir._sink.rows()) == [("a", "dead"), ("b", "dead"), ("new", "heir")]
    heir.stop()


def test_an_answer_that_was_shipped_is_still_known_after_a_restart(tmp_path):
    first = PredictionLog(tmp_path, ListSink(), replica="r1")
    first.start()
    first.record(scored("a", p=0.5), [])
    first.stop()
    second = PredictionLog(tmp_path, ListSink(), replica="r2")
    second.start()
    assert second.record(scored("a", p=0.75, version=2), [])[1].tolist() == [0.5]
    second.stop()
    assert second._sink.rows() == []


def test_a_shipped_segment_is_kept_only_where_an_id_in_it_may_come_again(tmp_path, log):
    spool = tmp_path / "spool"
    log.record(scored("fresh", text=None), [scored("fresh", text=None, version=2, role="shadow")])
    assert log.flush() and [r["id"] for r in log._sink.rows()] == ["fresh", "fresh"]
    assert not [p for p in spool.glob("*/*") if p.name != "lock"]
    log.record(scored("other", text=None), [])
    log.record(scored("a"), [])
    log.record(scored("another", text=None), [])
    assert log.flush()
    assert [p.suffix for p in spool.glob("*/*") if p.name != "lock"] == [".shipped"]


def test_a_sink_that_fails_gets_the_segment_again(tmp_path):
    log = PredictionLog(tmp_path, ListSink(fails=2), replica="r1")
    log.start()
    log.record(scored("a"), [])
    assert not log.flush()
    assert "the sink is away" in log.last_error
    assert not log.flush()
    assert log.flush()
    assert [r["id"] for r in log._sink.rows()] == ["a"]
    log.stop()


def test_the_log_ships_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "SHIP_AFTER_S", 0.0)
    log = PredictionLog(tmp_path, ListSink(), replica="r1")
    log.start()
    log.record(scored("a"), [])
    while not log.shipped_rows:
        time.sleep(0.01)
    log.stop()


@pytest.mark.parametrize(
    ("rows", "age_s", "full"),
    [(1, 4.9, False), (1, 5, True), (20_000, 0.9, False), (20_000, 1, True), (249_999, 0, False), (250_000, 0, True)],
)
def test_a_segment_is_shipped_when_it_is_old_or_large_but_large_ones_not_more_than_one_a_second(rows, age_s, full):
    assert predictions._is_full(rows, age_s) == full


def test_a_torn_tail_hides_nothing_before_it(tmp_path, log):
    log.record(scored("a"), [])
    log.record(scored("b"), [])
    log.record(scored("c"), [])
    path = log._segment.path
    whole = path.read_bytes()
    torn = tmp_path / "torn.frames"
    seen = set()
    for size in range(0, len(whole), 7):
        torn.write_bytes(whole[:size])
        seen.add(tuple(read_segment(torn).column("id").to_pylist()))
    assert seen == {(), ("a",), ("a", "b")}


def test_a_full_disk_is_an_error_and_what_was_written_before_stays(log, monkeypatch):
    log.record(scored("a"), [])

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 100

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            done = self.file.write(data[: self.left])
            self.left -= done
            return done

        def __getattr__(self, name):
            return getattr(self.file, name)

    segment = log._segment
    segment._file = Full(segment._file)
    with pytest.raises(StoreError, match="make room"):
        log.record(scored("b"), [])
    segment._file = segment._file.file
    log.record(scored("c"), [])
    log.flush()
    assert [r["id"] for r in log._sink.rows()] == ["a", "c"]


def lake_in(folder):
    lake = Lake(folder / "lake")
    return lambda model: lake


def batch(*ids, wall_s=1000.0, **fields):
    return decode(encode(scored(*ids, **fields), "r", wall_s))


def test_the_sink_writes_an_id_once_whoever_sends_it_and_shows_the_monitor_the_same(tmp_path):
    seen = []
    sink = LakeSink(lake_in(tmp_path), tmp_path / "lock", lambda *segment: seen.append(segment) or True)
    sink.ship("s1", batch("a", "b"))
    sink.ship("s1", batch("a", "b"))
    sink.ship("s2", pa.concat_tables([batch("b", "c", p=0.75), batch("b", "c", version=2, role="shadow")]))
    sink.ship("s3", batch("a", model="other"))
    rows = Lake(tmp_path / "lake").read("predictions").to_pylist()
    found = sorted((r["model"], r["id"], r["role"], r["p"]) for r in rows)
    assert found == [
        ("other", "a", "live", 0.5),
        ("taxi", "a", "live", 0.5),
        ("taxi", "b", "live", 0.5),
        ("taxi", "b", "shadow", 0.5),
        ("taxi", "c", "live", 0.75),
        ("taxi", "c", "shadow", 0.5),
    ]
    assert [(model, segment, t.num_rows) for model, segment, t in seen] == [
        ("taxi", "s1", 2),
        ("taxi", "s2", 3),
        ("other", "s3", 1),
    ]
    sink.ship("s4", pa.concat_tables([batch("d"), batch("e", "f", model="other")]))
    assert sorted((model, t.column("id").to_pylist()) for model, _, t in seen[3:]) == [
        ("other", ["e", "f"]),
        ("taxi", ["d"]),
    ]


def test_a_monitor_that_fails_keeps_the_segment_out_of_the_lake_until_it_took_it(tmp_path):
    calls = []

    def observe(model, segment, rows):
        calls.append(segment)
        if len(calls) == 1:
            raise OSError("away")
        return True

    sink = LakeSink(lake_in(tmp_path), tmp_path / "lock", observe)
    with pytest.raises(OSError, match="away"):
        sink.ship("s1", batch("a"))
    sink.ship("s1", batch("a"))
    assert calls == ["s1", "s1"]
    assert Lake(tmp_path / "lake").count("predictions") == 1


def test_a_monitor_that_comes_while_the_rows_go_into_the_lake_sees_them(tmp_path):
    calls = []

    def observe(model, segment, rows):
        calls.append(Lake(tmp_path / "lake").count("predictions"))
        return len(calls) > 1

    LakeSink(lake_in(tmp_path), tmp_path / "lock", observe).ship("s1", batch("a"))
    assert calls == [0, 1]


def test_an_id_that_comes_days_later_is_still_written_once(tmp_path):
    sink = LakeSink(lake_in(tmp_path), tmp_path / "lock", lambda *_: True)
    sink.ship("s1", batch("a", "b", wall_s=1000.0))
    sink.ship("s2", batch("b", "a", wall_s=1e9))
    assert Lake(tmp_path / "lake").count("predictions") == 2


def test_replicas_of_two_hosts_that_ship_at_once_write_an_id_once(tmp_path):
    lake = Lake(tmp_path / "lake")
    others = LakeSink(lambda model: lake, tmp_path / "lock of b", lambda *_: True)

    def overtaken(model, segment, rows):
        if segment == "a1":  # the other host's segment comes between the look and the append
            others.ship("b1", batch("x", "y"))
        return True

    LakeSink(lake_in(tmp_path), tmp_path / "lock of a", overtaken).ship("a1", batch("y", "z"))
    assert sorted(lake.read("predictions").column("id").to_pylist()) == ["x", "y", "z"]
    assert lake.has_batch("predictions", "a1")


def test_each_models_predictions_go_to_the_lake_of_its_pipeline(tmp_path):
    lakes = {name: Lake(tmp_path / name) for name in ("taxi", "other")}
    sink = LakeSink(lakes.__getitem__, tmp_path / "lock", lambda *_: True)
    both = pa.concat_tables([batch("a"), batch("b", model="other"), batch("c")])
    for _ in range(2):
        sink.ship("s1", both)
    found = {name: sorted(lake.read("predictions").column("id").to_pylist()) for name, lake in lakes.items()}
    assert found == {"taxi": ["a", "c"], "other": ["b"]}


@settings(deadline=None)
@given(
    batches=st.lists(
        st.lists(
            st.tuples(
                st.text(min_size=1, max_size=8),
                st.sampled_from(["live", "canary", "shadow"]),
                st.none() | st.text(max_size=5),
                st.none() | st.text(max_size=5),
                st.integers(-(2**60), 2**60),
                st.floats(width=32, allow_nan=False),
            ),
            min_size=1,
            max_size=5,
        ),
        max_size=4,
    ),
    cut=st.integers(0, 2000),
)
def test_frames_give_their_rows_back_and_a_cut_file_gives_the_whole_frames_before_the_cut(batches, cut):
    frames, wanted = [], []
    for width, batch in enumerate(batches):
        ids, roles, keys, texts, at, p = map(list, zip(*batch, strict=True))
        n, numbers = len(ids), 1 + width % 3
        x = np.arange(n * width, dtype=np.float32).reshape(n, width)
        found = Scored(
            model=f"m{width}",
            ids=ids,
            versions=np.arange(n),
            roles=roles,
            at=np.array(at),
            keys=keys,
            texts=[None if t is None else t.encode() for t in texts],
            x=x,
            p=np.array(p, np.float32) if numbers == 1 else np.repeat(np.array(p, np.float32)[:, None], numbers, axis=1),
        )
        frames.append(encode(found, "r", 1.5))
        wanted.append(
            [
                {"id": i, "model": f"m{width}", "version": j, "role": r, "key": k, "row": t, "x": row}
                | ({"p": v, "scores": None} if numbers == 1 else {"p": None, "scores": [v] * numbers})
                for j, (i, r, k, t, row, v) in enumerate(zip(ids, roles, keys, texts, x.tolist(), p, strict=True))
            ]
        )
    data = b"".join(frames)
    ends = np.cumsum([len(f) for f in frames])
    for at, whole in ((len(data), len(frames)), (min(cut, len(data)), int((ends <= min(cut, len(data))).sum()))):
        rows = decode(data[:at])
        assert rows.drop_columns(["at", "wall_s", "replica"]).to_pylist() == [r for b in wanted[:whole] for r in b]
    moments = decode(data)["at"].cast(pa.int64()).to_pylist()
    assert moments == [row[4] for batch in batches for row in batch]


def test_at_least_as_many_answers_are_remembered_as_stated_and_not_many_more(monkeypatch, log):
    monkeypatch.setattr(predictions, "REMEMBERED", 10)
    for i in range(35):
        log.record(scored(f"{i}", p=0.25), [])
    for i in range(25, 35):
        assert log.record(scored(f"{i}", p=0.75), [])[1].tolist() == [0.25]
    assert log.record(scored("3", p=0.75), [])[1].tolist() == [0.75]


def test_answers_to_ready_vectors_are_shipped_without_a_look_at_those_before(tmp_path, monkeypatch):
    lake = Lake(tmp_path / "lake")
    sink = LakeSink(lambda model: lake, tmp_path / "lock", lambda *segment: True, vectors_are_new=True)
    looked = []
    monkeypatch.setattr(Lake, "read", lambda *what, read=Lake.read, **how: looked.append(what) or read(*what, **how))
    sink.ship("s1", batch("u", "v", text=None))
    assert not looked
    sink.ship("s2", pa.concat_tables([batch("w", text=None), batch("a", "a")]))
    sink.ship("s3", pa.concat_tables([batch("a"), batch("x", text=None)]))
    assert len(looked) == 2
    assert sorted(lake.read("predictions").column("id").to_pylist()) == ["a", "u", "v", "w", "x"]


def test_of_vectors_beside_named_rows_the_shadows_stay_and_a_jobs_own_names_are_written_once(tmp_path):
    lake = Lake(tmp_path / "lake")
    replicas = LakeSink(lambda model: lake, tmp_path / "lock", lambda *segment: True, vectors_are_new=True)
    shadow = batch("u", text=None, version=2, role="shadow")
    replicas.ship("s1", pa.concat_tables([batch("u", text=None), shadow, batch("a")]))
    jobs = LakeSink(lambda model: lake, tmp_path / "lock", lambda *segment: True)
    jobs.ship("batch-1-p", batch("v", text=None))
    jobs.ship("batch-2-p", batch("v", "w", text=None))
    found = sorted((r["id"], r["role"]) for r in lake.read("predictions").to_pylist())
    assert found == [("a", "live"), ("u", "live"), ("u", "shadow"), ("v", "live"), ("w", "live")]
