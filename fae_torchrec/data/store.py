"""SegregatedStore: samples kept as a hot and a cold sequence in memory-mapped files, read in ranges."""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from iopath.common.file_io import g_pathmgr
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from fae_torchrec.core.errors import ConfigError, DataError, FingerprintError
from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.data.store_columns import StoreColumns, column_names
from fae_torchrec.data.store_layout import MANIFEST, ROWS_PER_BATCH, StoreFile, StoreLayout

_Kind = Literal["hot", "cold"]
_MAGIC = b"ARROW1"  # an Arrow IPC file begins and ends with it
_VERIFY_BYTES = 1 << 24


@dataclass(frozen=True, eq=False)
class SegregatedStore:
    """What `write_store` wrote: all hot samples and all cold samples of a source, each sequence in the order of the data.

    Files are mapped when they are first read; the mappings last as long as this object. It may be used by several threads at once, pickled
    and forked. Made by `open`.

    Attributes:
        path: the folder.
        layout: what its `store.json` says.
    """

    path: str
    layout: StoreLayout
    _mapped: dict[int, list[StoreColumns]] = field(init=False, repr=False, default_factory=dict)
    _shared: dict[str, KeyedJaggedTensor] = field(init=False, repr=False, default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SegregatedStore:
        """Opens a store and looks at the ends and sizes of all its files (of a remote one, when each is first read).

        Args:
            path: a local folder, or a URI that iopath's `g_pathmgr` knows (files are fetched whole when they are first read).

        Raises:
            ConfigError: there is no such folder.
            DataError: the store is not whole, was altered or is of another version; names the file.
        """
        path = os.fspath(path)
        manifest = os.path.join(path, MANIFEST)
        try:
            with open(g_pathmgr.get_local_path(manifest), encoding="utf-8") as file:
                layout = StoreLayout.from_json(file.read())
        except DataError as error:
            raise DataError(f"{manifest}: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            if not g_pathmgr.isdir(path):
                raise ConfigError(f"there is no segregated store {path}; make one with `fae segregate`, or correct the path") from error
            raise DataError(
                f"{path} has no readable {MANIFEST} ({error}), so it is no store, or not whole; segregate the data again"
            ) from error
        store = cls(path, layout)
        if "://" not in path:
            for described in layout.files:
                store._local(described)
        return store

    def __reduce__(self) -> tuple[type[SegregatedStore], tuple[str, StoreLayout]]:
        return SegregatedStore, (self.path, self.layout)  # a copy maps the files itself

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Keys of the KeyedJaggedTensor, in order."""
        return self.layout.feature_names

    @property
    def num_dense(self) -> int:
        """Columns of `dense_features`."""
        return self.layout.num_dense

    @property
    def hot_samples(self) -> int:
        """Samples whose ids are all hot."""
        return self.layout.samples["hot"]

    @property
    def cold_samples(self) -> int:
        """The others."""
        return self.layout.samples["cold"]

    @property
    def num_samples(self) -> int:
        """Samples of both kinds."""
        return self.hot_samples + self.cold_samples

    @property
    def placement_fingerprint(self) -> str:
        """Of the placement that decided what is hot."""
        return self.layout.placement_fingerprint

    @property
    def data_name(self) -> str:
        """The name of the source that was segregated, with everything that decides its samples."""
        return self.layout.data_name

    @property
    def fingerprint(self) -> str:
        """Names the store by what it was made from and the checksums of its files."""
        return self.layout.fingerprint

    def check(self, placement: RowPlacement, data_name: str | None = None) -> None:
        """Checks that the store was written for a placement, and of some data.

        Args:
            placement: what the hot samples must be hot under.
            data_name: the name of the source it should hold; None does not look.

        Raises:
            FingerprintError: it was written for another placement or of other data; names both.
        """
        if placement.fingerprint != self.placement_fingerprint:
            raise FingerprintError(
                f"the store {self.path} was written for the placement {self.placement_fingerprint}, given is the placement "
                f"{placement.fingerprint}; segregate the data again for this placement, or use the one that it was written for"
            )
        if data_name is not None and data_name != self.data_name:
            raise FingerprintError(
                f"the store {self.path} holds the data {fingerprint(self.data_name)} ({self.data_name}), given are the data "
                f"{fingerprint(data_name)} ({data_name}); segregate these data, or correct the path of the store"
            )

    def read(self, kind: _Kind, start: int, stop: int) -> tuple[Batch, np.ndarray]:
        """Reads consecutive samples of one kind.

        Args:
            kind: "hot" or "cold".
            start: the first, counted among the samples of that kind.
            stop: the one after the last.

        Returns:
            The n = stop - start samples as a plain batch, copied: dense [n, num_dense] float32, a KeyedJaggedTensor of int64 ids, int32
            lengths and, if the source had them, float32 weights, labels [n] float32. Where all bags have one id, lengths and offsets are
            shared by all batches, as in TorchRec's own datasets: do not change them. And the numbers of the samples in the data, int64 [n].

        Raises:
            ConfigError: the range is not one of this kind's.
            DataError: a file has changed since the store was opened, or is damaged.
        """
        cuts = list(self._cuts(kind, start, stop))
        size = stop - start
        ids = [columns.cut(columns.ids, a, b) for columns, a, b in cuts]
        values = torch.from_numpy(_by_feature(ids, np.int64))
        if self.layout.weighted or not all(columns.one_hot for columns, _, _ in cuts):
            sparse = self._jagged(values, cuts, size)
        else:
            sparse = self._one_each(values, size)
        batch = Batch(
            dense_features=torch.from_numpy(
                _joined([columns.dense[a:b] for columns, a, b in cuts], np.float32).reshape(size, self.num_dense)
            ),
            sparse_features=sparse,
            labels=torch.from_numpy(_joined([columns.labels[a:b] for columns, a, b in cuts], np.float32)),
        )
        return batch, _joined([columns.samples[a:b] + columns.first for columns, a, b in cuts], np.int64)

    def verify(self, *, show_progress: bool = False) -> None:
        """Reads all files and compares their checksums.

        Args:
            show_progress: whether to show a bar on stderr.

        Raises:
            DataError: a file is not what was written; names it.
        """
        for file in tqdm(self.layout.files, desc="verify", unit="file", disable=None if show_progress else True):
            crc = 0
            with open(self._local(file), "rb") as opened:
                while piece := opened.read(_VERIFY_BYTES):
                    crc = zlib.crc32(piece, crc)
            if crc != file.crc32:
                raise DataError(
                    f"{os.path.join(self.path, file.name)} has the checksum {crc:08x}, {file.crc32:08x} was written: it was altered or the "
                    "disk is failing; segregate the data again"
                )

    def _cuts(self, kind: _Kind, start: int, stop: int) -> Iterator[tuple[StoreColumns, int, int]]:
        """Yields (record batch, first row, row after the last) for the samples of a kind."""
        if kind not in ("hot", "cold") or not 0 <= start <= stop <= self.layout.samples[kind]:
            raise ConfigError(
                f"cannot read the {kind} samples {start}..{stop - 1} of the store {self.path}, which has {self.hot_samples} hot and "
                f"{self.cold_samples} cold ones, counted from 0"
            )
        files, ends = self._sequences[kind]
        at = bisect_right(ends, start)
        while start < stop:
            begin = ends[at] - self.layout.files[files[at]].samples
            loaded = self._mapped.get(files[at]) or self._map(files[at])
            while start < min(stop, ends[at]):
                number, row = divmod(start - begin, ROWS_PER_BATCH)
                rows = min(len(loaded[number].labels) - row, stop - start)
                yield loaded[number], row, row + rows
                start += rows
            at += 1

    @cached_property
    def _sequences(self) -> dict[str, tuple[list[int], list[int]]]:
        """Kind -> (its files, the samples up to the end of each)."""
        files = {kind: [i for i, file in enumerate(self.layout.files) if file.kind == kind] for kind in ("hot", "cold")}
        return {kind: (chosen, list(accumulate(self.layout.files[i].samples for i in chosen))) for kind, chosen in files.items()}

    def _jagged(self, values: torch.Tensor, cuts: list[tuple[StoreColumns, int, int]], size: int) -> KeyedJaggedTensor:
        weights = _by_feature([columns.cut(columns.weights, a, b) for columns, a, b in cuts], np.float32)
        return KeyedJaggedTensor(
            keys=list(self.feature_names),
            values=values,
            weights=torch.from_numpy(weights) if self.layout.weighted else None,
            lengths=torch.from_numpy(_by_feature([columns.lengths(a, b) for columns, a, b in cuts], np.int32)),
            stride=size,
        )

    def _one_each(self, values: torch.Tensor, size: int) -> KeyedJaggedTensor:
        """Ids of bags that have one each; all else is the same for all batches of a size, and made once (as in TorchRec's datasets)."""
        like = self._shared.get("one each")
        if like is None or like.stride() != size:
            features = len(self.feature_names)
            like = KeyedJaggedTensor(
                keys=list(self.feature_names),
                values=torch.zeros(0, dtype=torch.int64),
                # numpy's fills, not torch's: its threads would spin beside the model's.
                lengths=torch.from_numpy(np.ones(features * size, dtype=np.int32)),
                offsets=torch.from_numpy(np.arange(features * size + 1, dtype=np.int32)),
                stride=size,
                length_per_key=[size] * features,
                offset_per_key=[size * f for f in range(features + 1)],
                index_per_key={name: f for f, name in enumerate(self.feature_names)},
            )
            self._shared["one each"] = like
        kjt = KeyedJaggedTensor.__new__(KeyedJaggedTensor)  # its constructor takes an eighth of the time of reading 2,048 samples
        kjt.__dict__.update(like.__dict__, _values=values)
        return kjt

    def _map(self, number: int) -> list[StoreColumns]:
        """Maps a file. Threads that come at once do it twice, which is harmless, where a lock might be held across a fork."""
        file = self.layout.files[number]
        local = self._local(file)
        try:
            with open(local, "rb") as opened:  # columns are far apart: without this the kernel would read ahead in small pieces
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            with pa.memory_map(local) as mapped:  # the mapping outlives the file: no descriptor stays open
                reader = pa.ipc.open_file(mapped.read_buffer())
                records = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            rows = [batch.num_rows for batch in records]
            names = column_names(self.feature_names, self.num_dense, weighted=self.layout.weighted)
            if reader.schema.names != names or sum(rows) != file.samples or rows[:-1] != [ROWS_PER_BATCH] * (len(rows) - 1):
                raise DataError(
                    f"it has {sum(rows)} samples in the columns {reader.schema.names}, where {file.samples} in {names} were written"
                )
            for batch in records:
                batch.validate()  # the sizes of its buffers, not their content
            columns = [StoreColumns.of(batch, len(self.feature_names), self.num_dense, file.first_sample) for batch in records]
        except (pa.ArrowException, OSError, DataError) as error:
            raise DataError(f"{os.path.join(self.path, file.name)} is damaged ({error}); segregate the data again") from error
        self._mapped[number] = columns
        return columns

    def _local(self, file: StoreFile) -> str:
        """Where a file is on this machine, after a look at its size and ends."""
        path = os.path.join(self.path, file.name)
        try:
            local: str = g_pathmgr.get_local_path(path)
            with open(local, "rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                ends = opened.read(len(_MAGIC)), os.pread(opened.fileno(), len(_MAGIC), max(size - len(_MAGIC), 0))
        except OSError as error:
            raise DataError(f"{path} of the store cannot be read ({error}); copy the store again, or segregate the data again") from error
        if size != file.num_bytes or ends != (_MAGIC, _MAGIC):
            raise DataError(
                f"{path} has {size} bytes that begin with {ends[0]!r} and end with {ends[1]!r}, where {file.num_bytes} bytes between "
                f"{_MAGIC!r} and {_MAGIC!r} were written: cut short, or another file; copy the store again, or segregate the data again"
            )
        return local


def _joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    """One contiguous copy of arrays one after the other, widened to `dtype`."""
    return np.concatenate(arrays, dtype=dtype) if arrays else np.zeros(0, dtype=dtype)


def _by_feature(cuts: list[list[np.ndarray]], dtype: Any) -> np.ndarray:
    """Joins the arrays of several cuts feature by feature, as a KeyedJaggedTensor has them."""
    return _joined(cuts[0] if len(cuts) == 1 else list(chain.from_iterable(zip(*cuts, strict=True))), dtype)
