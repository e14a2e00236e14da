"""`raymill predict`: what may be asked for together, and what is said of it."""

import json
import subprocess
import sys

import pyarrow as pa
import pytest

from raymill.jobs.cli.main import main


def said(capsys, *words):
    """Exit code and JSON of a call that fails."""
    with pytest.raises(SystemExit) as stopped:
        main(["predict", *words, "--json"])
    return stopped.value.code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["taxi"], "name rows, or --table"),
        (["taxi", "[]", "--out", "x"], "name rows, or --table"),
        (["taxi", "[]", "--table", "t", "--out", "x"], "--table takes the rows from the table"),
        (["taxi", "--table", "t"], "needs --out"),
        (["taxi", "[]", "--keep", "x", "--log"], "--keep, --log: only with --table"),
    ],
)
def test_rows_or_a_table_with_a_place_for_its_answers(capsys, words, why):
    code, told = said(capsys, *words)
    assert (code, told["code"]) == (2, "usage") and why in told["error"]


def test_a_table_needs_the_cluster(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path))
    code, told = said(capsys, "taxi", "--table", "t", "--out", "x")
    assert (code, told["code"]) == (1, "unavailable") and "raymill up" in told["error"]


ENTERED_FIRST = """
import sys
from raymill.jobs.cli import predict as verb

def entered(session):
    raise SystemExit("ray" in sys.modules)

verb.needed_session, verb.join = lambda: None, entered
verb.predict("taxi", answer="t", to="x")
"""


def test_the_cluster_is_entered_before_ray_is_imported_since_ray_reads_its_token_then():
    assert subprocess.run([sys.executable, "-c", ENTERED_FIRST], timeout=60).returncode == 0


def test_rows_are_answered_by_the_version_that_is_named(monkeypatch, capsys):
    asked = []

    class Endpoint:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def predict(self, model, rows, at, version):
            asked.append((model, rows, at, version))
            return pa.table({"id": ["a"], "version": [version], "p": [0.5]})

    monkeypatch.setattr("raymill.runtime.client.connect", lambda *_, **__: Endpoint())
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "taxi", "{}", "--version", "3", "--url", "http://127.0.0.1:1", "--json"])
    assert (stopped.value.code, asked) == (0, [("taxi", [{}], None, 3)])
    assert json.loads(capsys.readouterr().out)[0]["version"] == 3
