"""Consecutive samples of another source, such as all but the last tenth for training and the last tenth for testing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.segregate import select_samples
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.vocabulary import KeyChunk, KeySource


class SampleRange(ShardedSource):
    """A ShardedSource of the samples start..stop-1 of another one; its shards are the other's, the first and the last of them cut.

    Args:
        source: the other source; its shards' sizes are asked for, which may cost a pass over text.
        start: number of the first sample, from 0.
        stop: number of the first sample behind it, at most the source's number of samples.

    Attributes:
        feature_names: as the source's.
        num_dense: as the source's.
        name: the source's, and the range.
        max_bad_lines: as the source's.

    Raises:
        ConfigError: the range is empty or not within the source.
        DataError: the source's data are malformed.
    """

    def __init__(self, source: ShardedSource, start: int, stop: int) -> None:
        if not 0 <= start < stop <= source.num_samples:
            raise ConfigError(f"samples {start}..{stop - 1} are not within 0..{source.num_samples - 1} of {source.name}; give others")
        self.feature_names = source.feature_names
        self.num_dense = source.num_dense
        self.name = f"{source.name}, samples {start}..{stop - 1}"
        self.max_bad_lines = source.max_bad_lines
        self._source = source
        ends = np.cumsum(source.shard_sizes())
        begins = ends - source.shard_sizes()
        self._shards = np.flatnonzero((ends > start) & (begins < stop))
        # Of each shard: its first sample in the range, and the first behind it, numbered within the shard.
        self._cuts = np.stack([np.maximum(start - begins, 0), np.minimum(stop, ends) - begins], axis=1)[self._shards]

    @property
    def num_shards(self) -> int:
        """Shards of the source that have samples in the range."""
        return len(self._shards)

    def shard_sizes(self) -> np.ndarray:
        """Samples in each shard, int64 [num_shards]."""
        sizes: np.ndarray = self._cuts[:, 1] - self._cuts[:, 0]
        return sizes

    def read_shard(self, shard: int) -> Iterator[Batch]:
        """The samples of one shard that are in the range, in order.

        Raises:
            DataError: as the source's.
        """
        first, stop = self._cuts[shard].tolist()
        position = 0
        for batch in self._source.read_shard(int(self._shards[shard])):
            size = batch.labels.numel()
            begin, end = max(first - position, 0), min(stop - position, size)
            if (begin, end) == (0, size):
                yield batch
            elif begin < end:
                yield select_samples(batch, torch.arange(begin, end))
            position += size
            if position >= stop:
                return

    def read_keys(self, shard: int) -> Iterator[KeyChunk]:
        """The categories of one shard before they are coded; of a shard that the range cuts, all of them.

        Raises:
            DataError: as the source's.
        """
        yield from self._source_of_keys().read_keys(int(self._shards[shard]))

    def skipped(self) -> dict[str, int]:
        """As the source's."""
        return self._source.skipped()

    def size_hint(self) -> int:
        """Samples in the range, exactly."""
        return int(self.shard_sizes().sum())

    def _source_of_keys(self) -> KeySource:
        if not hasattr(self._source, "read_keys"):
            raise DataError(f"{self._source.name}: its categories are coded already, there are no keys to read")
        source: KeySource = self._source
        return source


def held_out(source: ShardedSource, share: float) -> tuple[SampleRange, SampleRange]:
    """A source in two: all but the last samples for training, and the last, a share of all, for testing.

    Args:
        source: samples in an order that makes the last ones a fair test, such as by time.
        share: of the samples for testing, between 0 and 1; at least one sample is on each side.

    Raises:
        ConfigError: the share is not between 0 and 1, or there are fewer than 2 samples.
        DataError: the source's data are malformed.
    """
    samples = source.num_samples
    if not 0 < share < 1 or samples < 2:
        raise ConfigError(f"cannot hold out {share} of {samples} samples of {source.name}; give a share between 0 and 1, of at least 2")
    first_test = min(max(samples - round(samples * share), 1), samples - 1)
    return SampleRange(source, 0, first_test), SampleRange(source, first_test, samples)
