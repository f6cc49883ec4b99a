"""The reader of TorchRec's preprocessed Criteo, compared with TorchRec's own reader on files that TorchRec's own tool wrote."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.datasets.criteo import BinaryCriteoUtils, InMemoryBinaryCriteoIterDataPipe

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data import criteo_npy
from fae_torchrec.data.coding import category_coding
from fae_torchrec.data.criteo_npy import CriteoNpySource

ROWS = {f"cat_{i}": 3 + i for i in range(26)}
MODULO = category_coding("modulo", rows=ROWS)
PARTS = ("dense", "sparse", "labels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Days 0 and 1, 23 and 10 rows, preprocessed by TorchRec from text with missing values and hashes of 2**31 and more."""
    folder = tmp_path_factory.mktemp("criteo")
    rng = np.random.default_rng(1)
    for day, rows in ((0, 23), (1, 10)):
        lines = []
        for _ in range(rows):
            dense = ["" if rng.random() < 0.2 else str(rng.integers(-3, 1000)) for _ in range(13)]
            sparse = ["" if rng.random() < 0.2 else f"{rng.integers(0, 2**32):08x}" for _ in range(26)]
            lines.append("\t".join([str(rng.integers(0, 2)), *dense, *sparse]))
        text = folder / f"day_{day}"
        text.write_text("\n".join(lines) + "\n")
        BinaryCriteoUtils.tsv_to_npys(str(text), *(str(folder / f"day_{day}_{part}.npy") for part in PARTS))
    return folder


def theirs(folder: Path, days: list[int], stage: str, hashes: list[int] | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    paths = [[str(folder / f"day_{day}_{part}.npy") for day in days] for part in PARTS]
    pipe = InMemoryBinaryCriteoIterDataPipe(stage, *paths, batch_size=1000, rank=0, world_size=1, hashes=hashes)
    (batch,) = list(pipe)
    assert batch.sparse_features.keys() == list(ROWS)
    return batch.dense_features, batch.sparse_features.values(), batch.labels


@pytest.mark.parametrize(("stage", "days"), [("train", [0, 1]), ("train", [1]), ("val", [0]), ("test", [0])])
def test_batches_are_those_of_torchrec(folder: Path, stage: str, days: list[int]) -> None:
    source = CriteoNpySource(folder, days, coding=MODULO, stage=stage)  # type: ignore[arg-type]
    dense, values, labels = theirs(folder, days, stage, list(ROWS.values()))
    (batch,) = list(source.batches(1000))
    assert torch.equal(batch.dense_features, dense) and batch.dense_features.dtype == torch.float32
    assert torch.equal(batch.sparse_features.values(), values)
    assert batch.sparse_features.keys() == list(source.feature_names) == list(ROWS)
    assert batch.sparse_features.lengths().tolist() == [1] * len(values)
    assert torch.equal(batch.labels, labels.float()) and batch.labels.dtype == torch.float32


def test_int32_files_that_wrapped_give_what_torchrec_gives(folder: Path, tmp_path: Path) -> None:
    """TorchRec's `shuffle` stores int32: hex values of 2**31 and more become negative, and `%` of them is not that of the original."""
    for part in PARTS:
        array = np.load(folder / f"day_0_{part}.npy")
        np.save(tmp_path / f"day_0_{part}.npy", array.astype(np.int32) if part == "sparse" else array)
    assert np.load(tmp_path / "day_0_sparse.npy").min() < 0
    (batch,) = list(CriteoNpySource(tmp_path, [0], coding=MODULO).batches(1000))
    _, values, _ = theirs(tmp_path, [0], "train", list(ROWS.values()))
    assert torch.equal(batch.sparse_features.values(), values.long())
    (wide,) = list(CriteoNpySource(folder, [0], coding=MODULO).batches(1000))
    assert not torch.equal(batch.sparse_features.values(), wide.sparse_features.values()), "a negative control"


def test_shards_are_ranges_of_rows_and_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo_npy, "SHARD_ROWS", 8)
    monkeypatch.setattr(criteo_npy, "_CHUNK_ROWS", 3)
    source = CriteoNpySource(folder, [0, 1], coding=MODULO)
    assert source.num_shards == 3 + 2
    assert source.shard_sizes().tolist() == [8, 8, 7, 8, 2]
    assert source.num_samples == source.size_hint() == 33
    dense, values, labels = theirs(folder, [0, 1], "train", list(ROWS.values()))
    copied = pickle.loads(pickle.dumps(source))
    pieces = [batch for shard in range(5) for batch in copied.read_shard(shard)]
    assert [len(piece.labels) for piece in pieces] == [3, 3, 2, 3, 3, 2, 3, 3, 1, 3, 3, 2, 2]
    assert torch.equal(torch.cat([piece.dense_features for piece in pieces]), dense)
    assert torch.equal(torch.cat([piece.labels for piece in pieces]), labels.float())
    assert torch.equal(torch.cat([piece.sparse_features.values().view(26, -1) for piece in pieces], dim=1), values.view(26, -1))
    keys = [chunk["cat_5"][0] for shard in range(5) for chunk in source.read_keys(shard)]
    stored = np.concatenate([np.load(folder / f"day_{day}_sparse.npy")[:, 5] for day in (0, 1)])
    assert np.array_equal(np.concatenate(keys), stored)


def test_contiguous_ids_are_taken_as_they_are_and_checked(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    ids = np.stack([rng.integers(0, rows, 23) for rows in ROWS.values()], axis=1).astype(np.int32)
    for part in ("dense", "labels"):
        (tmp_path / f"day_0_{part}.npy").write_bytes((folder / f"day_0_{part}.npy").read_bytes())
    np.save(tmp_path / "day_0_sparse_contig_freq.npy", ids)
    plain = category_coding("none", rows=ROWS)
    source = CriteoNpySource(tmp_path, [0], coding=plain, sparse_part="sparse_contig_freq")
    (batch,) = list(source.batches(1000))
    assert np.array_equal(batch.sparse_features.values().view(26, -1).numpy(), ids.T)
    ids[17, 4] = ROWS["cat_4"]
    np.save(tmp_path / "day_0_sparse_contig_freq.npy", ids)
    source = CriteoNpySource(tmp_path, [0], coding=plain, sparse_part="sparse_contig_freq")
    with pytest.raises(DataError, match=r"day_0_sparse_contig_freq.npy, row 17, column 4 .*7"):
        list(source.batches(5))


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    for part in PARTS:
        (tmp_path / f"day_0_{part}.npy").write_bytes((folder / f"day_0_{part}.npy").read_bytes())
    return tmp_path


def test_a_truncated_or_empty_or_foreign_file_is_an_error(own_folder: Path) -> None:
    sparse = own_folder / "day_0_sparse.npy"
    whole = sparse.read_bytes()
    for content in (whole[:-1], whole[:40], b"", b"1\t2\t3\n", b"\xe9\xff" * 100):
        sparse.write_bytes(content)
        with pytest.raises(DataError, match=r"day_0_sparse.npy is not a whole npy file"):
            CriteoNpySource(own_folder, [0], coding=MODULO)


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("dense", np.zeros((22, 13), np.float32), "differ in their rows.*22"),
        ("dense", np.zeros((23, 12), np.float32), r"day_0_dense.npy has shape \[23, 12\]; dense must be \[rows, 13\]"),
        ("dense", np.zeros((23, 13), np.int32), "holds int32; dense must be floats"),
        ("sparse", np.zeros((23, 26), np.float32), "holds float32; sparse must be integers"),
        ("sparse", np.zeros(23 * 26, np.int32), r"shape \[598\]"),
        ("labels", np.zeros((23, 2), np.int32), r"labels must be \[rows, 1\]"),
        ("labels", np.array(["a"] * 23), "labels must be numbers"),
    ],
)
def test_other_shapes_and_types_are_errors(own_folder: Path, part: str, array: np.ndarray, message: str) -> None:
    np.save(own_folder / f"day_0_{part}.npy", array)
    with pytest.raises(DataError, match=message):
        CriteoNpySource(own_folder, [0], coding=MODULO)


def test_numbers_that_are_not_finite_are_errors(own_folder: Path) -> None:
    dense = np.load(own_folder / "day_0_dense.npy")
    dense[9, 3] = np.nan
    np.save(own_folder / "day_0_dense.npy", dense)
    with pytest.raises(DataError, match=r"day_0_dense.npy, row 9 .*not a finite number"):
        list(CriteoNpySource(own_folder, [0], coding=MODULO).batches(4))


def test_a_day_without_rows_is_a_day_without_shards(own_folder: Path) -> None:
    for part, columns, kind in (("dense", 13, np.float32), ("sparse", 26, np.int32), ("labels", 1, np.int32)):
        np.save(own_folder / f"day_1_{part}.npy", np.zeros((0, columns), kind))
    source = CriteoNpySource(own_folder, [1, 0], coding=MODULO)
    assert source.shard_sizes().tolist() == [23]
    assert CriteoNpySource(own_folder, [1], coding=MODULO).num_samples == 0


def test_what_cannot_be_asked_for(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*day_2_dense.npy"):
        CriteoNpySource(folder, [0, 2], coding=MODULO)
    with pytest.raises(ConfigError, match="at least one day and none twice"):
        CriteoNpySource(folder, [0, 0], coding=MODULO)
    with pytest.raises(ConfigError, match="a half of one day"):
        CriteoNpySource(folder, [0, 1], coding=MODULO, stage="val")
    with pytest.raises(ConfigError, match="not 'train'"):
        CriteoNpySource(folder, [0], coding=MODULO, stage="dev")  # type: ignore[arg-type]
