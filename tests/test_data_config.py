"""The `data` section: one source, its options, and how raw categories become rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fae_torchrec.config import RunConfig, load_config
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.data_config import CodingConfig, CriteoNpyConfig, CsvConfig, DataConfig, FilesConfig, ParquetConfig, TaobaoConfig

CODING = "coding: {max_rows: 9}"
CRITEO = "criteo: {train: [a, b], test: [c]}"
CSV = "csv: {train: [a], test: [b], sparse: [u], label: y"


def read(folder: Path, data: str, *overrides: str) -> DataConfig:
    path = folder / "run.yaml"
    path.write_text(f"data: {{{data}}}\n")
    config = load_config(path, overrides)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config, "as it is sent to the ranks and kept in reports"
    return config.data


def test_sources_with_their_defaults(tmp_path: Path) -> None:
    data = read(tmp_path, f"{CRITEO}, {CODING}")
    a, b, c, folder = (str(tmp_path / name) for name in ("a", "b", "c", "."))
    assert (data.source, data.criteo, data.max_bad_lines) == ("criteo", FilesConfig(train=(a, b), test=(c,)), 0)
    assert data.coding == CodingConfig(method="hash", rows=None, max_rows=9, vocabulary=None, min_count=1)
    assert read(tmp_path, f"avazu: {{train: [a], test: [c]}}, {CODING}").avazu == FilesConfig((a,), (c,))
    npy = read(tmp_path, f"criteo_npy: {{folder: ., train_days: [0, 22]}}, {CODING}").criteo_npy
    assert npy == CriteoNpyConfig(folder, train_days=(0, 22), test_day=23, test_stage="train", sparse_part="sparse")
    taobao = read(tmp_path, f"taobao: {{files: [a], index_folder: b}}, {CODING}").taobao
    assert taobao == TaobaoConfig((a,), 20, None, 10, "uniform", 0, index_folder=b)
    csv = read(tmp_path, f"{CSV}, quoting: false, fill: 1, separators: {{u: ;}}, columns: [y, u]}}, {CODING}, max_bad_lines: 3")
    assert csv.csv == CsvConfig(("u",), "y", (a,), (b,), fill=1.0, quoting=False, separators={"u": ";"}, columns=("y", "u"))
    assert csv.max_bad_lines == 3
    held = read(tmp_path, f"criteo: {{train: a}}, {CODING}, holdout: 0.1")
    assert (held.criteo, held.holdout) == (FilesConfig(train=(a,), test=()), 0.1), "one path is a list of one"
    raw = read(tmp_path, f"parquet: {{train: [a, b], test: c, sparse: [u], label: y}}, {CODING}").parquet
    assert raw == ParquetConfig(("u",), "y", train=(a, b), test=(c,), cardinalities=None)


@pytest.mark.parametrize(
    ("coding", "expected"),
    [
        ("{method: modulo, max_rows: 2}", CodingConfig(method="modulo", max_rows=2)),
        ("{method: none, rows: {u: 3}}", CodingConfig(method="none", rows={"u": 3})),
        ("{rows: rows.json, max_rows: 5}", CodingConfig(rows={"u": 7, "v": 8}, max_rows=5)),
        ("{method: vocabulary, vocabulary: 's3://v.npz', min_count: 4}", CodingConfig("vocabulary", vocabulary="s3://v.npz", min_count=4)),
    ],
)
def test_codings(coding: str, expected: CodingConfig, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"u": 7, "v": 8}')
    assert read(tmp_path, f"{CRITEO}, coding: {coding}").coding == expected


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (CRITEO, ["data.coding: received neither rows nor max_rows", "rows of each feature's table, or max_rows for all"]),
        (f"{CRITEO}, coding: {{method: none}}", ["neither rows nor max_rows"]),
        (f"{CRITEO}, {CODING}, {CSV}}}", ["data: received criteo and csv; give exactly one of ['synthetic', 'parquet', 'criteo'"]),
        (f"criteo: {{train: [a], train: [b], test: [c]}}, {CODING}", ["the keys ['train'] are given more than once"]),
        (f"criteo: {{train: 1, test: [c]}}, {CODING}", ["data.criteo.train", "a list, such as ["]),
        (f"criteo: {{train: [], test: [c]}}, {CODING}", ["data.criteo.train: received no files"]),
        (f"avazu: {{train: [a], test: []}}, {CODING}", ["data.avazu: received neither test files nor data.holdout", "such as 0.1"]),
        (f"{CRITEO}, {CODING}, holdout: 0.1", ["data.criteo: received test samples and data.holdout"]),
        ("synthetic: {}, holdout: 0.1", ["data.synthetic: received test samples and data.holdout"]),
        (f"avazu: {{train: a}}, {CODING}, holdout: 1", ["data.holdout", "1", "at most 0.99"]),
        ("parquet: {train: a, test: b, sparse: [u], label: y}", ["data.coding: received neither rows nor max_rows"]),
        (f"parquet: {{train: a, test: b, sparse: [u], label: y, cardinalities: {{u: 3}}}}, {CODING}", ["whose ids are rows already"]),
        (f"taobao: {{files: []}}, {CODING}", ["data.taobao.files: received no files"]),
        (f"taobao: {{files: [a], negatives: some}}, {CODING}", ["data.taobao.negatives", "'some'", "'uniform', 'popular'"]),
        (f"criteo_npy: {{folder: a, train_days: [-1]}}, {CODING}", ["data.criteo_npy.train_days", "-1", "at least 0"]),
        (f"{CSV}, quoting: 1}}, {CODING}", ["data.csv.quoting", "received 1 (int)", "true or false"]),
        (f"{CSV}, separators: {{u: 1}}}}, {CODING}", ["data.csv.separators.u", "1", "text"]),
        (f"{CSV}, separators: ;}}, {CODING}", ["data.csv.separators", "a mapping of names, each to text"]),
        (CSV.replace("[u]", "[]") + f"}}, {CODING}", ["data.csv.sparse: received no columns"]),
        (f"{CRITEO}, coding: {{method: frequency, max_rows: 9}}", ["data.coding.method", "'frequency'", "'vocabulary', 'none'"]),
        (f"{CRITEO}, coding: {{max_rows: 1}}", ["data.coding.max_rows", "1", "at least 2"]),
        (f"{CRITEO}, coding: {{rows: {{u: 0}}}}", ["data.coding.rows", "{'u': 0}", "at least 1 row"]),
        (f"{CRITEO}, coding: {{rows: {{u: x}}}}", ["data.coding.rows.u", "'x'", "a whole number"]),
        (f"{CRITEO}, coding: {{rows: absent.json}}", ["data.coding.rows", "absent.json is not a readable JSON file"]),
        (f"{CRITEO}, coding: {{method: vocabulary}}", ["method 'vocabulary' and vocabulary None", "`fae vocabulary` writes it"]),
        (f"{CRITEO}, coding: {{vocabulary: v.npz, max_rows: 9}}", ["received method 'hash' and vocabulary", "the others have none"]),
        (f"synthetic: {{}}, {CODING}", ["data.coding: received one for data.synthetic, whose ids are rows already"]),
        (f"{CRITEO}, {CODING}, max_bad_lines: -1", ["data.max_bad_lines", "-1", "at least 0"]),
    ],
)
def test_mistakes_are_named(data: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, data)
    told = str(caught.value)
    assert [word for word in words if word not in told] == [], told
    assert told.startswith(f"{tmp_path / 'run.yaml'}: ") and "\n" not in told


def test_paths_of_lists_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    data = read(tmp_path / "conf", f"criteo: {{train: [a, /b, 's3://c'], test: [../d]}}, {CODING}", "data.criteo.test=[e, s3://f]")
    assert data.criteo is not None
    assert data.criteo.train == (str(tmp_path / "conf" / "a"), "/b", "s3://c")
    assert data.criteo.test == (str(tmp_path / "e"), "s3://f")
