"""Criteo as TorchRec preprocesses it: day_N_{dense,sparse,labels}.npy, memory-mapped and read in ranges of rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import Any, Literal

import numpy as np
from iopath.common.file_io import g_pathmgr
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.category_keys import CategoryError
from fae_torchrec.data.coding import CategoryCoding
from fae_torchrec.data.criteo_shape import NUM_DENSE, NUM_SPARSE, SPARSE_NAMES
from fae_torchrec.data.feature_batch import one_hot_batch
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.text_lines import absolute
from fae_torchrec.data.vocabulary import KeyChunk

SHARD_ROWS = 262_144
_CHUNK_ROWS = 65_536

_COLUMNS = {"dense": NUM_DENSE, "sparse": NUM_SPARSE, "labels": 1}
_KINDS = {"dense": "f", "sparse": "iu", "labels": "iufb"}
_KIND_NAMES = {"dense": "floats", "sparse": "integers", "labels": "numbers"}

_Span = tuple[int, int, int]
"""(index of the day's files, first row, row after the last)."""


class CriteoNpySource(ShardedSource):
    """A ShardedSource over the files of TorchRec's `BinaryCriteoUtils` (torchrec/datasets/criteo.py), in file order.

    `day_N_dense.npy` is float [n, 13] (the logarithm is taken already), `day_N_sparse.npy` integer [n, 26] (int64 from `tsv_to_npys`,
    int32 from `shuffle`, where hex values of 2**31 and more have become negative), `day_N_labels.npy` [n, 1]. The categories are keys like
    any others: coding "modulo" gives the ids of `InMemoryBinaryCriteoIterDataPipe(hashes=rows)`, coding "none" takes contiguous ids as they
    are (`sparse_to_contiguous`) and checks their range. TorchRec wrote missing values as 0; they cannot be told from a real 0.

    Nothing is loaded: every read maps the files and copies at most 65,536 rows (20 MB).

    Args:
        folder: where the files are; a local path, or a URI that iopath knows (fetched whole to this machine, then mapped).
        days: the N of the files, in the order in which they are read.
        coding: from the stored categories to rows, for the features cat_0 .. cat_25.
        stage: "train": all rows. "val" and "test": the first and the second half of one day, as TorchRec halves the last day.
        sparse_part: what stands for "sparse" in the name of the sparse files, e.g. "sparse_contig_freq" as `sparse_to_contiguous` writes.

    Attributes:
        feature_names: "cat_0" .. "cat_25", as in TorchRec's own Criteo datasets.
        num_dense: 13.
        name: the files with their sizes and times of writing.

    Raises:
        ConfigError: a file is missing, no day is named or one twice, or a half of several days is asked for.
        DataError: a file is damaged or cut short, has another shape or type, or the three files of a day differ in their rows.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        days: Sequence[int],
        *,
        coding: CategoryCoding,
        stage: Literal["train", "val", "test"] = "train",
        sparse_part: str = "sparse",
    ) -> None:
        if not days or len(set(days)) < len(days):
            raise ConfigError(f"days must name at least one day and none twice, received {list(days)}")
        if stage not in ("train", "val", "test"):
            raise ConfigError(f"stage {stage!r} is not 'train', 'val' or 'test'")
        if stage != "train" and len(days) > 1:
            raise ConfigError(f"stage {stage!r} is a half of one day, received days {list(days)}; name one (TorchRec: the last)")
        self.feature_names = SPARSE_NAMES
        self.num_dense = NUM_DENSE
        self._coding = coding
        parts = {"dense": "dense", "sparse": sparse_part, "labels": "labels"}
        self._files = [{part: os.path.join(os.fspath(folder), f"day_{day}_{stem}.npy") for part, stem in parts.items()} for day in days]
        rows = [self._checked_rows(files) for files in self._files]
        self.name = f"Criteo npy, {stage}: " + ", ".join(_described(path) for files in self._files for path in files.values())
        half = -(-rows[0] // 2)
        first = half if stage == "test" else 0
        last = [half, *rows[1:]] if stage == "val" else rows
        self._spans: list[_Span] = [
            (day, start, min(start + SHARD_ROWS, stop)) for day, stop in enumerate(last) for start in range(first, stop, SHARD_ROWS)
        ]

    @property
    def num_shards(self) -> int:
        """Ranges of 262,144 rows; the last of a day may be smaller."""
        return len(self._spans)

    def shard_sizes(self) -> np.ndarray:
        """int64 [num_shards], known from the headers."""
        return np.array([stop - start for _, start, stop in self._spans], dtype=np.int64)

    def size_hint(self) -> int:
        """Exactly the samples of one pass."""
        return int(self.shard_sizes().sum())

    def read_shard(self, shard: int) -> Iterator[Batch]:
        """The samples of one shard, in batches of 65,536.

        Raises:
            DataError: a dense value or label is not finite, or (coding "none") a category is no row of its table: with file and row.
        """
        day, arrays = self._mapped(shard)
        for start, stop in self._chunks(shard):
            dense = arrays["dense"][start:stop].astype(np.float32, order="C")
            labels = arrays["labels"][start:stop].reshape(-1).astype(np.float32)
            for part, numbers in (("dense", dense), ("labels", labels)):
                if not np.isfinite(numbers).all():
                    row = start + int(np.flatnonzero(~np.isfinite(numbers).reshape(stop - start, -1).all(axis=1))[0])
                    raise DataError(f"{self._files[day][part]}, row {row} (counted from 0): not a finite number; preprocess the day again")
            keys = _feature_major(arrays["sparse"][start:stop])
            yield one_hot_batch(self.feature_names, dense, self._encoded(keys, self._files[day]["sparse"], start), labels)

    def read_keys(self, shard: int) -> Iterator[KeyChunk]:
        """The stored categories of one shard, to fit a vocabulary on; none is missing."""
        _, arrays = self._mapped(shard)
        for start, stop in self._chunks(shard):
            keys = _feature_major(arrays["sparse"][start:stop])
            missing = np.zeros(stop - start, dtype=np.bool_)
            yield {name: (keys[column], missing) for column, name in enumerate(self.feature_names)}

    def _mapped(self, shard: int) -> tuple[int, dict[str, np.ndarray]]:
        day = self._spans[shard][0]
        return day, {part: _map(path) for part, path in self._files[day].items()}

    def _chunks(self, shard: int) -> Iterator[tuple[int, int]]:
        _, first, last = self._spans[shard]
        for start in range(first, last, _CHUNK_ROWS):
            yield start, min(start + _CHUNK_ROWS, last)

    def _encoded(self, keys: np.ndarray, path: str, first_row: int) -> np.ndarray:
        """Codes int64 [26, n] in place."""
        missing = np.zeros(keys.shape[1], dtype=np.bool_)
        for column, name in enumerate(self.feature_names):
            try:
                self._coding.encode(name, keys[column], missing, out=keys[column])
            except CategoryError as error:
                row = first_row + error.position
                raise DataError(f"{path}, row {row}, column {column} (both counted from 0): {error}") from error
        return keys

    @staticmethod
    def _checked_rows(files: dict[str, str]) -> int:
        """The rows of one day's files, after checking what their headers say."""
        rows = {}
        for part, path in files.items():
            array: Any = _map(path)
            columns, kinds = _COLUMNS[part], _KINDS[part]
            one_column = part == "labels" and array.ndim == 1  # as other tools write them
            if not one_column and (array.ndim != 2 or array.shape[1] != columns):
                raise DataError(f"{path} has shape {list(array.shape)}; {part} must be [rows, {columns}]: is it another file?")
            if array.dtype.kind not in kinds:
                raise DataError(f"{path} holds {array.dtype}; {part} must be {_KIND_NAMES[part]}: is it another file?")
            rows[path] = len(array)
        if len(set(rows.values())) > 1:
            raise DataError(f"the files of one day differ in their rows: {rows}; preprocess the day again")
        return rows[files["dense"]]


def _map(path: str) -> np.ndarray:
    local = g_pathmgr.get_local_path(path)
    if not os.path.isfile(local):
        raise ConfigError(
            f"there is no file {path}; correct folder, days or sparse_part, or preprocess the day (BinaryCriteoUtils.tsv_to_npys)"
        )
    try:
        mapped: np.ndarray = np.load(local, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is not a whole npy file ({error}); copy it or preprocess the day again") from error
    return mapped


def _described(path: str) -> str:
    status = os.stat(g_pathmgr.get_local_path(path))
    written = datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat(timespec="seconds")
    return f"{absolute(path)} ({status.st_size} bytes, written {written})"


def _feature_major(rows: np.ndarray) -> np.ndarray:
    """[n, 26] of any integer type as contiguous int64 [26, n], always a copy."""
    return np.array(rows.T, dtype=np.int64, order="C")
