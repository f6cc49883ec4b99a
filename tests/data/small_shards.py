"""Small samples with bags of several ids, and a source of them in memory that falls into shards."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.sharded_source import ShardedSource

# "x" feeds both tables, "a" has two features, "z" feeds none.
TABLES = TableSet((TableSpec("a", 12, 4, ("x", "y")), TableSpec("b", 20, 4, ("x",))))
FEATURES = ("z", "y", "x")
Sample = dict[str, list[int]]


def make_samples(n: int, seed: int = 0, *, one_hot: bool = False) -> list[Sample]:
    """Samples with bags of 0 to 3 ids, or of one."""
    rng = np.random.default_rng(seed)
    return [{f: rng.integers(0, 12, size=1 if one_hot else rng.integers(0, 4)).tolist() for f in FEATURES} for _ in range(n)]


def make_batch(samples: list[Sample], features: tuple[str, ...] = FEATURES) -> Batch:
    """One batch of samples."""
    return Batch(
        dense_features=torch.zeros(len(samples), 1),
        sparse_features=KeyedJaggedTensor(
            keys=list(features),
            values=torch.tensor([i for f in features for s in samples for i in s[f]], dtype=torch.int64),
            lengths=torch.tensor([len(s[f]) for f in features for s in samples], dtype=torch.int32),
            stride=len(samples),
        ),
        labels=torch.zeros(len(samples)),
    )


def cut_samples(samples: list[Sample], *sizes: int) -> Iterator[Batch]:
    """Batches of these sizes over and over."""
    at, n = 0, 0
    while at < len(samples):
        yield make_batch(samples[at : at + sizes[n % len(sizes)]])
        at, n = at + sizes[n % len(sizes)], n + 1


class ShardsInMemory(ShardedSource):
    """Shards of samples; shard k has k malformed lines. A shard without samples kills its reader."""

    def __init__(self, shards: list[list[Sample]]) -> None:
        self.feature_names, self.num_dense, self.name = FEATURES, 1, "in memory"
        self.max_bad_lines: int | None = None
        self._shards = shards
        self._read: set[int] = set()

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def read_shard(self, shard: int) -> Iterator[Batch]:
        """The samples of one shard in batches of 17."""
        if not self._shards[shard]:
            os.kill(os.getpid(), signal.SIGKILL)
        self._read.add(shard)
        yield from cut_samples(self._shards[shard], 17)

    def size_hint(self) -> int:
        """Samples in all."""
        return sum(map(len, self._shards))

    def skipped(self) -> dict[str, int]:
        """What was skipped in the shards that were read."""
        return self.skipped_in(self._read)

    @staticmethod
    def skipped_in(shards: Iterable[int]) -> dict[str, int]:
        """As many malformed lines for each shard as its number; three files have the shards in turn."""
        skipped: Counter[str] = Counter()
        for shard in shards:
            skipped[f"file {shard % 3}"] += shard
        return {path: lines for path, lines in skipped.items() if lines}
