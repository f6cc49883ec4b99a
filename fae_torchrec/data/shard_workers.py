"""Worker processes that read and parse the shards of a source for one rank, in the order of the data."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, FAEError
from fae_torchrec.data.batches import BatchSource
from fae_torchrec.data.dealing import cut_runs, rank_runs, touched
from fae_torchrec.data.segregate import concat_batches
from fae_torchrec.data.sharded_source import ShardedSource

# What a worker sends at once, and how many of these may wait: most shards are not larger, so the next ones are read meanwhile.
_CHUNK_SAMPLES = 32_768
_CHUNKS_AHEAD = 4


def rank_batches(source: BatchSource, batch_size: int, *, rank: int = 0, world_size: int = 1, num_workers: int = 0) -> Iterator[Batch]:
    """One pass over a rank's share of a source, read and parsed by worker processes.

    Worker w reads the shards w, w + num_workers, ... of those that the rank needs, and sends the rank's samples of them through shared
    memory, at most 131,072 samples ahead. Starting the first workers takes some seconds, for they import torch; a script needs
    `if __name__ == "__main__":`, as always with worker processes. They end with the iterator.

    Args:
        source: the data; pickled for workers.
        batch_size: samples per batch.
        rank: which share, 0..world_size-1.
        world_size: number of shares.
        num_workers: processes; 0 reads in this one.

    Returns:
        The batches that `source.batches` gives, in the same order.

    Raises:
        ConfigError: a number is out of range, or workers are asked of a source that does not fall into shards.
        DataError: as the source's; malformed data are told at the place where the batches before them end.
        FAEError: a worker was killed.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers must be at least 0, received {num_workers}")
    if not num_workers:
        return source.batches(batch_size, rank=rank, world_size=world_size)
    if not isinstance(source, ShardedSource):
        raise ConfigError(
            f"num_workers: received {num_workers} for a {type(source).__name__}; workers share the shards of a ShardedSource; give 0 here"
        )
    return _batches(source, batch_size, rank, world_size, num_workers, rank_runs(source.num_samples, batch_size, rank, world_size))


def _batches(
    source: ShardedSource, batch_size: int, rank: int, world_size: int, num_workers: int, runs: tuple[np.ndarray, np.ndarray]
) -> Iterator[Batch]:
    shards = _needed(source, *runs)
    workers = min(num_workers, len(shards))
    # Of the rank's samples alone, numbered from 0, batch i has batch_size from i * batch_size on.
    share = int((runs[1] - runs[0]).sum())
    starts = np.arange(0, share, batch_size, dtype=np.int64)
    pieces = _in_order([_Shards(source, runs, shards[worker::workers]) for worker in range(workers)], len(shards), source.name)
    yield from cut_runs(pieces, starts, np.minimum(starts + batch_size, share))


def _needed(source: ShardedSource, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    ends = np.cumsum(source.shard_sizes())
    return np.flatnonzero(touched(ends - source.shard_sizes(), ends, starts, stops))


def _in_order(parts: list[_Shards], num_shards: int, name: str) -> Iterator[tuple[int, Batch]]:
    """Yields (number of its first sample among the rank's, samples), a shard of each part in turn."""
    context = multiprocessing.get_context("forkserver")  # imports torch once for all workers; a fork of this process may deadlock
    context.set_forkserver_preload([__name__])
    start = partial(_start_worker, logging.getLogger("torch.fx").getEffectiveLevel())
    streams = [  # one loader for each worker: so all can be ahead, though the shards are used up one after the other
        iter(
            DataLoader(
                part,
                batch_size=None,
                num_workers=1,
                collate_fn=_as_it_is,
                multiprocessing_context=context,
                prefetch_factor=_CHUNKS_AHEAD,
                worker_init_fn=start,
            )
        )
        for part in parts
    ]
    first = 0
    for shard in range(num_shards):
        while (chunk := _next(streams[shard % len(streams)], name)) is not None:
            yield first, chunk
            first += chunk.labels.numel()


def _next(stream: Iterator[Batch | Exception | None], name: str) -> Batch | None:
    try:
        chunk = next(stream)
    except (RuntimeError, EOFError, OSError) as error:  # torch's words for a worker that is gone, also while a tensor is fetched from it
        raise FAEError(
            f"a worker that read {name} ended without a result ({error}): killed, perhaps for lack of memory (also of /dev/shm), or it "
            'could not start; take fewer workers (0 needs no other process), and see that your script has `if __name__ == "__main__":`'
        ) from error
    if isinstance(chunk, Exception):
        raise chunk
    return chunk


class _Shards(IterableDataset[Batch | Exception | None]):
    """The rank's samples of some shards: for each shard its chunks and then None; an error comes as a value, to keep its own text."""

    def __init__(self, source: ShardedSource, runs: tuple[np.ndarray, np.ndarray], shards: np.ndarray) -> None:
        self._source, self._runs, self._shards = source, runs, shards

    def __iter__(self) -> Iterator[Batch | Exception | None]:
        ends = np.cumsum(self._source.shard_sizes())
        begins = ends - self._source.shard_sizes()
        try:
            for shard in self._shards.tolist():
                yield from self._chunks(int(begins[shard]), int(ends[shard]))
                yield None
        except Exception as error:
            yield error

    def _chunks(self, begin: int, end: int) -> Iterator[Batch]:
        starts, stops = (np.clip(runs, begin, end) for runs in self._runs)
        here = starts < stops
        parts: list[Batch] = []
        samples = 0
        for part in cut_runs(self._source.pieces(starts[here], stops[here]), starts[here], stops[here]):
            parts.append(part)
            samples += part.labels.numel()
            if samples >= _CHUNK_SAMPLES:
                yield concat_batches(parts)
                parts, samples = [], 0
        if parts:
            yield concat_batches(parts)


def _as_it_is(value: Batch | Exception | None) -> Batch | Exception | None:
    return value


def _start_worker(log_level: int, worker: int) -> None:
    """torch.fx, which warns when the first KeyedJaggedTensor is made, says what it may say in the process that reads."""
    torch.set_num_threads(1)
    logging.getLogger("torch.fx").setLevel(log_level)
