"""The reader of delimited text in general: by hand, in every form, damaged, and on real data whose coded form is known."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data import csv_source
from fae_torchrec.data.coding import category_coding
from fae_torchrec.data.csv_source import CsvSource
from fae_torchrec.data.vocabulary import fit_vocabulary

JOURNEY = Path(__file__).resolve().parents[3] / "shared" / "data" / "completejourney"

ROWS = {"city": 1 << 40, "shop": 100, "tags": 1 << 40}
MODULO = category_coding("modulo", rows=ROWS)
TEXT = b"""id,price,city,shop,tags,bought
1,0.5,Rome,7,red|blue,1
2,-3,,8,,0
3,1e3,"New York, NY",,blue,1
4,0,Rome,7,red||gr\xfcn,0.5
"""


def source_of(path: Path, **settings: Any) -> CsvSource:
    settings = {"coding": MODULO, "integers": ["shop"], "separators": {"tags": "|"}, **settings}
    return CsvSource([path], dense=["price"], sparse=["city", "shop", "tags"], label="bought", **settings)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def bags(kjt: KeyedJaggedTensor, name: str) -> list[list[int]]:
    return [bag.tolist() for bag in kjt[name].to_dense()]


@pytest.mark.parametrize("form", ["plain", "crlf", "gz", "no end", "tabs", "no header", "shards", "copy"])
def test_a_small_file_by_hand(tmp_path: Path, form: str) -> None:
    data, settings = TEXT, {}
    if form == "crlf":
        data = TEXT.replace(b"\n", b"\r\n")
    if form == "no end":
        data = TEXT[:-1]
    if form == "tabs":
        data, settings = TEXT.replace(b"New York, NY", b"New York").replace(b",", b"\t"), {"delimiter": "\t"}
    if form == "no header":
        data, settings = TEXT.split(b"\n", 1)[1], {"columns": TEXT.split(b"\n", 1)[0].decode().split(",")}
    if form == "shards":
        settings = {"shard_bytes": 30}
    source = source_of(write(tmp_path / ("a.csv.gz" if form == "gz" else "a.csv"), data), **settings)
    if form == "copy":
        source = pickle.loads(pickle.dumps(source))
    assert source.num_samples == 4 and source.num_dense == 1 and source.feature_names == ("city", "shop", "tags")
    (batch,) = list(source.batches(10))
    assert batch.dense_features.tolist() == [[0.5], [-3.0], [1000.0], [0.0]] and batch.labels.tolist() == [1, 0, 1, 0.5]
    kjt = batch.sparse_features
    (rome,), missing, (new_york,), also_rome = bags(kjt, "city")
    assert missing == [0] and also_rome == [rome] and rome != new_york and 0 not in (rome, new_york)
    assert bags(kjt, "shop") == [[7], [8], [0], [7]]
    (red, blue), nothing, also_blue, (also_red, gap, green) = bags(kjt, "tags")
    assert nothing == [] and also_blue == [blue] and also_red == red and gap == 0 and len({red, blue, green, 0}) == 4


def test_one_category_per_field_makes_bags_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_source, "_BATCH_SAMPLES", 3)
    source = source_of(write(tmp_path / "a.csv", TEXT), separators=None)
    sizes = [len(batch.labels) for batch in source.read_shard(0)]
    assert sizes == [3, 1]
    (batch,) = list(source.batches(10))
    assert batch.sparse_features.lengths().tolist() == [1] * 12
    first, second, third, fourth = (bag[0] for bag in bags(batch.sparse_features, "tags"))
    assert second == 0 and len({first, second, third, fourth}) == 4, "without a separator the field is one category"


def test_the_line_is_right_in_later_batches_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_source, "_BATCH_SAMPLES", 2)
    path = write(tmp_path / "a.csv", b"x,y\n1|2,1\nz,0\n1,1\n3,1\n2|4|1,0\n")
    coding = category_coding("none", rows={"x": 4})
    source = CsvSource([path], dense=[], sparse=["x"], label="y", coding=coding, separators={"x": "|"}, max_bad_lines=1)
    with pytest.raises(DataError, match=r"a\.csv, line 6, feature 'x': .* 4;"):
        list(source.read_shard(0))


def test_digits_are_text_unless_they_are_said_to_be_integers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"x,y\n7,1\n07,0\n")
    settings: dict[str, Any] = {"dense": [], "sparse": ["x"], "label": "y", "coding": category_coding("modulo", rows={"x": 1 << 40})}
    (text,), (integers,) = (list(CsvSource([path], **settings, integers=names).batches(5)) for names in (None, ["x"]))
    assert integers.sparse_features.values().tolist() == [7, 7] and len(set(text.sparse_features.values().tolist())) == 2
    (coded,) = list(CsvSource([path], **{**settings, "coding": category_coding("none", rows={"x": 8})}).batches(5))
    assert coded.sparse_features.values().tolist() == [7, 7] and coded.dense_features.shape == (2, 0)
    with pytest.raises(DataError, match=r"a.csv, line 2, feature 'x': .*7.*0\.\.6"):
        list(CsvSource([path], **{**settings, "coding": category_coding("none", rows={"x": 7})}).batches(5))


def test_bags_of_integers(tmp_path: Path) -> None:
    data = b"x,z,y\n5|6|-7,1,1\n,2,0\n8||9,3,1\n"
    path = write(tmp_path / "a.csv", data)
    settings: dict[str, Any] = {"dense": [], "sparse": ["x", "z"], "label": "y", "integers": ["x", "z"], "separators": {"x": "|"}}
    coding = category_coding("modulo", rows={"x": 1000, "z": 1000})
    (batch,) = list(CsvSource([path], **settings, coding=coding).batches(5))
    assert bags(batch.sparse_features, "x") == [[5, 6, 993], [], [8, 0, 9]]
    write(path, data + b"1|2x|3,4,0\n9|1.5,4,0\n4,5,1\n")
    with pytest.raises(DataError, match=r"a.csv, line 5: column 'x': .*2x.*where integers are expected"):
        list(CsvSource([path], **settings, coding=coding).batches(5))
    lenient = CsvSource([path], **settings, coding=coding, max_bad_lines=2)
    (batch,) = list(lenient.batches(5))
    assert bags(batch.sparse_features, "x") == [[5, 6, 993], [], [8, 0, 9], [4]] and lenient.skipped() == {str(path): 2}
    with pytest.raises(DataError, match=r"a.csv, line 4, feature 'x': .*missing"):
        none = category_coding("none", rows={"x": 10, "z": 10})
        list(CsvSource([write(path, data.replace(b"-7", b"7"))], **settings, coding=none).batches(5))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"9,1,Rome,7,red", "expected 6 fields, received 5"),
        (b"9,1,Rome,7,red,1,2", "expected 6 fields, received 7"),
        (b"9,1,Rome,seven,red,1", "column 'shop'"),
        (b"9,1,Rome,7\xe9,red,1", "column 'shop'"),
        (b"9,one,Rome,7,red,1", "column 'price'"),
        (b"9,,Rome,7,red,1", "column 'price' is missing (and there is no fill)"),
        (b"9,nan,Rome,7,red,1", "column 'price': nan, where a finite number is expected"),
        (b"9,1e40,Rome,7,red,1", "column 'price': inf, where a finite number is expected"),
        (b"9,1,Rome,7,red,", "column 'bought' is missing"),
        (b'9,1,"Rome,7,red,1', "column"),
        (b"", "blank"),
    ],
)
def test_a_malformed_line_is_named_or_skipped(tmp_path: Path, line: bytes, message: str) -> None:
    head, tail = TEXT.split(b"3,1e3", 1)
    path = write(tmp_path / "bad.csv", head + line + b"\n3,1e3" + tail)
    with pytest.raises(DataError) as error:
        list(source_of(path).batches(10))
    assert f"{path}, line 4: " in str(error.value)
    assert message == "column" or message in str(error.value)
    lenient = source_of(path, max_bad_lines=1)
    (batch,), (good,) = list(lenient.batches(10)), list(source_of(write(tmp_path / "good.csv", TEXT)).batches(10))
    assert batch.sparse_features.values().tolist() == good.sparse_features.values().tolist()
    assert batch.sparse_features.lengths().tolist() == good.sparse_features.lengths().tolist()
    assert batch.labels.tolist() == good.labels.tolist() and lenient.skipped() == {str(path): 1}


def test_missing_dense_values_may_be_filled(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", TEXT.replace(b"1e3", b""))
    (batch,) = list(source_of(path, fill=-1).batches(10))
    assert batch.dense_features[:, 0].tolist() == [0.5, -3.0, -1.0, 0.0]
    with pytest.raises(DataError, match=r"line 3: column 'bought' is missing"):
        list(source_of(write(path, TEXT.replace(b",,0", b",,")), fill=-1).batches(10))


def test_a_last_line_that_was_cut_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.csv, line 5: expected 6 fields, received 5.*truncated"):
        list(source_of(write(tmp_path / "a.csv", TEXT[:-5])).batches(10))


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", TEXT)
    with pytest.raises(DataError, match="empty"):
        source_of(write(tmp_path / "empty.csv", b""))
    with pytest.raises(ConfigError, match=r"none\.csv"):
        source_of(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"\['price'\] are not among them"):
        source_of(write(tmp_path / "other.csv", TEXT.replace(b"price", b"cost")))
    with pytest.raises(DataError, match="or a name is there twice"):
        source_of(write(tmp_path / "twice.csv", TEXT.replace(b"id", b"city")))
    with pytest.raises(ConfigError, match=r"\['city'\] are named more than once"):
        CsvSource([path], dense=["city"], sparse=["city"], label="bought", coding=MODULO)
    with pytest.raises(ConfigError, match="sparse is empty"):
        CsvSource([path], dense=["price"], sparse=[], label="bought", coding=MODULO)
    for wrong in ({"integers": ["price"]}, {"separators": {"id": "|"}}, {"separators": {"tags": ""}}, {"delimiter": "||"}):
        with pytest.raises(ConfigError):
            source_of(path, **wrong)
    with pytest.raises(ConfigError, match="finite"):
        source_of(path, fill=float("nan"))


@pytest.mark.skipif(not JOURNEY.is_dir(), reason=f"{JOURNEY} is not here: it is not part of a clone")
def test_raw_categories_of_real_data_are_those_of_its_coded_form() -> None:
    """transactions.csv.gz is train.parquet and test.parquet as text, in another order and before anything was coded."""
    cardinalities: dict[str, int] = json.loads((JOURNEY / "cardinalities.json").read_text())
    names = list(cardinalities)

    def source(coding: Any) -> CsvSource:
        return CsvSource([JOURNEY / "transactions.csv.gz"], dense=["quantity", "sales_value"], sparse=names, label="y", coding=coding)

    vocabulary = fit_vocabulary(source(category_coding("hash", rows=dict.fromkeys(names, 1))))
    (batch,) = list(source(category_coding("vocabulary", vocabulary=vocabulary)).batches(200_000))
    tables = [pq.read_table(JOURNEY / f"{part}.parquet") for part in ("train", "test")]
    coded = {
        name: np.concatenate([table.column(name).to_numpy() for table in tables]) for name in ("label", "quantity", "sales_value", *names)
    }
    ids = {name: batch.sparse_features[name].values().numpy() for name in names}
    for name in names:
        has_missing = int((ids[name] == 0).any())
        assert vocabulary.rows[name] - 1 + has_missing == cardinalities[name]
        counts = np.bincount(ids[name])[1 - has_missing :]
        assert np.array_equal(np.sort(counts), np.sort(np.bincount(coded[name]))), "as many categories are as frequent"
        assert (np.diff(np.bincount(ids[name])[1:]) <= 0).all(), "ids by descending count"
    # Rows whose dense values (in cents) are like no other row's can be found in both.
    dense = np.round(100 * batch.dense_features.numpy().astype(np.float64)).astype(np.int64)
    cents = [np.round(100 * np.expm1(coded[name].astype(np.float64))).astype(np.int64) for name in ("quantity", "sales_value")]
    unique = []
    for quantity, value in ((dense[:, 0], dense[:, 1]), cents):
        pairs, rows, counts = np.unique(quantity * 10**7 + value, return_index=True, return_counts=True)
        unique.append((pairs[counts == 1], rows[counts == 1]))
    _, ours, theirs = np.intersect1d(unique[0][0], unique[1][0], return_indices=True)
    ours, theirs = unique[0][1][ours], unique[1][1][theirs]
    assert len(ours) > 1000
    assert np.array_equal(batch.labels.numpy()[ours], coded["label"][theirs])
    for name in names:
        pairs = np.stack([ids[name][ours], coded[name][theirs]])
        assert np.unique(pairs, axis=1).shape[1] == len(np.unique(pairs[0])) == len(np.unique(pairs[1])), f"{name}: one to one"
