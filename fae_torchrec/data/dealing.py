"""How the samples of a source are dealt to ranks, and cutting a stream of batches into the batches of one rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.data.segregate import concat_batches, plain_batch, select_samples


def rank_runs(num_samples: int, batch_size: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples of one rank's batches, as BatchSource says.

    Example for 11 samples, batch size 2 and 2 ranks (5 samples each, sample 10 is dropped):
        rank 0: 0 1 | 4 5 | 8        rank 1: 2 3 | 6 7 | 9

    Args:
        num_samples: in the source.
        batch_size: samples per batch and rank; the last batch may be smaller.
        rank: which share, 0..world_size-1.
        world_size: number of shares.

    Returns:
        (starts, stops), int64 [batches] each: batch i has the samples starts[i]..stops[i]-1. Runs ascend and do not overlap.

    Raises:
        ConfigError: batch_size, rank or world_size is out of range.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, received {batch_size}")
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in 0..world_size-1 and world_size at least 1, received rank={rank}, world_size={world_size}")
    share = num_samples // world_size
    full, rest = divmod(share, batch_size)
    sizes = np.full(full + bool(rest), batch_size, dtype=np.int64)
    if rest:
        sizes[-1] = rest
    step_starts = np.arange(len(sizes), dtype=np.int64) * batch_size * world_size
    starts = step_starts + rank * sizes
    return starts, starts + sizes


def touched(begins: np.ndarray, ends: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Which pieces [begins, ends) of a source hold a sample of some run [starts, stops); runs ascend and do not overlap.

    Returns:
        bool, one for each piece.
    """
    if not len(starts):
        return np.zeros(len(begins), dtype=np.bool_)
    nearest = np.minimum(np.searchsorted(stops, begins, side="right"), len(starts) - 1)  # first run that ends after the piece begins
    needed: np.ndarray = (starts[nearest] < ends) & (stops[nearest] > begins) & (begins < ends)
    return needed


def cut_runs(pieces: Iterable[tuple[int, Batch]], starts: np.ndarray, stops: np.ndarray) -> Iterator[Batch]:
    """Yields one plain batch for each run of samples [starts[i], stops[i]).

    Args:
        pieces: (number of its first sample, samples), ascending; they hold every sample of every run, and may leave out others.
        starts: int64, ascending.
        stops: int64; runs do not overlap.
    """
    run = 0
    parts: list[Batch] = []
    for first, batch in pieces:
        last = first + batch.labels.numel()
        while run < len(starts) and starts[run] < last:
            begin, end = max(int(starts[run]), first), min(int(stops[run]), last)
            parts.append(plain_batch(batch) if (begin, end) == (first, last) else select_samples(batch, torch.arange(begin, end) - first))
            if stops[run] > last:
                break  # the run goes on in the next piece
            yield concat_batches(parts)
            parts = []
            run += 1
        if run == len(starts):
            return
