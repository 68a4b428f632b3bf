"""A file written atomically holds the old content or the new; a failure leaves neither leftovers nor damage."""

import json
import os

import pytest

from groundwork.atomic import write_bytes, write_json, write_text


def test_content_replaces_the_old_one_without_leftovers(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new ä")
    assert path.read_text(encoding="utf-8") == "new ä"
    write_json(tmp_path / "b.json", {"x": [1, "ü"]})
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == {"x": [1, "ü"]}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.txt", "b.json"]


def test_failure_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_bytes(path, b"old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
