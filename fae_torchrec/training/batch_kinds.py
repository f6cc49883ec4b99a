"""The kind of each batch of a HotColdDataLoader: what a trainer counts by and an audit sums by."""

from __future__ import annotations

from collections.abc import Iterator

from torchrec.datasets.utils import Batch

from fae_torchrec.data.batches import is_hot_batch
from fae_torchrec.data.dataloader import HotColdDataLoader


def with_kinds(loader: HotColdDataLoader) -> Iterator[tuple[str, Batch]]:
    """One pass over a loader.

    The kind is the loader's own count, not a look at the ids: leftovers may happen to be all cold on one rank and not on another, yet
    every rank must call the same step the same.

    Yields:
        ("hot", "cold" or "mixed", batch); mixed are leftovers and, without segregation, all batches.
    """
    batches, mixed = iter(loader), 0
    for batch in batches:
        kind = "hot" if is_hot_batch(batch) else "mixed" if loader.stats.mixed_batches > mixed else "cold"
        mixed = loader.stats.mixed_batches
        yield kind, batch
