"""`raymill keys …` on a home that nothing was run on yet."""

import json
import sys

import pytest

from raymill.jobs.cli import main as command


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """Runs a verb; the document that it printed."""
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path))

    def run(*words, code=0):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "stdout", sys.stdout)
            command.main(["keys", *words, "--json"])
        assert stop.value.code == code
        return json.loads(capsys.readouterr().out)

    return run


def test_a_key_is_shown_once_listed_and_revoked(said):
    made = said("create", "acme", "--expires", "90d", "--right", "manage", "--right", "predict")
    assert made["key"].startswith("rm_") and made["rights"] == ["manage", "predict"] and made["state"] == "holds"
    other = said("create", "acme")
    assert other["rights"] == ["predict"] and other["expires"] is None
    listed = said("list")
    assert [k["id"] for k in listed] == [made["id"], other["id"]] and not any("key" in k for k in listed)
    assert said("revoke", made["key"])["state"] == "revoked"  # who has the key need not look up its id
    assert said("revoke", other["id"])["id"] == other["id"]
    assert [k["state"] for k in said("list")] == ["revoked", "revoked"]


@pytest.mark.parametrize(
    "words",
    [
        ("create", "Acme"),
        ("create", "operator"),
        ("create", "acme", "--expires", "soon"),
        ("create", "acme", "--expires", "0s"),
        ("create", "acme", "--right", "all"),
    ],
)
def test_wrong_words_make_no_key(said, words):
    assert said(*words, code=2)["code"] == "usage"
    assert said("list") == []


def test_a_key_that_is_none_is_not_revoked(said):
    assert said("revoke", "rm_unknown", code=2)["code"] == "unknown_key"
