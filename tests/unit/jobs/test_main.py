"""The command's edge: help on stdout, one document with --json, no traceback without --debug."""

import json

import pytest

from raymill.jobs.cli import main as command
from raymill.runtime.errors import Conflict


def ran(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        command.main(list(words))
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


@pytest.fixture(autouse=True)
def own_stdout(monkeypatch):
    """`main` keeps stdout for itself, for good: a process of its own in life."""
    import sys

    monkeypatch.setattr(sys, "stdout", sys.stdout)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_goes_to_stdout(capsys, words):
    code, out, err = ran(capsys, *words)
    assert code == 0 and all(verb in out for verb in command.VERBS) and err == ""


@pytest.mark.parametrize("words", [("bogus",), ("cost", "--bogus"), ("lineage",), ("promote", "m", "three")])
def test_a_wrong_word_is_one_document_and_exit_code_2(capsys, words):
    code, out, err = ran(capsys, *words, "--json")
    told = json.loads(out)
    assert code == 2 and told["code"] == "usage" and told["error"] and "raymill --help" in told["remedy"]
    assert "Traceback" not in err


def test_what_nobody_thought_of_is_told_in_one_line_and_raised_with_debug(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path))
    monkeypatch.setattr("raymill.jobs.run.newest", lambda home: 1 / 0)
    code, out, err = ran(capsys, "status", "--json")
    assert code == 1 and "ZeroDivisionError" in json.loads(out)["error"] and "Traceback" not in err
    with pytest.raises(ZeroDivisionError):
        command.main(["status", "--debug"])


def test_square_brackets_in_a_message_are_told_as_they_are(capsys, monkeypatch, tmp_path):
    def refuse(home):
        raise Conflict("name other ports in [ports]")

    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path))
    monkeypatch.setattr("raymill.jobs.run.newest", refuse)
    code, out, err = ran(capsys, "status")
    assert code == 1 and out == "" and "name other ports in [ports]" in err and "remedy: " in err
