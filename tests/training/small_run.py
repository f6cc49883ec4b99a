"""A small DLRM with its samples and placement: what the trainer, audit and sharding tests train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.models.dlrm import DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.core.tables import Optimizer, TableSet
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.segregate import select_samples
from fae_torchrec.distributed.process_group import gather_counts
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.dlrm import build_dlrm
from fae_torchrec.training.shard import build_optimizer, shard_model

CPU = torch.device("cpu")
BATCH_SIZE = 16
ROWS = {"a": 6, "b": 300, "c": 120, "d": 60}


class Samples:
    """A BatchSource in memory; `dense_features[:, 0]` names each sample (see `numbers`). Feature b has bags of 0, 1 or 2 ids."""

    def __init__(self, num_samples: int, seed: int = 0) -> None:
        self.feature_names, self.num_dense, self.num_samples = tuple(ROWS), 3, num_samples
        rng = np.random.default_rng(seed)
        lengths = {name: rng.integers(0, 3, num_samples) if name == "b" else np.ones(num_samples, dtype=np.int64) for name in ROWS}
        rare = rng.random(num_samples) < 0.5  # a rare sample draws its ids from all rows, the others from the first fifth
        ids = []
        for name, rows in ROWS.items():
            of_rare = np.repeat(rare, lengths[name])
            ids.append((rng.random(len(of_rare)) * np.where(of_rare, rows, max(rows // 5, 1))).astype(np.int64))
        dense = np.stack([np.arange(num_samples) / 1024, rng.random(num_samples), rng.random(num_samples)], axis=1).astype(np.float32)
        kjt = KeyedJaggedTensor(
            keys=list(ROWS),
            values=torch.from_numpy(np.concatenate(ids)),
            lengths=torch.from_numpy(np.concatenate(list(lengths.values()))).to(torch.int32),
            stride=num_samples,
        )
        labels = (rng.random(num_samples) < np.where(rare, 0.7, 0.3)).astype(np.float32)
        self.whole = Batch(torch.from_numpy(dense), kjt, torch.from_numpy(labels))

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """As BatchSource says."""
        share = self.num_samples // world_size
        for done in range(0, share, batch_size):
            size = min(batch_size, share - done)
            start = done * world_size + rank * size
            yield select_samples(self.whole, torch.arange(start, start + size))


def numbers(batch: Batch) -> list[int]:
    """The samples' numbers in their source."""
    return (batch.dense_features[:, 0] * 1024).round().long().tolist()


def new_model(optimizer: Optimizer = Optimizer.SGD, dim: int = 4, seed: int = 3) -> DLRMTrain:
    """A real DLRM."""
    return build_dlrm(ROWS, 3, dim, [8, dim], [8, 1], optimizer, 0.1, seed)


def new_placement(tables: TableSet) -> RowPlacement:
    """`a` all hot, the others hot in the fifth that frequent samples draw from."""
    hot = {"t_a": 6, "t_b": 60, "t_c": 24, "t_d": 12}
    return RowPlacement(
        tables=tables,
        hot_ids={table.name: np.arange(hot[table.name]) for table in tables},
        hot_set_fingerprint="by hand",
        budget_bytes=0,
        hot_inputs=0.0,
        coverage=0.0,
    )


def placement_of(model: DLRMTrain) -> RowPlacement:
    """The placement of an unsharded model."""
    return new_placement(model_tables(model))


def sharded(model: DLRMTrain, placement: RowPlacement | None, **tiers: Any) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The model sharded over the default group, with its optimizer; `tiers` as for `shard_model`."""
    group = dist.group.WORLD
    assert group is not None
    out = shard_model(model, placement, BATCH_SIZE, CPU, group, **tiers)
    return out, build_optimizer(out, 0.02)


def new_loader(
    source: Samples, placement: RowPlacement, schedule: ShuffleSchedule, window_batches: int | None = None, *, prefetch: int = 0
) -> HotColdDataLoader:
    """This rank's loader; with `prefetch`, threads that talk over a group of their own."""
    group = dist.new_group(backend="gloo") if prefetch else dist.group.WORLD
    return HotColdDataLoader(
        source,
        placement,
        batch_size=BATCH_SIZE,
        schedule=schedule,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        agree=gather_counts(group),
        window_batches=window_batches,
        prefetch=prefetch,
    )
