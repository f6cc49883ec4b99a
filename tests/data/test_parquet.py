"""ParquetSource: what goes in comes out, dealt to ranks as BatchSource says; bad input is named by column and row."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.coding import category_coding
from fae_torchrec.data.parquet import ParquetSource
from fae_torchrec.data.vocabulary import fit_vocabulary
from tests.data.text_files import mount

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "completejourney"
ROWS = {"one": 50, "many": 7}


def columns(n: int) -> dict[str, Any]:
    """Row i: dense i and i / 2, one = i % 50, many = i % 3 ids, label i % 2."""
    return {
        "x": pa.array([float(i) for i in range(n)], pa.float64()),
        "y": pa.array([i / 2 for i in range(n)], pa.float32()),
        "one": pa.array([i % 50 for i in range(n)], pa.int32()),
        "many": pa.array([[(i + j) % 7 for j in range(i % 3)] for i in range(n)], pa.list_(pa.int64())),
        "label": pa.array([i % 2 for i in range(n)], pa.int8()),
    }


def write(folder: Path, data: dict[str, Any], row_group_size: int = 1000) -> Path:
    path = folder / "data.parquet"
    pq.write_table(pa.table(data), path, row_group_size=row_group_size)
    return path


def open_source(path: Path | str, **changes: Any) -> ParquetSource:
    arguments: dict[str, Any] = {"dense": ["x", "y"], "sparse": ["one", "many"], "label": "label", "tables_rows": ROWS}
    return ParquetSource(path, **{**arguments, **changes})


def rows_of(batches: list[Batch]) -> list[int]:
    """The row numbers of all samples (column x), after every other value of the sample was checked against it."""
    rows: list[int] = []
    for batch in batches:
        kjt = batch.sparse_features
        numbers = [int(x) for x in batch.dense_features[:, 0].tolist()]
        assert batch.dense_features.dtype == batch.labels.dtype == torch.float32
        assert kjt.values().dtype == torch.int64
        assert kjt.keys() == ["one", "many"]
        assert kjt.stride() == len(numbers)
        assert batch.dense_features[:, 1].tolist() == [i / 2 for i in numbers]
        assert batch.labels.tolist() == [i % 2 for i in numbers]
        assert kjt["one"].values().tolist() == [i % 50 for i in numbers]
        assert kjt["one"].lengths().tolist() == [1] * len(numbers)
        assert kjt["many"].lengths().tolist() == [i % 3 for i in numbers]
        assert kjt["many"].values().tolist() == [(i + j) % 7 for i in numbers for j in range(i % 3)]
        rows += numbers
    return rows


def test_one_pass_gives_every_row_in_order_and_a_second_the_same(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, columns(23), row_group_size=7))
    assert (source.num_samples, source.num_dense, source.feature_names) == (23, 2, ("one", "many"))
    batches = list(source.batches(5))
    assert [batch.labels.numel() for batch in batches] == [5, 5, 5, 5, 3]
    assert rows_of(batches) == list(range(23))
    assert rows_of(list(source.batches(5))) == list(range(23))
    assert rows_of(list(pickle.loads(pickle.dumps(source)).batches(100))) == list(range(23))


def test_shards_are_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fae_torchrec.data.parquet._CHUNK_ROWS", 4)
    source = open_source(write(tmp_path, columns(23), row_group_size=9))
    assert (source.num_shards, source.shard_sizes().tolist(), source.size_hint()) == (3, [9, 9, 5], 23)
    shards = [[rows_of([batch]) for batch in source.read_shard(shard)] for shard in range(3)]
    assert shards == [[[0, 1, 2, 3], [4, 5, 6, 7], [8]], [[9, 10, 11, 12], [13, 14, 15, 16], [17]], [[18, 19, 20, 21], [22]]]
    assert source.skipped() == {}
    size = (tmp_path / "data.parquet").stat().st_size
    assert source.name.startswith(f"parquet {tmp_path / 'data.parquet'}, 23 samples, {size} bytes, written 20")


def test_a_path_that_iopath_knows(tmp_path: Path) -> None:
    mount(tmp_path, "parquets://")
    write(tmp_path, columns(23), row_group_size=9)
    assert rows_of(list(open_source("parquets://data.parquet").batches(10))) == list(range(23))


def test_ranks_are_dealt_contiguous_runs_of_each_step(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, columns(11), row_group_size=3))
    got = [[rows_of([batch]) for batch in source.batches(2, rank=rank, world_size=2)] for rank in range(2)]
    assert got == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]  # row 10 is the remainder of 11 / 2


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 60),
    row_group_size=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    world=st.integers(1, 4),
)
def test_every_step_is_a_run_of_the_file_dealt_to_the_ranks(
    tmp_path_factory: pytest.TempPathFactory, n: int, row_group_size: int, batch_size: int, world: int
) -> None:
    source = open_source(write(tmp_path_factory.mktemp("deal"), columns(n), row_group_size))
    shares = [[rows_of([batch]) for batch in source.batches(batch_size, rank=rank, world_size=world)] for rank in range(world)]
    assert {len(share) for share in shares} == {-(-(n // world) // batch_size)}
    # Read step by step, rank by rank, the shares are the file again, short by the remainder; every rank has its floor(n / world).
    assert [row for step in zip(*shares, strict=True) for rows in step for row in rows] == list(range(n // world * world))
    assert all(sum(map(len, share)) == n // world for share in shares)
    assert all(len(rows) == batch_size for share in shares for rows in share[:-1])


def test_runs_cross_decoded_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fae_torchrec.data.parquet._CHUNK_ROWS", 4)
    source = open_source(write(tmp_path, columns(50), row_group_size=11))
    assert rows_of(list(source.batches(9))) == list(range(50))
    shares = [rows_of(list(source.batches(9, rank=rank, world_size=2))) for rank in range(2)]
    assert shares[0] == [*range(0, 9), *range(18, 27), *range(36, 43)]
    assert shares[1] == [*range(9, 18), *range(27, 36), *range(43, 50)]


def test_row_groups_of_other_ranks_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write(tmp_path, columns(40), row_group_size=5))
    read: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def recorded(self: Any, *args: Any, row_groups: list[int], **kwargs: Any) -> Any:
        read.extend(row_groups)
        return iter_batches(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recorded)
    assert rows_of(list(source.batches(10, rank=1, world_size=2))) == [*range(10, 20), *range(30, 40)]
    assert read == [2, 3, 6, 7]


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint8())])
def test_lists_of_any_integers_are_multi_hot(tmp_path: Path, kind: Any) -> None:
    data = columns(20)
    data["many"] = data["many"].cast(kind)
    assert rows_of(list(open_source(write(tmp_path, data)).batches(6))) == list(range(20))


def test_fixed_size_lists_and_no_dense_columns(tmp_path: Path) -> None:
    data = {"pair": pa.array([[0, 1], [2, 3], [4, 0]], pa.list_(pa.int64(), 2)), "label": pa.array([True, False, True])}
    (batch,) = ParquetSource(write(tmp_path, data), dense=[], sparse=["pair"], label="label", tables_rows={"pair": 5}).batches(8)
    assert batch.dense_features.shape == (3, 0)
    assert batch.sparse_features.lengths().tolist() == [2, 2, 2]
    assert batch.sparse_features.values().tolist() == [0, 1, 2, 3, 4, 0]
    assert batch.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1])
@pytest.mark.parametrize("row", [0, 13, 29])
def test_an_id_out_of_range_names_column_row_id_and_range(tmp_path: Path, bad: int, row: int) -> None:
    data = columns(30)
    ids = data["one"].to_pylist()
    ids[row] = bad
    source = open_source(write(tmp_path, {**data, "one": pa.array(ids, pa.int32())}, row_group_size=8))
    with pytest.raises(DataError, match=rf"data\.parquet: column 'one', row {row} .*id {bad} .*allowed 0\.\.49"):
        list(source.batches(7))
    # The rank that reads the row names it as the file does.
    with pytest.raises(DataError, match=rf"row {row} "):
        for rank in range(2):
            list(source.batches(4, rank=rank, world_size=2))


def test_a_huge_unsigned_id_is_out_of_range(tmp_path: Path) -> None:
    data = {**columns(2), "one": pa.array([0, 2**64 - 1], pa.uint64())}
    with pytest.raises(DataError, match=rf"row 1 .*id {2**64 - 1} "):
        list(open_source(write(tmp_path, data)).batches(2))


def test_an_id_out_of_range_in_a_list_names_its_row(tmp_path: Path) -> None:
    data = {**columns(6), "many": pa.array([[], [1, 2], [], [3, 7, 8], [9], []], pa.list_(pa.int64()))}
    with pytest.raises(DataError, match=r"column 'many', row 3 .*id 7 .*allowed 0\.\.6"):
        list(open_source(write(tmp_path, data)).batches(4))
    with pytest.raises(DataError, match=r"column 'many', row 4 .*id 9 "):
        list(open_source(write(tmp_path, data), tables_rows={"one": 50, "many": 9}).batches(4))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("x", pa.array([0.0, 1.0, None, 3.0]), r"column 'x', row 2 .*is null"),
        ("y", pa.array([0.0, float("nan"), 1.0, 3.0]), r"column 'y', row 1: nan is not a finite"),
        ("x", pa.array([0.0, 0.0, 0.0, 1e300]), r"column 'x', row 3: 1e\+300 is not a finite float32"),
        ("one", pa.array([0, 1, 2, None], pa.int64()), r"column 'one', row 3 .*is null"),
        ("many", pa.array([[1], None, [2], []], pa.list_(pa.int64())), r"column 'many', row 1 .*is null.*empty list"),
        ("many", pa.array([[1], [], [2, None], []], pa.list_(pa.int64())), r"column 'many', row 2 .*id null"),
        ("label", pa.array([0, None, 1, 1], pa.int8()), r"column 'label', row 1 .*is null"),
    ],
)
def test_nulls_and_infinities_are_errors_not_zeros(tmp_path: Path, column: str, values: Any, message: str) -> None:
    source = open_source(write(tmp_path, {**columns(4), column: values}))
    with pytest.raises(DataError, match=message):
        list(source.batches(3))


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, columns(1))
    with pytest.raises(ConfigError, match=r"no parquet file at .*train\.parquet; .*\['data\.parquet'\]"):
        open_source(tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match="does not exist either"):
        open_source(tmp_path / "nowhere" / "train.parquet")


def test_missing_columns_and_wrong_types_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, {**columns(2), "name": pa.array(["a", "b"])})
    with pytest.raises(DataError, match=r"no columns \['z'\]; it has \['x', 'y', 'one', 'many', 'label', 'name'\]"):
        open_source(path, dense=["x", "z"])
    with pytest.raises(DataError, match=r"column 'x' has type double; allowed are integers"):
        open_source(path, dense=[], sparse=["x"], tables_rows={"x": 3})
    with pytest.raises(DataError, match=r"column 'name' has type string; allowed are numbers"):
        open_source(path, dense=["name"])
    with pytest.raises(DataError, match=r"column 'many' has type list.*; allowed are numbers"):
        open_source(path, dense=["many"], sparse=["one"])


def test_wrong_arguments_are_config_errors(tmp_path: Path) -> None:
    path = write(tmp_path, columns(2))
    with pytest.raises(ConfigError, match=r"\['x'\] are named more than once"):
        open_source(path, dense=["x", "x"])
    with pytest.raises(ConfigError, match=r"no row count for the sparse columns \['many'\]; counts are given for \['one'\]"):
        open_source(path, tables_rows={"one": 50})
    with pytest.raises(ConfigError, match="at least one"):
        open_source(path, sparse=[])
    source = open_source(path)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, received 0"):
        source.batches(0)
    with pytest.raises(ConfigError, match="received rank=2, world_size=2"):
        source.batches(1, rank=2, world_size=2)


def test_a_file_that_is_not_parquet_or_is_cut_short_is_a_data_error(tmp_path: Path) -> None:
    path = write(tmp_path, columns(500))
    source = open_source(path)
    content = path.read_bytes()
    path.write_bytes(b"not parquet at all, only text")
    with pytest.raises(DataError, match="cannot be read as a parquet file"):
        open_source(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        list(source.batches(100))


@pytest.mark.skipif(not (REAL / "train.parquet").exists(), reason=f"the data set completejourney is not at {REAL}")
def test_completejourney_as_it_is_described() -> None:
    rows: dict[str, int] = json.loads((REAL / "cardinalities.json").read_text())
    source = ParquetSource(REAL / "train.parquet", dense=["quantity", "sales_value"], sparse=list(rows), label="label", tables_rows=rows)
    assert source.num_samples == 90_000
    # The second method: the whole file at once through pyarrow.
    table = pq.read_table(REAL / "train.parquet")
    largest, labels, seen = np.zeros(len(rows), dtype=np.int64), 0.0, 0
    for batch in source.batches(4096):
        ids = batch.sparse_features.values().view(len(rows), -1)
        assert int(ids.min()) >= 0
        largest = np.maximum(largest, ids.max(dim=1).values.numpy())
        expected = np.stack([table.column(name)[seen : seen + ids.shape[1]].to_numpy() for name in rows])
        assert np.array_equal(ids.numpy(), expected)
        labels += batch.labels.double().sum().item()
        seen += batch.labels.numel()
    assert seen == 90_000
    assert all(last < rows[name] for name, last in zip(rows, largest, strict=True))
    assert labels / seen == pytest.approx(table.column("label").to_numpy().mean())
    assert 0.3 < labels / seen < 0.7
    # Two ranks of 45,000 samples, together every sample once (compared by the sum of a column that differs by row).
    halves = [[batch.dense_features.double().sum().item() for batch in source.batches(4096, rank=r, world_size=2)] for r in range(2)]
    whole = sum(table.column(name).to_numpy().astype(np.float64).sum() for name in ("quantity", "sales_value"))
    assert sum(map(sum, halves)) == pytest.approx(whole)


def test_raw_categories_are_coded(tmp_path: Path) -> None:
    """Text, bags of text with null and empty bags, and integers with a null, by a vocabulary fitted on the file itself."""
    path = tmp_path / "raw.parquet"
    columns = {
        "city": pa.array(["Rom", None, "Bern", "Rom", ""]),
        "tags": pa.array([["a", "b"], None, [], ["b", None], ["b"]], pa.list_(pa.string())),
        "shop": pa.array([7, 7, None, -1, 9], pa.int64()),
        "label": pa.array([0, 1, 0, 1, 1]),
    }
    pq.write_table(pa.table(columns), path, row_group_size=2)
    names = ("city", "tags", "shop")
    raw = ParquetSource(path, dense=[], sparse=names, label="label", coding=category_coding("hash", dict.fromkeys(names, 1)))
    vocabulary = fit_vocabulary(raw)
    assert vocabulary.rows == {"city": 3, "tags": 3, "shop": 4}
    source = ParquetSource(path, dense=[], sparse=names, label="label", coding=category_coding("vocabulary", vocabulary=vocabulary))
    (batch,) = source.batches(5)
    ids = {name: [bag.tolist() for bag in batch.sparse_features[name].to_dense()] for name in names}
    assert ids["city"] == [[1], [0], [2], [1], [0]], "the most frequent first; missing is 0"
    assert ids["tags"] == [[2, 1], [], [], [1, 0], [1]]
    assert sorted(ids["shop"][3] + ids["shop"][4]) == [2, 3] and ids["shop"][:3] == [[1], [1], [0]]


def test_a_coding_and_rows_are_one_too_many(tmp_path: Path) -> None:
    path = write(tmp_path, columns(4))
    both: dict[str, Any] = {"tables_rows": {"one": 7}, "coding": category_coding("hash", {"one": 7})}
    for options in ({}, both):
        with pytest.raises(ConfigError, match="tables_rows and coding, or neither"):
            ParquetSource(path, dense=[], sparse=["one"], label="label", **options)
    with pytest.raises(DataError, match=r"column 'one', row 2: .*category 2 of 4 .*ids 0\.\.1 are allowed"):
        list(ParquetSource(path, dense=[], sparse=["one"], label="label", coding=category_coding("none", {"one": 2})).batches(4))
