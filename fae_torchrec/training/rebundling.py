"""Makes hot and cold batches of a user's own iterator of plain batches, so that a stock training loop gets them too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.data.batches import HotColdBatch
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.stream_windows import Agree
from fae_torchrec.distributed.process_group import gather_counts
from fae_torchrec.distributed.split_ahead import SplitAhead


class Rebundling:
    """One HotColdDataLoader for each new iterator, all with the same schedule.

    Args:
        placement: as HotColdDataLoader.
        batch_size: as HotColdDataLoader.
        schedule: as HotColdDataLoader.
        agree: as HotColdDataLoader; None makes a gloo group of all ranks for it, if there are several: then a collective.
        device: batches for CUDA are pinned unless the options say otherwise.
        options: further arguments of HotColdDataLoader. `rank` and `world_size` are those of the default process group.
        model: sharded; batches for CUDA are split ahead for it, unless the options say otherwise.
    """

    def __init__(
        self,
        placement: RowPlacement,
        batch_size: int,
        schedule: ShuffleSchedule | None,
        agree: Agree | None,
        device: torch.device,
        options: Mapping[str, Any],
        model: nn.Module,
    ) -> None:
        ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if dist.is_initialized() else {}
        self._arguments = {
            "batch_size": batch_size,
            "schedule": schedule or ShuffleSchedule(),
            "pin_memory": device.type == "cuda",
            "split_ahead": SplitAhead(model) if device.type == "cuda" and "split_ahead" not in options else None,
            **ranks,
            **options,
        }
        self._placement = placement
        if agree is None and self._arguments.get("world_size", 1) > 1:
            agree = gather_counts(dist.new_group(backend="gloo"))
        if agree is not None:
            self._arguments["agree"] = agree
        HotColdDataLoader([], placement, **self._arguments)  # a wrong option is an error now, not at the first batch
        self._loader: HotColdDataLoader | None = None
        self._source: Iterator[Batch] | None = None
        self._batches: Iterator[HotColdBatch] = iter(())

    def __call__(self, source: Iterator[Batch]) -> Iterator[HotColdBatch]:
        """The batches made of an iterator's: the same iterator for the same one. A new one ends the pass over the one before."""
        if source is not self._source:
            self.close()
            self._source = source
            self._loader = HotColdDataLoader(source, self._placement, **self._arguments)
            self._batches = iter(self._loader)
        return self._batches

    def close(self) -> None:
        """Ends the pass and its threads; on every rank at the same step."""
        if self._loader is not None:
            self._loader.close()
        self._loader = self._source = None
