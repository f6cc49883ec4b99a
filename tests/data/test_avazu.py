"""The Avazu reader against a slow reading of files in the competition's own format, whole and damaged."""

from __future__ import annotations

import csv
import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.avazu import FEATURES, AvazuSource
from fae_torchrec.data.coding import category_coding
from fae_torchrec.data.vocabulary import fit_vocabulary

HEX = FEATURES[2:11]
HEADER = ["id", "click", "hour", "C1", "banner_pos", *HEX, "device_type", "device_conn_type", *(f"C{i}" for i in range(14, 22))]
ROWS = {name: 5 + i for i, name in enumerate(FEATURES)}
MODULO = category_coding("modulo", rows=ROWS)
# A line of the competition's train.csv in its form: the ids are 8 hex digits, C20 is -1 where nothing is known.
LINE = (
    "1000009418151094273,0,14102100,1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,a99f214a,ddd2926e,44956a24,1,2,"
    "15706,320,50,1722,0,35,-1,79"
)


def make_lines(count: int, *, missing: float = 0.0, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        fields = [str(10**19 + number), str(rng.integers(0, 2)), f"1410{rng.integers(21, 31)}{rng.integers(0, 24):02d}"]
        for name in FEATURES:
            value = f"{rng.integers(0, 2**32):08x}" if name in HEX else str(rng.integers(-1, 2000))
            fields.append("" if rng.random() < missing else value)
        lines.append(",".join(fields))
    return lines


def write(path: Path, lines: list[str], end: str = "\n", header: list[str] = HEADER) -> Path:
    data = end.join([",".join(header), *lines, ""]).encode("latin-1")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def slow(lines: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense [n, 1], ids [21, n] by modulo and labels [n], value by value."""
    records = [dict(zip(HEADER, line, strict=True)) for line in csv.reader(lines)]
    ids = [[(int(record[name], 16 if name in HEX else 10) if record[name] else 0) % ROWS[name] for record in records] for name in FEATURES]
    return (
        np.array([[int(record["hour"][-2:]) / 24] for record in records], dtype=np.float32),
        np.array(ids),
        np.array([float(record["click"]) for record in records]),
    )


def check(source: AvazuSource, lines: list[str]) -> None:
    dense, ids, labels = slow(lines)
    (batch,) = list(source.batches(10_000))
    assert np.array_equal(batch.dense_features.numpy(), dense)
    assert np.array_equal(batch.sparse_features.values().view(21, -1).numpy(), ids)
    assert np.array_equal(batch.labels.numpy(), labels)
    assert batch.sparse_features.keys() == list(FEATURES) == list(source.feature_names)
    assert source.num_samples == len(lines)


def test_21_features_and_one_dense_as_in_fae() -> None:
    assert len(FEATURES) == 21 and AvazuSource.__doc__ and "RMC4" in AvazuSource.__doc__


def test_a_line_by_hand(tmp_path: Path) -> None:
    (batch,) = list(AvazuSource([write(tmp_path / "train.csv", [LINE.replace("14102100", "14102118")])], coding=MODULO).batches(4))
    assert batch.dense_features.tolist() == [[0.75]] and batch.labels.tolist() == [0.0]
    ids = dict(zip(FEATURES, batch.sparse_features.values().tolist(), strict=True))
    assert ids["C1"] == 1005 % 5 and ids["site_id"] == 0x1FBE01FE % 7 and ids["device_model"] == 0x44956A24 % 15
    assert ids["C20"] == -1 % ROWS["C20"] == ROWS["C20"] - 1 and ids["C21"] == 79 % 25


@pytest.mark.parametrize("form", ["plain", "missing", "crlf", "no end", "gz", "several", "upper case"])
def test_round_trip(tmp_path: Path, form: str) -> None:
    lines = make_lines(300, missing=0.2 if form == "missing" else 0.0)
    path = tmp_path / ("train.csv.gz" if form == "gz" else "train.csv")
    paths = [write(path, [line.upper() for line in lines] if form == "upper case" else lines, "\r\n" if form == "crlf" else "\n")]
    if form == "no end":
        path.write_bytes(path.read_bytes()[:-1])
    if form == "several":
        paths = [write(tmp_path / "a.csv", lines[:100]), write(tmp_path / "b.csv.gz", lines[100:])]
    check(AvazuSource(paths, coding=MODULO), lines)
    check(pickle.loads(pickle.dumps(AvazuSource(paths, coding=MODULO, shard_bytes=1000))), lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINE.rsplit(",", 1)[0], "expected 24 fields, received 23"),
        (LINE.replace("1fbe01fe", "1fbe01f"), "column 'site_id'"),
        (LINE.replace("1fbe01fe", "1fbe01fg"), "column 'site_id': b'1fbe01fg', where 8 hex digits are expected"),
        (LINE.replace("15706", "1570\xe9"), "column 'C14'"),
        (LINE.replace("f3845767", "f384576\xe9"), r"column 'site_domain': b'f384576\xe9'"),
        (LINE.replace(",0,14102100", ",2,14102100"), "column 'click': 2, where 0 or 1"),
        (LINE.replace(",0,14102100", ",,14102100"), "column 'click'"),
        (LINE.replace("14102100", "14102124"), "column 'hour': 14102124, where YYMMDDHH"),
        (LINE.replace("14102100", ""), "column 'hour'"),
        ("", "blank"),
    ],
)
def test_a_malformed_line_is_named_or_skipped(tmp_path: Path, line: str, message: str) -> None:
    lines = make_lines(20)
    path = write(tmp_path / "train.csv", [*lines[:7], line, *lines[7:]])
    with pytest.raises(DataError) as error:
        list(AvazuSource([path], coding=MODULO).batches(100))
    assert f"{path}, line 9: " in str(error.value) and message in str(error.value), "the header is line 1"
    lenient = AvazuSource([path], coding=MODULO, max_bad_lines=1)
    check(lenient, lines)
    assert lenient.skipped() == {str(path): 1}


def test_a_last_line_that_was_cut_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", make_lines(20))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"train.csv, line 21: expected 24 fields.*truncated"):
        list(AvazuSource([path], coding=MODULO).batches(100))
    packed = write(tmp_path / "train.csv.gz", make_lines(2000))
    packed.write_bytes(packed.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"train.csv.gz, line \d+: .*truncated"):
        list(AvazuSource([packed], coding=MODULO).batches(100))


def test_other_files_are_refused(tmp_path: Path) -> None:
    test_header = [name for name in HEADER if name != "click"]
    with pytest.raises(DataError, match=r"no column 'click': this is the competition's test file"):
        AvazuSource([write(tmp_path / "test.csv", [], header=test_header)], coding=MODULO)
    with pytest.raises(DataError, match=r"lacks \['C21'\]"):
        AvazuSource([write(tmp_path / "less.csv", [], header=HEADER[:-1])], coding=MODULO)
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.csv"):
        AvazuSource([tmp_path / "empty.csv"], coding=MODULO)
    with pytest.raises(ConfigError, match=r"none\.csv"):
        AvazuSource([tmp_path / "none.csv"], coding=MODULO)
    no_lines = AvazuSource([write(tmp_path / "header.csv", [])], coding=MODULO)
    assert no_lines.num_samples == 0 and list(no_lines.batches(3)) == []


def test_ids_out_of_range_are_named_where_nothing_codes_them(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", [LINE.replace(",-1,", ",3,"), LINE])
    with pytest.raises(DataError, match=r"train.csv, line 3, feature 'C20': .* -1"):
        list(AvazuSource([path], coding=category_coding("none", rows=dict.fromkeys(FEATURES, 2**32))).batches(10))


def test_a_vocabulary_of_its_keys_codes_it(tmp_path: Path) -> None:
    lines = make_lines(200, missing=0.3)
    path = write(tmp_path / "train.csv", lines)
    vocabulary = fit_vocabulary(AvazuSource([path], coding=MODULO, shard_bytes=5000))
    (batch,) = list(AvazuSource([path], coding=category_coding("vocabulary", vocabulary=vocabulary)).batches(1000))
    for name in FEATURES:
        ids = batch.sparse_features[name].values().tolist()
        fields = [line.split(",")[HEADER.index(name)] for line in lines]
        assert len(set(zip(ids, fields, strict=True))) == len(set(ids)) == len(set(fields)) == vocabulary.rows[name], "one to one"
        assert (0, "") in zip(ids, fields, strict=True), "the missing ones"
