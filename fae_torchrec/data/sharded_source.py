"""Sources whose samples fall into shards that any worker can read by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from torchrec.datasets.utils import Batch
from tqdm import tqdm

from fae_torchrec.core.errors import DataError
from fae_torchrec.data.dealing import cut_runs, rank_runs, touched


class ShardedSource(ABC):
    """A BatchSource whose samples fall into shards: runs of samples, each readable without the others.

    The samples are the shards' samples one after the other. What a shard holds does not depend on who reads it, so workers may share the
    shards as they like. A source can be pickled, before and after reading.

    A subclass sets the attributes and offers `num_shards`, `read_shard` and `size_hint`; it overrides `shard_sizes` where the sizes
    are known without reading.

    Attributes:
        feature_names: keys of the KeyedJaggedTensor, in order.
        num_dense: columns of `dense_features`.
        name: what it is, with everything that decides its samples (files, their sizes and times of writing), for provenance.
        max_bad_lines: malformed lines that may be skipped by all copies of the source together; None: it sees to that by itself.
    """

    feature_names: tuple[str, ...]
    num_dense: int
    name: str
    max_bad_lines: int | None = None

    @property
    @abstractmethod
    def num_shards(self) -> int:
        """Number of shards; the same for everyone who opens these data."""

    @abstractmethod
    def read_shard(self, shard: int) -> Iterator[Batch]:
        """The samples of one shard, 0..num_shards-1, in order, in batches of a size that suits the format (at most 65,536)."""

    @abstractmethod
    def size_hint(self) -> int:
        """Samples in all, roughly and without a pass over the data: for progress bars."""

    def skipped(self) -> dict[str, int]:
        """Malformed lines that this object skipped so far, by file; a line that was read twice counts once."""
        return {}

    def shard_sizes(self) -> np.ndarray:
        """Samples in each shard, int64 [num_shards]. The first call may cost a pass over the data."""
        return self._counted

    @cached_property
    def num_samples(self) -> int:
        """Samples in one pass over all ranks; costs what `shard_sizes` costs."""
        return int(self.shard_sizes().sum())

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One pass over this rank's share, as BatchSource says. Only shards that hold samples of the rank are read.

        Args:
            batch_size: samples per batch and rank; the last batch may be smaller.
            rank: which share, 0..world_size-1.
            world_size: number of shares.

        Yields:
            Batches of dense [B, num_dense] float32, a KeyedJaggedTensor of int64 ids with F keys and stride B, labels [B] float32.

        Raises:
            ConfigError: batch_size, rank or world_size is out of range.
            DataError: the data are malformed; says where.
        """
        starts, stops = rank_runs(self.num_samples, batch_size, rank, world_size)
        return cut_runs(self.pieces(starts, stops), starts, stops)

    def pieces(self, starts: np.ndarray, stops: np.ndarray) -> Iterator[tuple[int, Batch]]:
        """Yields (number of its first sample, batch) for the shards that some run touches, in order."""
        ends = np.cumsum(self.shard_sizes())
        begins = ends - self.shard_sizes()
        for shard in np.flatnonzero(touched(begins, ends, starts, stops)).tolist():
            first = int(begins[shard])
            for batch in self.read_shard(shard):
                yield first, batch
                first += batch.labels.numel()
            if first != ends[shard]:
                raise DataError(
                    f"{self.name}: shard {shard} has {first - begins[shard]} samples, where {ends[shard] - begins[shard]} were counted; "
                    "its files changed in between: open the source again"
                )

    @cached_property
    def _counted(self) -> np.ndarray:
        shards = tqdm(range(self.num_shards), desc="count samples", unit="shard", delay=2, disable=None, leave=False)
        return np.array([self._count(shard) for shard in shards], dtype=np.int64)

    def _count(self, shard: int) -> int:
        """Samples in one shard; a subclass overrides it where counting is cheaper than reading."""
        return sum(batch.labels.numel() for batch in self.read_shard(shard))
