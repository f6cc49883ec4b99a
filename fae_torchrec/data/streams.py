"""Streams: how a loader's source is opened as one rank's share, or as the shares of other numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import cast

import numpy as np
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.batches import BatchSource
from fae_torchrec.data.dealing import rank_runs
from fae_torchrec.data.shard_workers import rank_batches
from fae_torchrec.data.stream_windows import Numbers, OpenStream


class Streams:
    """A BatchSource, of which any share can be opened, or one rank's own batches.

    Args:
        source: as HotColdDataLoader takes it, but no store.
        batch_size: samples per batch that a BatchSource is asked for.
        num_workers: processes that read.

    Attributes:
        name: of the source, where it has one.

    Raises:
        ConfigError: `num_workers` is negative, or above 0 for a rank's own batches.
    """

    def __init__(self, source: BatchSource | Iterable[Batch] | Callable[[], Iterable[Batch]], batch_size: int, num_workers: int) -> None:
        self._dealt = callable(getattr(source, "batches", None))  # not `num_samples`: asking for it may cost a pass over the data
        if num_workers < 0 or (num_workers and not self._dealt):
            raise ConfigError(
                f"num_workers: received {num_workers}; processes can share the shards of a ShardedSource only; give 0 here (a torch "
                "DataLoader has workers of its own)"
            )
        self._source = source
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._spent: Iterator[Batch] | None = None  # a one-shot source that was iterated already
        self.name = str(getattr(source, "name", "")) if self._dealt else ""

    def opener(self, num_streams: int, world_size: int) -> OpenStream:
        """What opens the streams of a pass.

        Raises:
            ConfigError: the source is a rank's own batches and the streams are not one for each rank.
        """
        if self._dealt:
            return lambda stream: self._share(stream, num_streams)
        if num_streams != world_size:
            raise ConfigError(
                f"an epoch that {num_streams} rank(s) began is to be finished on {world_size}, but the source is each rank's own batches, "
                "which cannot be dealt anew; resume on as many ranks, or give the loader a BatchSource or a store"
            )
        return lambda stream: (self._own(), lambda first, count: np.arange(first, first + count) * num_streams + stream)

    def _share(self, stream: int, num_streams: int) -> tuple[Iterable[Batch], Numbers]:
        source = cast(BatchSource, self._source)
        starts, _ = rank_runs(source.num_samples, self._batch_size, stream, num_streams)

        def numbers(first: int, count: int) -> np.ndarray:
            run, place = divmod(first, self._batch_size)
            if place + count <= self._batch_size:  # as batches come; several times faster than what follows
                return np.arange(starts[run] + place, starts[run] + place + count)
            runs, places = np.divmod(np.arange(first, first + count), self._batch_size)
            of_runs: np.ndarray = starts[runs] + places
            return of_runs

        batches = rank_batches(source, self._batch_size, rank=stream, world_size=num_streams, num_workers=self._num_workers)
        return batches, numbers

    def _own(self) -> Iterator[Batch]:
        given = cast("Iterable[Batch] | Callable[[], Iterable[Batch]]", self._source)
        batches = iter(given() if callable(given) else given)
        if batches is self._spent:
            raise DataError(
                "source is an iterator that was read already, so a second pass would be empty; give a list, an object with __iter__ or a "
                "function that starts a new pass"
            )
        self._spent = batches if batches is given else None
        return batches
