"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from fae_torchrec.training.whole_file import write_whole


def test_text_and_bytes_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert write_whole("é\n", path) == path and path.read_bytes() == b"\xc3\xa9\n"
    write_whole(b"\x00\xff", path)
    assert path.read_bytes() == b"\x00\xff" and list(path.parent.iterdir()) == [path]


def test_a_file_stays_as_it_was_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_whole("old", tmp_path / "b")
    monkeypatch.setattr(Path, "write_bytes", lambda self, content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole("new", path)
    assert path.read_text() == "old"
