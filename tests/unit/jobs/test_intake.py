"""`raymill ingest` and `raymill feed` without a cluster: rows come in once, and wrong input is told."""

import json
import signal
import sys

import pytest

from raymill.actors.lake import Lake
from raymill.jobs.cli import main as command

PIPELINE = """
from raymill.runtime import Col, Cost, Directory, FeatureView, Label, Monitor, Pipeline, RedisStream, Source, Train, col

SEEN = Source(
    "seen", key=["stop", "seen"], time="seen", read=Directory({folder!r}, "*.csv", settle="20ms"),
    schema={{"stop": Col("int64"), "seen": Col("timestamp"), "crowd": Col("float64", ge=0)}},
)
RIDES = Source(
    "rides", key=["stop", "seen"], time="seen", read={read},
    schema={{"stop": Col("int64"), "seen": Col("timestamp"), "delay": Col("float64")}},
)
pipeline = Pipeline(
    "intake", views=[FeatureView("seen", SEEN, entity="stop", features=["crowd"])],
    label=Label("late", RIDES, col("delay") > 5), train=Train(len), monitor=Monitor(cost=Cost(missed=1, false_alarm=1)),
)
"""
GOOD, BAD = "stop,seen,crowd\n1,2024-01-01T00:00:00Z,{}\n", "stop,seen,crowd\n1,2024-01-01T00:00:00Z,3,4\n"


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    """A verb is a process of its own in life, and decides for good what SIGTERM does."""
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path / "home"))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def file(tmp_path):
    def write(read="None"):
        (tmp_path / "in").mkdir(exist_ok=True)
        path = tmp_path / "pipeline.py"
        path.write_text(PIPELINE.format(folder=str(tmp_path / "in"), read=read))
        return str(path)

    return write


def ran(capsys, *words):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "stdout", sys.stdout)  # which `main` keeps for itself
        command.main([*words, "--json"])
    return stop.value.code, json.loads(capsys.readouterr().out)


def test_a_file_is_pushed_once_and_its_bad_rows_are_told(capsys, tmp_path, file):
    path = tmp_path / "rows.csv"
    path.write_text(GOOD.format(3) + "2,2024-01-01T00:00:00Z,-3\n")
    told = {"source": "seen", "batches": 1, "duplicates": 0, "accepted": 1, "lake_version": 1}
    assert ran(capsys, "ingest", file(), "seen", str(path)) == (0, told | {"quarantined": {"range:crowd": 1}})
    again = told | {"duplicates": 1, "accepted": 0, "quarantined": {}}
    assert ran(capsys, "ingest", file(), "seen", str(tmp_path / "rows.csv")) == (0, again)
    (tmp_path / "in" / "more.csv").write_text(GOOD.format(3).replace("01-01", "01-02"))
    code, more = ran(capsys, "ingest", file(), "seen")  # what `read` names
    assert (code, more["accepted"], Lake(tmp_path / "home" / "lake").count("seen")) == (0, 1, 2)


@pytest.mark.parametrize(
    ("words", "code", "name", "said"),
    [
        (("bogus", "x.csv"), 2, "usage", "its sources are ['rides', 'seen']"),
        (("seen", "nowhere.csv"), 2, "usage", "nowhere.csv"),
        (("seen", "pipeline.py"), 2, "usage", "only these are read"),
        (("rides",), 2, "usage", "give a PATH"),
        (("seen", "bad.csv"), 1, "contract_error", "bad.csv"),
        (("seen", "other.csv"), 1, "contract_error", "lacks ['stop', 'seen', 'crowd']"),
    ],
)
def test_what_can_not_be_pushed_is_told(capsys, monkeypatch, tmp_path, file, words, code, name, said):
    pipeline = file()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text(BAD)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    got, told = ran(capsys, "ingest", pipeline, *words)
    assert (got, told["code"]) == (code, name) and said in told["error"]


@pytest.mark.long
def test_a_feed_takes_what_is_there_and_ends_when_nothing_comes(capsys, tmp_path, file):
    pipeline = file()
    (tmp_path / "in" / "a.csv").write_text(GOOD.format(3))
    (tmp_path / "in" / "b.csv").write_text(BAD)
    code, told = ran(capsys, "feed", pipeline, "--idle", "900ms")
    assert (code, told["seen"]["rows"], told["seen"]["quarantined"]) == (0, 1, {"file:unreadable": 1})
    assert told["seen"]["state"] == "stopped"


@pytest.mark.parametrize(
    ("read", "said"),
    [
        ("RedisStream('redis://127.0.0.1:1', 'rides')", "redis://127.0.0.1:1 can not be reached"),
        ("Directory('/nowhere')", "/nowhere"),
    ],
)
def test_a_stream_that_can_not_be_reached_is_told_before_anything_starts(capsys, tmp_path, file, read, said):
    code, told = ran(capsys, "feed", file(read))
    assert code == 1 and told["code"] == "store_error" and said in told["error"] and not (tmp_path / "home").exists()
    assert ran(capsys, "ingest", file(read), "rides")[0] in (1, 2)
