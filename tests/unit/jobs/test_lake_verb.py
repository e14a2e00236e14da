"""`raymill lake …` on a home with a record and no cluster: what manifests pin stays."""

import json
import os
import sys
import time

import pyarrow as pa
import pytest

from raymill.actors.lake import Lake
from raymill.jobs.cli import main as command
from raymill.runtime.messages import Event
from raymill.runtime.records import RecordsActor

DAYS_S = 86_400


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Ten appends, a manifest of the seventh version, all of it long ago."""
    lake = Lake(tmp_path / "lake")
    for number in range(10):
        rows = pa.table({"n": [number], "t": pa.array([number], pa.timestamp("us", "UTC"))})
        lake.append("facts", rows, batch_id=str(number), by="t")
    records = RecordsActor(tmp_path)
    records.start()
    made = {"manifest": {"lake_versions": {"facts": 7}}}
    records.append([Event(kind="training_set.made", subject="p", pipeline="p", wall_s=1.0, data=made, key="made")])
    records.stop()
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def said(home, capsys):
    """Runs a verb; the document that it printed."""

    def run(*words, code=0):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "stdout", sys.stdout)  # `main` keeps it, for good: a process of its own in life
            command.main(["lake", *words, "--json"])
        assert stop.value.code == code
        return json.loads(capsys.readouterr().out)

    return run


def test_tables_are_listed_merged_and_vacuumed_but_for_what_is_pinned(home, said, monkeypatch):
    (told,) = said("list")
    assert (told["table"], told["rows"], told["parts"], told["pinned"]) == ("facts", 10, 10, [7])
    (merged,) = said("compact")
    assert (merged["before"], merged["after"]) == (10, 1)
    assert said("vacuum", "facts")[0]["files"] == 0  # all are young
    old = time.time() - 30 * DAYS_S
    for part in (home / "lake" / "facts").glob("*.parquet"):
        os.utime(part, (old, old))
    in_a_week = time.time() + 8 * DAYS_S
    monkeypatch.setattr(time, "time", lambda: in_a_week)
    assert said("vacuum", "--dry-run")[0]["files"] == 3
    assert said("vacuum")[0]["files"] == 3
    lake = Lake(home / "lake")
    assert sorted(lake.read("facts", version=7)["n"].to_pylist()) == list(range(7))
    assert lake.count("facts") == lake.read("facts").num_rows == 10


def test_what_would_endanger_running_work_or_is_no_table_is_refused(said):
    assert said("vacuum", "--older-than", "10m", code=2)["code"] == "usage"
    assert said("vacuum", "--older-than", "soon", code=2)["code"] == "usage"
    assert "nowhere" in said("list", "nowhere", code=2)["error"]
