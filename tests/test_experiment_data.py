"""The configured source opened: every raw format, every coding, and what is told before any sample is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fae_torchrec.config import load_config
from fae_torchrec.core.errors import ConfigError, FAEError
from fae_torchrec.data.avazu import FEATURES as AVAZU
from fae_torchrec.data.category_keys import mixed
from fae_torchrec.data.vocabulary import Vocabulary
from fae_torchrec.experiment_data import ExperimentData, make_vocabulary, open_data
from tests.data.text_files import write_text
from tests.raw_data import RAW, write_csv
from tests.small_config import write_experiment, write_run

CRITEO = [f"cat_{i}" for i in range(26)]
# source -> (train samples, test samples, features, dense columns). Of Taobao's 20 users two have 4 events, which is one window with a
# history of 2 to train on (the last event is for testing), two have 6, which is three, and 16 have the four that are taken at most, or
# more; a window is two samples.
SHAPES: dict[str, tuple[int, int, list[str], int]] = {
    "criteo": (150, 40, CRITEO, 13),
    "criteo_npy": (150, 40, CRITEO, 13),
    "avazu": (150, 40, list(AVAZU), 1),
    "taobao": (2 * (2 * 1 + 2 * 3 + 16 * 4), 2 * 20, ["user", "item", "category"], 1),
    "csv": (150, 40, ["city", "shop", "tags"], 1),
    "parquet": (150, 40, ["city", "shop", "tags"], 1),
}


def opened(folder: Path, data: dict[str, Any], *overrides: str) -> ExperimentData:
    return open_data(load_config(write_run(folder, data), overrides))


def bags_of(source: Any) -> dict[str, list[list[int]]]:
    """Feature -> the ids of every sample."""
    bags: dict[str, list[list[int]]] = {name: [] for name in source.feature_names}
    for batch in source.batches(1 << 16):
        for name in source.feature_names:
            bags[name] += [bag.tolist() for bag in batch.sparse_features[name].to_dense()]
    return bags


@pytest.mark.parametrize("source", RAW)
def test_every_raw_source_opens(source: str, tmp_path: Path) -> None:
    train, test, features, dense = SHAPES[source]
    data = opened(tmp_path, RAW[source](tmp_path))
    assert (data.train.num_samples, data.test.num_samples) == (train, test)
    assert list(data.rows) == features == list(data.train.feature_names) == list(data.test.feature_names)
    assert data.train.num_dense == data.test.num_dense == dense
    for split in (data.train, data.test):
        for name, bags in bags_of(split).items():
            ids = np.concatenate([np.array(bag) for bag in bags])
            assert ids.min() >= 0 and 1 < ids.max() < data.rows[name], name
    assert str(tmp_path) in data.name and "method" in data.name


def test_samples_are_those_of_the_files(tmp_path: Path) -> None:
    """Criteo's and csv's lines by hand, so that split, order of files and coding are seen to be right."""
    criteo = bags_of(opened(tmp_path, RAW["criteo"](tmp_path)).test)
    lines = [line.split("\t") for line in (tmp_path / "day_2").read_text().splitlines()]
    for column, name in enumerate(CRITEO):
        assert criteo[name] == [[int(line[14 + column] or "0", 16) % 50] for line in lines]
    npy = bags_of(opened(tmp_path, RAW["criteo_npy"](tmp_path)).test)
    assert npy["cat_3"] == np.load(tmp_path / "day_2_contig.npy")[40:, 3:4].tolist(), "the second half of the day"
    csv = bags_of(opened(tmp_path, RAW["csv"](tmp_path)).test)
    rows = [line.split(",") for line in (tmp_path / "c.csv").read_text().splitlines()[1:]]
    assert [len(bag) for bag in csv["tags"]] == [len(row[4].split("|")) if row[4] else 0 for row in rows]
    assert csv["shop"] == [[int(mixed(np.array([int(row[3])], dtype=np.uint64))[0] % np.uint64(50))] for row in rows]


def test_options_of_a_source_reach_its_reader(tmp_path: Path) -> None:
    write_text(tmp_path, b"1\t7\t'a\t\n0\t3\t'b\t0.5\n", "a.tsv")
    csv = {"train": ["a.tsv"], "test": ["a.tsv"], "sparse": ["n", "w"], "label": "y", "dense": ["x"], "delimiter": "\t", "fill": 2.5}
    csv |= {"columns": ["y", "n", "w", "x"], "integers": ["n"], "quoting": False, "separators": {"w": "'"}}
    data = opened(tmp_path, {"csv": csv, "coding": {"method": "modulo", "rows": {"n": 5, "w": 1 << 40}}})
    (batch,) = data.train.batches(8)
    assert batch.dense_features.tolist() == [[2.5], [0.5]] and batch.labels.tolist() == [1, 0]
    assert batch.sparse_features["n"].values().tolist() == [2, 3]
    assert dict(data.rows) == {"n": 5, "w": 1 << 40}
    taobao = RAW["taobao"](tmp_path)
    shapes = {}
    for changed, value in (("seed", 0), ("history", 5), ("min_history", 4), ("windows_per_user", 1), ("negatives", "popular"), ("seed", 1)):
        taobao["taobao"] = {**taobao["taobao"], changed: value}
        train = opened(tmp_path, taobao).train
        shapes[f"{changed} {value}"] = (train.num_samples, max(map(len, bags_of(train)["user"])), str(bags_of(train)["item"]))
    assert [shape[:2] for shape in shapes.values()] == [(144, 5), (144, 6), (130, 6), (36, 6), (36, 6), (36, 6)]
    assert len({items for _, _, items in shapes.values()}) == len(shapes), "each option changes the samples"
    assert [path.name[:7] for path in (tmp_path / "events").iterdir()] == ["events-"]


@pytest.mark.parametrize("source", ["criteo", "avazu", "csv", "parquet"])
def test_the_last_samples_are_held_out(source: str, tmp_path: Path) -> None:
    raw = RAW[source](tmp_path)
    whole = bags_of(opened(tmp_path, raw).train)
    raw[source] = {key: value for key, value in raw[source].items() if key != "test"}
    data = opened(tmp_path, {**raw, "holdout": 0.4})
    assert (data.train.num_samples, data.test.num_samples) == (90, 60)
    train, test = bags_of(data.train), bags_of(data.test)
    assert train == {name: bags[:90] for name, bags in whole.items()} and test == {name: bags[90:] for name, bags in whole.items()}
    # A vocabulary is fitted on what is for training alone: here on the first file.
    vocabulary = {"coding": {"method": "vocabulary", "vocabulary": "v.npz"}}
    make_vocabulary(load_config(write_run(tmp_path, {**raw, **vocabulary, "holdout": 0.4})))
    held = Vocabulary.load(tmp_path / "v.npz")
    first = {**raw[source], "train": raw[source]["train"][0], "test": raw[source]["train"][1]}
    make_vocabulary(load_config(write_run(tmp_path, {source: first, **vocabulary})))
    assert Vocabulary.load(tmp_path / "v.npz").fingerprint == held.fingerprint


@pytest.mark.parametrize(
    ("coding", "expected"),
    [
        ({"method": "modulo", "max_rows": 7}, {"city": 7, "shop": 7, "tags": 7}),
        ({"method": "modulo", "max_rows": 7, "rows": {"city": 5, "shop": 9, "tags": 7, "more": 3}}, {"city": 5, "shop": 7, "tags": 7}),
        ({"rows": "rows.json"}, {"city": 11, "shop": 12, "tags": 13}),
        ({"method": "hash", "rows": {"city": 2, "shop": 3, "tags": 4}}, {"city": 2, "shop": 3, "tags": 4}),
    ],
)
def test_rows_of_the_tables(coding: dict[str, Any], expected: Mapping[str, int], tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"city": 11, "shop": 12, "tags": 13}')
    data = opened(tmp_path, {**RAW["csv"](tmp_path), "coding": coding})
    assert dict(data.rows) == expected
    for name, bags in bags_of(data.train).items():
        assert {i for bag in bags for i in bag} <= set(range(expected[name]))
    assert f"method {coding.get('method', 'hash')}" in data.name


def vocabulary_of(folder: Path, **coding: Any) -> Vocabulary:
    data = {**RAW["csv"](folder), "coding": {"method": "vocabulary", "vocabulary": "v.npz", **coding}}
    make_vocabulary(load_config(write_run(folder, data)))
    return Vocabulary.load(folder / "v.npz")


def test_a_vocabulary_is_fitted_and_used(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(tmp_path)
    texts = [line.split(",")[2] for line in (tmp_path / "a.csv").read_text().splitlines()[1:]]
    data = open_data(load_config(tmp_path / "run.yaml"))
    assert dict(data.rows) == vocabulary.rows and vocabulary.fingerprint in data.name
    ids = [bag[0] for bag in bags_of(data.train)["city"]]
    named = dict(zip(texts, ids[:90], strict=True))
    assert len(set(named.values())) == len(named), "each city has an id of its own"
    counts = np.bincount(ids)
    assert counts[0] == 0 and (np.diff(counts[1:]) <= 0).all(), "1, 2, ... by how often they occur; nothing of the train data is unknown"
    assert len(counts) == vocabulary.rows["city"]


def test_limits_of_a_vocabulary(tmp_path: Path) -> None:
    full = vocabulary_of(tmp_path).rows
    assert vocabulary_of(tmp_path, max_rows=6).rows == dict.fromkeys(full, 6)
    rows = {"city": 4, "shop": 9, "tags": 1000}
    assert vocabulary_of(tmp_path, rows=rows).rows == {"city": 4, "shop": 9, "tags": full["tags"]}
    assert vocabulary_of(tmp_path, rows=rows, max_rows=6).rows == {"city": 4, "shop": 6, "tags": 6}
    assert 1 < vocabulary_of(tmp_path, min_count=5).rows["city"] < full["city"]


def test_what_is_wrong_with_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows: no rows for the features \['shop', 'tags'\]; it has \['city'\]"):
        vocabulary_of(tmp_path, rows={"city": 4})
    with pytest.raises(ConfigError, match=r"there is no folder .*absent to write to"):
        vocabulary_of(tmp_path, vocabulary="absent/v.npz")
    with pytest.raises(ConfigError, match=r"method: received 'hash'; `fae vocabulary` needs 'vocabulary'"):
        make_vocabulary(load_config(write_run(tmp_path, RAW["csv"](tmp_path))))
    with pytest.raises(ConfigError, match=r"data\.coding: received method 'hash' and vocabulary .*v\.npz"):
        vocabulary_of(tmp_path, method="hash", max_rows=9)
    write_experiment(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.coding: received one for data\.parquet"):
        load_config(tmp_path / "run.yaml", ["data.coding.max_rows=3"])
    assert not list(tmp_path.rglob("v.npz")), "nothing was written"
    vocabulary_of(tmp_path)
    columns = RAW["csv"](tmp_path)["csv"] | {"sparse": ["city", "age"], "dense": [], "separators": None, "integers": None}
    with pytest.raises(ConfigError, match=r"the vocabulary has no feature 'age'; it has \['city', 'shop', 'tags'\]"):
        opened(tmp_path, {"csv": columns, "coding": {"method": "vocabulary", "vocabulary": "v.npz"}})


def test_paths_are_relative_to_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "data").mkdir(parents=True)
    for name, seed in (("a.csv", 0), ("b.csv", 1)):
        write_csv(tmp_path / "conf" / "data", name, 20, seed)
    write_csv(tmp_path, "here.csv", 9, 2)
    data = RAW["csv"](tmp_path)
    data["csv"] |= {"train": ["data/a.csv", str(tmp_path / "conf" / "data" / "b.csv")], "test": ["data/a.csv"]}
    data["coding"] = {"rows": "data/rows.json"}
    (tmp_path / "conf" / "data" / "rows.json").write_text(json.dumps({"city": 3, "shop": 3, "tags": 3}))
    write_run(tmp_path / "conf", data)
    monkeypatch.chdir(tmp_path)
    assert open_data(load_config("conf/run.yaml")).train.num_samples == 40
    assert open_data(load_config("conf/run.yaml", ["data.csv.train=[here.csv]"])).train.num_samples == 9, "of an override: to where we are"
    monkeypatch.chdir("conf")
    with pytest.raises(FAEError, match=r"here\.csv"):
        open_data(load_config("run.yaml", ["data.csv.train=[here.csv]"]))


@pytest.mark.parametrize(
    ("source", "overrides", "words"),
    [
        ("criteo", ["data.criteo.train=[day_0, absent]"], "absent"),
        ("criteo_npy", ["data.criteo_npy.train_days=[0, 7]"], r"no file .*day_7_dense\.npy"),
        ("criteo_npy", ["data.criteo_npy.sparse_part=sparse"], r"no file .*day_0_sparse\.npy"),
        ("avazu", ["data.avazu.test=[absent.csv]"], r"absent\.csv"),
        ("taobao", ["data.taobao.files=[absent.csv]"], r"absent\.csv"),
        ("taobao", ["data.taobao.min_history=9"], "1 <= min_history <= history"),
        ("csv", ["data.csv.test=[absent.csv]"], r"absent\.csv"),
        ("csv", ["data.csv.label=bought"], r"the columns are .*\['bought'\] are not among them"),
        ("csv", ["data.csv.dense=[]"], r"data\.csv\.dense: received no columns; the dlrm model needs at least one"),
        ("csv", ["data.coding={rows: {city: 3}}"], r"data\.coding\.rows: no rows for the features \['shop', 'tags'\]; it has \['city'\]"),
        ("csv", ["data.coding={method: vocabulary, vocabulary: absent.npz}"], r"absent\.npz"),
    ],
)
def test_what_cannot_be_opened(source: str, overrides: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_run(tmp_path, RAW[source](tmp_path))
    if overrides[0].startswith("data.coding"):
        path.write_text(path.read_text().replace("max_rows: 50", "").replace("method: hash", ""))
    with pytest.raises(FAEError, match=words):
        open_data(load_config(path, overrides))
