"""`raymill quarantine` on a home where nothing runs: the pipeline file gives the contracts."""

import json
import sys

import numpy as np
import pyarrow as pa
import pytest

from raymill.actors.data import DataActor
from raymill.actors.features import FeatureActor
from raymill.actors.lake import Lake
from raymill.jobs import pipeline_file
from raymill.jobs.cli import main as command
from raymill.runtime.home import Home
from raymill.runtime.records import RecordsActor

FILE = """
from raymill.runtime import Col, Cost, FeatureView, Label, Monitor, Pipeline, Source, Train, col

TICKS = Source("ticks", key=["tick"], time="moment", schema={
    "tick": Col("int64"), "moment": Col("timestamp"), "who": Col("string"), "x": Col("float64", nullable=True, ge=0)})
PIPELINE = Pipeline(
    "ticking",
    views=[FeatureView("who", TICKS, entity="who", features={"sum": col("x").sum("1h")})],
    label=Label("high", TICKS, col("x") > 3),
    train=Train(lambda inputs: None),
    monitor=Monitor(cost=Cost(missed=2, false_alarm=1)),
)
"""
HOUR_US = 3_600_000_000


def ticks(*values) -> pa.Table:
    n = len(values)
    moments = pa.array(np.arange(n) * 1_000_000).cast(pa.timestamp("us", "UTC"))
    return pa.table(
        {"tick": pa.array(range(n)), "moment": moments, "who": ["a"] * n, "x": pa.array(values, pa.float64())}
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with one sound row and three refused ones."""
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path / "mill"))
    (tmp_path / "ticking.py").write_text(FILE)
    pipeline, records = pipeline_file.load(tmp_path / "ticking.py"), RecordsActor(tmp_path / "mill")
    records.start()
    DataActor(str(tmp_path / "mill"), [*pipeline.sources], records.append).ingest(
        "ticks", ticks(1.0, -2.0, -3.0, -4.0), batch_id="a"
    )
    records.stop()
    return tmp_path


def said(capsys, *words) -> tuple[int, dict]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "stdout", sys.stdout)  # `main` keeps stdout for itself, for good
        command.main(["quarantine", *words, "--json"])
    return stop.value.code, json.loads(capsys.readouterr().out)


def test_rows_are_listed_shown_fixed_sent_in_and_taken_by_the_features(home, capsys):
    file = str(home / "ticking.py")
    code, listed = said(capsys, "list", "--reason", "range:x", "--limit", "2")
    assert (code, listed["total"], len(listed["rows"])) == (0, 3, 2)
    assert listed["counts"] == [{"source": "ticks", "reason": "range:x", "rows": 3}]
    by_x = {r["row"]["x"]: r for r in said(capsys, "list")[1]["rows"]}
    assert said(capsys, "show", by_x[-2.0]["id"])[1] == by_x[-2.0]
    assert said(capsys, "fix", by_x[-2.0]["id"], "--set", "x=2", "--set", "who=b")[0] == 0
    edited = home / "rows.jsonl"
    edited.write_text(json.dumps(by_x[-3.0] | {"row": {"x": 3}}) + "\n\n")
    assert said(capsys, "fix", "--file", str(edited))[1][0]["row"]["x"] == 3
    code, done = said(capsys, "reingest", "--source", "ticks", "--pipeline", file)
    assert (code, done["accepted"], done["still_refused"]) == (0, 2, {"range:x": 1})
    assert said(capsys, "discard", by_x[-4.0]["id"], "--why", "broken")[1] == {"discarded": 1}
    assert said(capsys, "list")[1]["total"] == 0
    assert {r["state"] for r in said(capsys, "list", "--closed")[1]["rows"]} == {"reingested", "discarded"}
    assert Lake(Home(home / "mill").lake).count("ticks") == 3
    features = FeatureActor(str(home / "mill"), pipeline_file.load(home / "ticking.py"), lambda events: None)
    found = features.vectors(pa.table({"who": ["a", "b"]}), np.array([HOUR_US - 1] * 2))
    assert found.ravel().tolist() == [4.0, 2.0]
    features.stop()


def test_wrong_words_are_told_and_change_nothing(home, capsys):
    row = said(capsys, "list")[1]["rows"][0]["id"]
    (home / "bad.jsonl").write_text('{"id": "x"}\n')
    (home / "twice.jsonl").write_text(f'{{"id": "{row}", "row": {{}}}}\n' * 2)
    for words, told in {
        ("fix", row): "--set column=value",
        ("fix", row, "--set", "x"): "write column=value",
        ("fix", row, "--set", "y=1"): "no column ['y']",
        ("fix", row, "--set-file", f"x={home / 'absent.png'}"): "can not be read",
        ("fix", "--set", "x=1"): "say which rows",
        ("fix", row, "--source", "ticks", "--set", "x=1"): "either by their ids or",
        ("fix", "nonsense", "--set", "x=1"): "'nonsense'",
        ("fix", "--file", str(home / "bad.jsonl")): "line 1: write",
        ("fix", "--file", str(home / "twice.jsonl")): "line 2: row",
        ("fix", "--file", str(home / "absent.jsonl")): "can not be read",
        ("reingest", row): "--pipeline jobs/flights.py",
        ("reingest", row, "--pipeline", "ticking"): "does not run",
        ("reingest", row, "--pipeline", "absent.py"): "no pipeline file",
        ("discard", row): "--why",
        ("show", "nonsense"): "'nonsense'",
    }.items():
        code, document = said(capsys, *words)
        assert code in (1, 2) and told in document["error"], words
    assert {r["state"] for r in said(capsys, "list")[1]["rows"]} == {"open"}
