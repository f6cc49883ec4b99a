"""CriteoTsvSource against a reader of one line at a time, on files in the original format and on awkward ones."""

from __future__ import annotations

import gzip
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import DataError
from fae_torchrec.data.coding import category_coding
from fae_torchrec.data.criteo_tsv import CriteoTsvSource
from tests.data.test_dealing import dealt
from tests.data.text_files import awkward_files, one_hot_samples, write_text

ROWS = {f"cat_{i}": 3 + 7 * i for i in range(26)}
CODING = category_coding("modulo", ROWS)


def criteo_lines(n: int, seed: int = 0) -> bytes:
    """Lines as Criteo writes them: about a fifth of the values missing, negative counts, hex digits of either case."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(n):
        counts = [str(rng.integers(-3, 10 ** rng.integers(1, 7))) if rng.random() > 0.2 else "" for _ in range(13)]
        digits = [f"{rng.integers(2**32):08{rng.choice(['x', 'X'])}}" if rng.random() > 0.2 else "" for _ in range(25)]
        lines.append("\t".join([str(rng.integers(2)), *counts, *digits, f"{rng.integers(2**32):08x}"]) + "\n")
    return "".join(lines).encode()


def read_by_line(content: bytes, has_label: bool = True) -> list[Any]:
    """(label, dense, ids) of every line by hand: log(1 + max(x, 0)), category modulo rows, missing is 0."""
    samples = []
    for line in content.decode().splitlines():
        fields = line.split("\t")
        label = float(fields.pop(0)) if has_label else 0.0
        dense = tuple(math.log1p(max(int(x), 0)) if x else 0.0 for x in fields[:13])
        ids = tuple(int(x, 16) % rows if x else 0 for x, rows in zip(fields[13:], ROWS.values(), strict=True))
        samples.append((label, pytest.approx(dense, rel=1e-6), ids))
    return samples


def all_samples(source: CriteoTsvSource) -> list[Any]:
    return [sample for shard in range(source.num_shards) for sample in one_hot_samples(source.read_shard(shard))]


@pytest.mark.parametrize("name", ["train.txt", "day_0.gz"])
def test_values_are_those_of_the_lines(tmp_path: Path, name: str) -> None:
    content = criteo_lines(40)
    source = CriteoTsvSource([write_text(tmp_path, content, name)], coding=CODING, shard_bytes=3000)
    assert source.num_shards == (1 if name.endswith(".gz") else -(-len(content) // 3000))
    assert (source.num_dense, source.feature_names, source.skipped()) == (13, tuple(f"cat_{i}" for i in range(26)), {})
    samples = all_samples(source)
    assert samples == read_by_line(content)
    assert samples[0] != read_by_line(content)[1]  # the comparison can fail
    assert source.num_samples == len(samples) == 40
    assert all_samples(pickle.loads(pickle.dumps(source))) == samples
    assert name in source.name


def test_several_files_in_order_and_dealt_to_ranks(tmp_path: Path) -> None:
    contents = [criteo_lines(n, seed=n) for n in (7, 1, 12)]
    paths = [write_text(tmp_path, content, f"day_{i}{'.gz' if i == 2 else ''}") for i, content in enumerate(contents)]
    source = CriteoTsvSource(paths, coding=CODING, shard_bytes=700)
    expected = read_by_line(b"".join(contents))
    for world in (1, 3):
        for rank in range(world):
            batches = [one_hot_samples([batch]) for batch in source.batches(4, rank=rank, world_size=world)]
            assert batches == [[expected[i] for i in run] for run in dealt(20, 4, rank, world)]


def test_test_txt_has_no_label(tmp_path: Path) -> None:
    content = b"".join(line[2:] for line in criteo_lines(9).splitlines(keepends=True))
    path = write_text(tmp_path, content, "test.txt")
    assert all_samples(CriteoTsvSource([path], coding=CODING, has_label=False)) == read_by_line(content, has_label=False)
    with pytest.raises(DataError, match=r"test\.txt, line 1: expected 40 fields, received 39"):
        all_samples(CriteoTsvSource([path], coding=CODING))


@pytest.mark.parametrize("case", list(awkward_files(criteo_lines(3))))
@pytest.mark.parametrize("shard_bytes", [100, 10**6])
def test_awkward_files_are_read_right_or_refused_with_the_line(tmp_path: Path, case: str, shard_bytes: int) -> None:
    content = criteo_lines(6)
    awkward = awkward_files(content)[case]
    path = write_text(tmp_path, awkward.content, "train.txt")
    if awkward.says is None:
        assert all_samples(CriteoTsvSource([path], coding=CODING, shard_bytes=shard_bytes)) == read_by_line(content)
    else:
        with pytest.raises(DataError, match=rf"train\.txt.*{awkward.says}"):
            all_samples(CriteoTsvSource([path], coding=CODING, shard_bytes=shard_bytes))


def test_a_gz_that_is_cut_or_is_none(tmp_path: Path) -> None:
    content = criteo_lines(50)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(content)[:-200])
    (tmp_path / "none.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"cut\.gz, line \d+: the packed data end here; the file is truncated"):
        all_samples(CriteoTsvSource([tmp_path / "cut.gz"], coding=CODING))
    with pytest.raises(DataError, match=r"none\.gz, line 1: not gzip data"):
        CriteoTsvSource([tmp_path / "none.gz"], coding=CODING)


MALFORMED = {
    "label": (lambda line: b"2" + line[1:], "the label is 2, where 0 or 1 is expected"),
    "no label": (lambda line: line[1:], "the label is None"),
    "no hex": (lambda line: line[:-9] + b"0123456g\n", "column 'cat_25': b'0123456g', where 8 hex digits are expected"),
    "short": (lambda line: line[:-2] + b"\n", "column 'cat_25': got a 7-byte long string"),
    "fields": (lambda line: line.replace(b"\t", b"", 1), "expected 40 fields, received 39"),
    "count": (lambda line: line[:2] + b"x" + line[2:], "column 'int_0': invalid value"),
    "blank": (lambda line: b"\n", "it is blank"),
}


@pytest.mark.parametrize("kind", list(MALFORMED))
def test_malformed_lines_are_errors_or_skipped(tmp_path: Path, kind: str) -> None:
    lines = criteo_lines(5).splitlines(keepends=True)
    spoil, says = MALFORMED[kind]
    path = write_text(tmp_path, b"".join([*lines[:3], spoil(lines[3]), lines[4]]))
    with pytest.raises(DataError, match=f"data.txt, line 4: {says}"):
        all_samples(CriteoTsvSource([path], coding=CODING))
    source = CriteoTsvSource([path], coding=CODING, max_bad_lines=1)
    assert all_samples(source) == read_by_line(b"".join([*lines[:3], lines[4]]))
    assert source.skipped() == {str(path): 1}


@settings(deadline=None, max_examples=25)
@given(
    spoilt=st.lists(st.sampled_from(["", "", "", *MALFORMED]), min_size=1, max_size=12),
    shard_bytes=st.sampled_from([1, 150, 400, 10**6]),
    block_bytes=st.sampled_from([1, 200, 10**6]),
)
def test_samples_do_not_depend_on_the_cuts(
    tmp_path_factory: pytest.TempPathFactory, spoilt: list[str], shard_bytes: int, block_bytes: int
) -> None:
    lines = criteo_lines(len(spoilt), seed=len(spoilt)).splitlines(keepends=True)
    written = [MALFORMED[kind][0](line) if kind else line for kind, line in zip(spoilt, lines, strict=True)]
    path = write_text(tmp_path_factory.mktemp("cuts"), b"".join(written))
    bad = sum(map(bool, spoilt))
    source = CriteoTsvSource([path], coding=CODING, shard_bytes=shard_bytes, max_bad_lines=bad)
    blocks = source._text.blocks
    source._text.blocks = lambda shard: blocks(shard, block_bytes)  # type: ignore[method-assign, assignment]
    expected = read_by_line(b"".join(line for kind, line in zip(spoilt, lines, strict=True) if not kind))
    assert source.num_samples == len(expected)
    assert source.skipped() == ({str(path): bad} if bad else {})
    assert all_samples(source) == expected
    assert [sample for batch in source.batches(3) for sample in one_hot_samples([batch])] == expected
    assert source.skipped() == ({str(path): bad} if bad else {})  # three passes, each line counted once
    if bad:
        with pytest.raises(
            DataError, match=rf"line \d+: .*{'no malformed line is' if bad == 1 else f'{bad - 1} malformed lines are'} allowed"
        ):
            all_samples(CriteoTsvSource([path], coding=CODING, shard_bytes=shard_bytes, max_bad_lines=bad - 1))


def test_what_cannot_be_coded_names_its_line(tmp_path: Path) -> None:
    lines = [line.rsplit(b"\t", 26)[0] + b"\t00000001" * 26 + b"\n" for line in criteo_lines(4).splitlines()]
    lines[1] = b"9" + lines[1][1:]  # malformed, so that rows and lines differ
    lines[2] = lines[2].replace(b"00000001\n", b"000000ff\n")
    coding = category_coding("none", ROWS)
    source = CriteoTsvSource([write_text(tmp_path, b"".join(lines))], coding=coding, max_bad_lines=1)
    with pytest.raises(DataError, match=r"data\.txt, line 3, feature 'cat_25': .* is 255; .*ids 0\.\.177"):
        all_samples(source)


def test_keys_before_coding(tmp_path: Path) -> None:
    content = criteo_lines(30)
    source = CriteoTsvSource([write_text(tmp_path, content)], coding=CODING, shard_bytes=2000)
    chunks = [chunk for shard in range(source.num_shards) for chunk in source.read_keys(shard)]
    for column, name in enumerate(source.feature_names):
        fields = [line.split("\t")[14 + column] for line in content.decode().splitlines()]
        assert np.concatenate([chunk[name][1] for chunk in chunks]).tolist() == [not field for field in fields]
        assert np.concatenate([chunk[name][0] for chunk in chunks]).tolist() == [int(field or "0", 16) for field in fields]


def test_batches_are_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fae_torchrec.data.one_hot_source._BATCH_SAMPLES", 4)
    content = criteo_lines(10)
    source = CriteoTsvSource([write_text(tmp_path, content)], coding=CODING)
    assert [batch.labels.numel() for batch in source.read_shard(0)] == [4, 4, 2]
    assert all_samples(source) == read_by_line(content)
    assert 8 <= source.size_hint() <= 12
