"""Atomic writes and JSON lines."""

import os
from pathlib import Path

import pytest

from r1mega.system import files


def test_write_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_atomically(path, "one")
    files.write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.json"]


def test_file_mode_follows_the_umask(tmp_path: Path) -> None:
    reference = tmp_path / "plain"
    reference.write_text("x")
    files.write_atomically(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == reference.stat().st_mode


def test_failed_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    files.write_atomically(path, "old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_json_lines_are_numbered_from_one_and_blank_lines_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\r\n')
    assert list(files.read_json_lines(path)) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "2", "expected one JSON object per line"),
        (b'{"a": 1}\n\n[1, 2]\n', "3", r"expected one JSON object per line, got '\[1, 2\]'"),
        (b'{"a": "\xff"}\n', "1", "expected UTF-8 text"),
    ],
)
def test_bad_lines_name_file_and_line(
    tmp_path: Path, content: bytes, place: str, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"rows.jsonl:{place}: {message}"):
        list(files.read_json_lines(path))
