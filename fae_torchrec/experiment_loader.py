"""The loaders of an experiment: the batches that a placement trains on, and those that are audited afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice

import torch.distributed as dist

from fae_torchrec.config import RunConfig
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import Guard, ShuffleSchedule
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.stream_windows import Agree
from fae_torchrec.distributed.process_group import gather_counts
from fae_torchrec.experiment_data import ExperimentData
from fae_torchrec.experiment_store import open_store


@contextmanager
def agreement(group: dist.ProcessGroup) -> Iterator[Agree]:
    """What loaders take as `agree`: over a process group of its own on the CPU, for it is a thread that asks."""
    own = dist.new_group(backend="gloo")
    yield gather_counts(own)
    dist.destroy_process_group(own)  # not after an error, when the thread may still be in it


def train_loader(
    config: RunConfig, name: str, data: ExperimentData, placement: RowPlacement, group: dist.ProcessGroup, agree: Agree
) -> HotColdDataLoader:
    """The train batches: "fae" takes the store, if there is one, and segregates; the others take the order of the data."""
    options, schedule = config.loader, config.schedule
    store = open_store(config, data, placement) if name == "fae" else None
    guard = None if schedule.guard is None else Guard(**asdict(schedule.guard))
    return HotColdDataLoader(
        data.train if store is None else store,
        placement,
        batch_size=config.train.batch_size,
        schedule=ShuffleSchedule(schedule.policy if name == "fae" else "stock", schedule.rate, schedule.patience, guard),
        rank=group.rank(),
        world_size=group.size(),
        agree=agree,
        window_batches=options.window_batches,
        buffer_bytes=options.buffer_bytes,
        drop_last=options.drop_last,
        pin_memory=options.pin_memory and config.train.device == "cuda",
        num_workers=options.workers,
        prefetch=options.prefetch,
        shuffle=options.shuffle and store is not None,
        seed=options.seed,
    )


def audit_loader(
    config: RunConfig, data: ExperimentData, placement: RowPlacement, group: dist.ProcessGroup, agree: Agree, *, segregates: bool
) -> HotColdDataLoader:
    """The first `compare.count_batches` train batches, of both kinds where the run had them so; for the audit and the profile."""
    size, rank, ranks = config.train.batch_size, group.rank(), group.size()
    return HotColdDataLoader(
        lambda: islice(data.train.batches(size, rank=rank, world_size=ranks), config.compare.count_batches),
        placement,
        batch_size=size,
        schedule=ShuffleSchedule("fixed" if segregates else "stock"),
        rank=rank,
        world_size=ranks,
        agree=agree,
        pin_memory=config.loader.pin_memory and config.train.device == "cuda",
        prefetch=0,  # nothing beside what is timed
    )
