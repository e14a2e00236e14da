"""Files that are written whole."""

import os

import pytest

from raymill.runtime.whole_files import PRIVATE, write_json, write_whole


def test_the_new_content_takes_the_place_of_the_old_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a" / "file"
    write_whole(path, "old")
    write_whole(path, b"\x00new")
    assert path.read_bytes() == b"\x00new" and os.listdir(path.parent) == ["file"]


def test_what_is_private_is_so_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        write_whole(tmp_path / "secret", "s", mode=PRIVATE)
        write_json(tmp_path / "state.json", {"a": 1})
        write_whole(tmp_path / "page", "p")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert modes == {"secret": 0o600, "state.json": 0o600, "page": 0o666}


def test_a_writer_that_fails_leaves_the_old_content_and_no_draft(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def no_room(_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
