"""`raymill predict`: what may be asked for together, and what is said of it."""

import json

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
    ],
)
def test_rows_or_a_table_with_a_place_for_its_answers(capsys, words, why):
    code, told = said(capsys, *words)
    assert (code, told["code"]) == (2, "usage") and why in told["error"]


def test_a_table_needs_the_cluster(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path))
    code, told = said(capsys, "taxi", "--table", "t", "--out", "x")
    assert (code, told["code"]) == (1, "unavailable") and "raymill up" in told["error"]
