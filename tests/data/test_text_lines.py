"""TextLines: every line once whatever the cuts, with its right number; damaged files are named."""

from __future__ import annotations

import gzip
import os
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.text_lines import BadLines, TextBlock, TextLines, absolute
from tests.data.text_files import BOM, mount, write_text


def lines_of(content: bytes) -> list[bytes]:
    """The second method: lines end at line feeds alone (unlike bytes.splitlines)."""
    lines = [line + b"\n" for line in content.split(b"\n")]
    return [*lines[:-1], *([lines[-1][:-1]] if lines[-1] != b"\n" else [])]


@settings(deadline=None, max_examples=150)
@given(
    lines=st.lists(st.sampled_from([b"", b"a", b"bcd", b"x" * 11, b"\r", b"d\r", b"\xff"]), min_size=1, max_size=15),
    ended=st.booleans(),
    bom=st.booleans(),
    header=st.booleans(),
    shard_bytes=st.integers(1, 40),
    block_bytes=st.integers(1, 40),
    name=st.sampled_from(["t.txt", "t.gz"]),
)
def test_every_line_comes_once_with_its_number(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    ended: bool,
    bom: bool,
    header: bool,
    shard_bytes: int,
    block_bytes: int,
    name: str,
) -> None:
    content = (b"h1,h2\n" if header else b"") + b"\n".join(lines) + (b"\n" if ended else b"")
    if not content:
        return
    path = write_text(tmp_path_factory.mktemp("lines"), (BOM if bom else b"") + content, name)
    text = TextLines([path], shard_bytes=shard_bytes, header=header)
    expected = lines_of(content)[header:]
    got: list[bytes] = []
    for shard in range(text.num_shards):
        before = len(got)
        for block in text.blocks(shard, block_bytes):
            assert block.first_line() == 1 + header + len(got)
            cuts = block.line_starts.tolist()
            got += [block.data[begin:end] for begin, end in pairwise(cuts)]
            assert block.num_lines == len(cuts) - 1
        assert text.count_lines(shard) == len(got) - before
    assert got == expected
    assert text.header == (["h1", "h2"] if header else [])
    if name == "t.txt":
        assert text.num_shards == -(-path.stat().st_size // shard_bytes)


def test_several_files_and_an_empty_one(tmp_path: Path) -> None:
    paths = [write_text(tmp_path, content, name) for name, content in {"a": b"1\n2\n", "b": b"", "c.gz": b"3", "d": b"4"}.items()]
    text = pickle.loads(pickle.dumps(TextLines(paths, shard_bytes=2)))
    assert [block.data for shard in range(text.num_shards) for block in text.blocks(shard)] == [b"1\n", b"2\n", b"3", b"4"]
    assert all(f"{path} ({path.stat().st_size} bytes, written 20" in text.name for path in paths)


def test_lines_hint_is_near(tmp_path: Path) -> None:
    content = b"".join(b"%d,%d\n" % (i, i * i) for i in range(100, 1000))
    assert TextLines([write_text(tmp_path, content)]).lines_hint() == 900
    large = write_text(tmp_path, content * 100, "large")
    assert 0.95 < TextLines([large]).lines_hint() / 90_000 < 1.05
    assert TextLines([write_text(tmp_path, b"\n", "one")]).lines_hint() == 1
    assert TextLines([write_text(tmp_path, b"h\n", "header")], header=True).lines_hint() >= 0


def test_uris_go_through_iopath(tmp_path: Path) -> None:
    mount(tmp_path, "texts://")
    write_text(tmp_path, b"1\n2\n", "a")
    write_text(tmp_path, b"3\n", "b.gz")
    text = TextLines(["texts://a", "texts://b.gz"])
    assert [block.data for shard in range(2) for block in text.blocks(shard)] == [b"1\n2\n", b"3\n"]
    assert "texts://a (4 bytes" in text.name and "texts://b.gz (unknown size" in text.name
    with pytest.raises(ConfigError, match="no file texts://c"):
        TextLines(["texts://c"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"paths": []}, "name at least one file"),
        ({"paths": ["a", "a"]}, "each once"),
        ({"paths": ["nowhere"]}, "no file nowhere"),
        ({"paths": ["nowhere.gz"]}, r"no file nowhere\.gz"),
        ({"paths": ["."]}, r"no file \. "),
        ({"paths": ["x"], "shard_bytes": 0}, "shard_bytes must be at least 1"),
        ({"paths": ["x"], "max_bad_lines": -1}, "max_bad_lines must be at least 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TextLines(**arguments)


def test_empty_and_damaged_files(tmp_path: Path) -> None:
    lines = b"".join(b"%d %s\n" % (i, os.urandom(8).hex().encode()) for i in range(3000))
    packed = gzip.compress(lines)
    cases = {
        "empty.txt": (b"", "empty, without a single line"),
        "empty.gz": (b"", "empty, without a single line"),
        "packed.gz": (gzip.compress(b""), r"packed\.gz: empty, without a single line"),
        "plain.gz": (lines, r"plain\.gz, line 1: not gzip data"),
        "junk.gz": (packed + b"junk", r"junk\.gz, line 3001: not gzip data, or damaged"),
        "flipped.gz": (packed[:-8] + b"\0\0\0\0" + packed[-4:], r"flipped\.gz, line 3001: not gzip data, or damaged"),
        "tail.gz": (packed[:-3], r"tail\.gz, line 3001: the packed data end here; the file is truncated"),
    }
    for name, (content, says) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=says):
            text = TextLines([tmp_path / name])
            list(text.blocks(0))
    (tmp_path / "half.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"half\.gz, line (\d+): the packed data end here") as caught:
        list(TextLines([tmp_path / "half.gz"]).blocks(0))
    assert 1400 < int(str(caught.value).split("line ")[1].split(":")[0]) < 1600  # where half of the data end


def test_a_header_of_another_kind_is_refused(tmp_path: Path) -> None:
    same = [write_text(tmp_path, content, name) for name, content in (("a", b'"x y";b\n1;2\n'), ("b", b'"x y";b\r\n3;4\r\n'))]
    assert TextLines(same, header=True, delimiter=";").header == ["x y", "b"]
    with pytest.raises(DataError, match=r"c, line 1: the header is \['b', 'x'\], where the first file's is \['x y', 'b'\]"):
        TextLines([*same, write_text(tmp_path, b"b;x\n", "c")], header=True, delimiter=";")


def test_what_has_no_line_ends_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fae_torchrec.data.text_lines._MAX_LINE_BYTES", 100)
    path = write_text(tmp_path, b"short\n" * 3 + b"x" * 200)
    with pytest.raises(DataError, match=r"line 4 or later is longer than 100 bytes"):
        list(TextLines([path]).blocks(0, 32))


def test_bad_lines_are_counted_once_and_up_to_the_allowance(tmp_path: Path) -> None:
    path = write_text(tmp_path, b"a\nb\nc\nd\ne")
    bad = BadLines(2)
    block = TextBlock(str(path), b"b\nc\nd\ne", 2)
    assert bad.report(block, np.array([1]), "wrong").tolist() == [True, False, True, True]
    assert block.lines is not None and block.lines.tolist() == [0, 2, 3]
    assert bad.report(block, np.array([0]), ["bad"]).tolist() == [False, True, True]
    assert bad.skipped == {str(path): 2}
    again = TextBlock(str(path), b"c\nd\ne", 4)  # the same line in another block
    assert bad.report(again, np.array([0]), "wrong").tolist() == [False, True, True]
    assert bad.skipped == {str(path): 2}
    with pytest.raises(DataError, match=r"data\.txt, line 5: odd \(it is the last line and has no line end.*2 malformed lines are allowed"):
        bad.report(block, np.array([1]), "odd")
    with pytest.raises(DataError, match=r"line 2: odd; no malformed line is allowed; correct or remove the line, or raise max_bad_lines"):
        BadLines().report(TextBlock(str(path), b"b\nc\n", 2), np.array([0]), "odd")


def test_the_name_does_not_hang_on_how_a_path_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"1\n")
    monkeypatch.chdir(tmp_path)
    assert TextLines(["a.txt"]).name == TextLines([tmp_path / "a.txt"]).name
    assert absolute("s3://bucket/a.txt") == "s3://bucket/a.txt"
