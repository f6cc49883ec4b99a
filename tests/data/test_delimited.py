"""DelimitedParser: exact types, and every malformed line found, wherever the blocks are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.delimited import DelimitedParser
from fae_torchrec.data.text_lines import TextLines
from tests.data.text_files import write_text

COLUMNS = {"n": pa.int64(), "key": pa.binary(2), "x": pa.float32(), "word": pa.binary()}


def parse(path: Path, *, quoting: bool = False, max_bad_lines: int = 0, include: Any = None, cut: int = 10**6) -> tuple[Any, Any, Any]:
    """(rows, line number of each row from 1, lines skipped)."""
    text = TextLines([path], shard_bytes=cut, max_bad_lines=max_bad_lines)
    parser = DelimitedParser(COLUMNS, delimiter=",", quoting=quoting, bad_lines=text.bad_lines, include=include)
    rows: list[Any] = []
    numbers: list[int] = []
    for shard in range(text.num_shards):
        for block in text.blocks(shard, cut):
            table = parser.parse(block)
            rows += [tuple(row.values()) for row in table.to_pylist()]
            lines = range(block.num_lines) if block.lines is None else block.lines.tolist()
            numbers += [block.first_line() + line for line in lines]
    return rows, numbers, sum(text.bad_lines.skipped.values())


def test_types_and_missing_values(tmp_path: Path) -> None:
    path = write_text(tmp_path, b'-3,ab,.5,w"q"\n,,,\r\n9007199254740993,\xff\x00,1e3,nan\n0,  ,-2,NULL')
    rows, numbers, _ = parse(path)
    assert rows == [
        (-3, b"ab", 0.5, b'w"q"'),
        (None, None, None, None),
        (2**53 + 1, b"\xff\x00", 1000.0, b"nan"),
        (0, b"  ", -2.0, b"NULL"),
    ]
    assert numbers == [1, 2, 3, 4]
    assert parse(path, include=["word", "n"])[0] == [(row[3], row[0]) for row in rows]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"1,ab,2", "line 2: expected 4 fields, received 3;"),
        (b"1,ab,2,w,", "line 2: expected 4 fields, received 5;"),
        (b"1.5,ab,2,w", "line 2: column 'n': invalid value '1.5', where int64 is expected"),
        (b"1,abc,2,w", r"line 2: column 'key': got a 3-byte long string, where fixed_size_binary\[2\] is expected"),
        (b"1,ab,two,w", "line 2: column 'x': invalid value 'two', where float is expected"),
        (b"99999999999999999999,ab,2,w", "line 2: column 'n': invalid value"),
        (b"", "line 2: it is blank"),
        (b"\r", "line 2: it is blank"),
        (b"1,ab,2,w\r2,ab,2,w", "line 2: it holds a carriage return"),
        (b"\xe9,ab,2,w", "line 2: column 'n'"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: bytes, says: str) -> None:
    good = b"1,ab,2,w\n"
    path = write_text(tmp_path, good + line + b"\n" + good)
    with pytest.raises(DataError, match=f"data.txt, {says}"):
        parse(path)
    rows, numbers, skipped = parse(path, max_bad_lines=1)
    assert (rows, numbers, skipped) == ([(1, b"ab", 2.0, b"w")] * 2, [1, 3], 1)


def test_values_of_columns_left_out_are_not_looked_at(tmp_path: Path) -> None:
    path = write_text(tmp_path, b"x,abc,2,w\n")
    assert parse(path, include=["x"])[0] == [(2.0,)]


# (line, row or None if it is malformed), without and with quoting
PLAIN = [
    (b"1,ab,2,w", (1, b"ab", 2.0, b"w")), (b",,,", (None,) * 4),
    (b"4,,.25,\r", (4, None, 0.25, None)), (b'5,"",0,"', (5, b'""', 0.0, b'"')),
    (b"", None), (b"\r", None), (b"1,ab,2", None), (b"one,ab,2,w", None), (b"1,a,2,w", None), (b"1,ab,2,w\rx", None),
    (b"\xef\xbb\xbf1,,,", None),
]  # fmt: skip
QUOTED = [
    (b"1,ab,2,w", (1, b"ab", 2.0, b"w")), (b'2,"a,",2,"w,""w"""', (2, b"a,", 2.0, b'w,"w"')), (b'3,,,w"w', (3, None, None, b'w"w')),
    (b'4,,,"w', None), (b'"5,,,w', None), (b'6,,,w"', (6, None, None, b'w"')), (b"", None), (b'7,,,"w\r', None),
]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(data=st.data(), quoting=st.booleans(), cut=st.sampled_from([1, 7, 30, 64, 1000]), ended=st.booleans())
def test_good_lines_are_the_same_for_all_cuts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, quoting: bool, cut: int, ended: bool
) -> None:
    lines = data.draw(st.lists(st.sampled_from(QUOTED if quoting else PLAIN), min_size=1, max_size=20))
    if lines[-1][0].endswith(b"\r") or not lines[-1][0]:
        ended = True  # an empty last line is none, and a carriage return alone does not end a line
    content = b"\n".join(line for line, _ in lines) + (b"\n" if ended else b"")
    path = write_text(tmp_path_factory.mktemp("cuts"), b"0,,,\n" + content)  # so that no mark stands at the file's beginning
    expected = [(0, None, None, None), *(row for _, row in lines if row is not None)]
    rows, numbers, skipped = parse(path, quoting=quoting, max_bad_lines=len(lines), cut=cut)
    assert rows == expected
    assert numbers == [1, *(i + 2 for i, (_, row) in enumerate(lines) if row is not None)]
    assert skipped == len(lines) + 1 - len(expected)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_a_quote_that_is_not_closed_ends_with_its_line(tmp_path: Path, end: bytes) -> None:
    path = write_text(tmp_path, b'1,ab,2,w\n2,ab,2,"w' + end)
    with pytest.raises(DataError, match="line 2: a quoted value is not closed"):
        parse(path, quoting=True)
    assert [row[3] for row in parse(path)[0]] == [b"w", b'"w']


def test_a_line_longer_than_pyarrow_takes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fae_torchrec.data.delimited._PIECE_BYTES", 50)
    path = write_text(tmp_path, b"1,ab,2,w\n" * 20 + b"2,ab,2," + b"w" * 300 + b"\n" + b"3,ab,2,w\n" * 20)
    rows, numbers, _ = parse(path)
    assert [row[0] for row in rows] == [1] * 20 + [2] + [3] * 20
    assert numbers == list(range(1, 42))


def test_columns_must_make_sense() -> None:
    bad_lines = TextLines([__file__]).bad_lines
    with pytest.raises(ConfigError, match="at least two columns"):
        DelimitedParser({"a": pa.int64()}, delimiter=",", quoting=False, bad_lines=bad_lines)
    with pytest.raises(ConfigError, match=r"\['z'\] are not among them"):
        DelimitedParser(COLUMNS, delimiter=",", quoting=False, bad_lines=bad_lines, include=["n", "z"])
