"""A small model of an EmbeddingCollection and an EmbeddingBagCollection over the same batches: what the sequence tests train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables
from tests.distributed import small_model
from tests.distributed.small_model import LEARNING_RATE, OPTIMIZERS, Case

DIM = 4
LONGEST = 3  # ids of a feature in `small_model.new_batch`
ROWS = {"big": 200, "tiny": 6, "wide": 90, "frozen": 50, "other": 120, "pooled": 200}
FEATURES = {"tiny": ["a"], "big": ["b", "c"], "wide": ["c"], "frozen": ["d"], "other": ["e"], "pooled": ["b"]}
NAMES = ["b", "c@big", "a", "c@wide", "d", "e"]  # stock's, of the sequences, in the order of the tables
HOT = {"tiny": 6, "big": 60, "wide": 30, "frozen": 0, "other": 25, "pooled": 120}


@dataclass(frozen=True)
class Setup:
    """What the tests vary.

    Attributes:
        optimizer: of all tables but `other`, which has plain SGD: two groups of hot tables, unless it is SGD too.
        ids: dtype of the ids.
        hot: hot rows by table.
        left: tables left to stock sharding.
    """

    optimizer: str = "sgd"
    ids: torch.dtype = torch.int64
    hot: tuple[tuple[str, int], ...] = tuple(HOT.items())
    left: tuple[str, ...] = ()


class SequenceModel(nn.Module):
    """A linear layer over every id's row at its place in its bag, and over a pooled table."""

    def __init__(self) -> None:
        super().__init__()
        tables = [EmbeddingConfig(name=n, num_embeddings=ROWS[n], embedding_dim=DIM, feature_names=FEATURES[n]) for n in ROWS]
        self.ec = EmbeddingCollection([table for table in tables if table.name != "pooled"], torch.device("meta"))
        pooled = EmbeddingBagConfig(name="pooled", num_embeddings=ROWS["pooled"], embedding_dim=8, feature_names=FEATURES["pooled"])
        self.ebc = EmbeddingBagCollection([pooled], device=torch.device("meta"))
        self.over = nn.Linear(3 + 8 + len(NAMES) * LONGEST * DIM, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.ebc(batch.sparse_features)
        rows = self.ec(batch.sparse_features)
        padded = [rows[name].to_padded_dense(LONGEST).flatten(1) for name in NAMES]
        logits = self.over(torch.cat([batch.dense_features, pooled["b"], *padded], dim=1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, logits.detach()


def new_model(setup: Setup) -> SequenceModel:
    """A model whose tables carry the fused optimizers' marks."""
    torch.manual_seed(11)
    model = SequenceModel()
    for name, weight in [*model.ec.named_parameters(), *model.ebc.named_parameters()]:
        optimizer = "sgd" if ".other." in name else setup.optimizer
        apply_optimizer_in_backward(OPTIMIZERS[optimizer], [weight], {"lr": LEARNING_RATE})
    return model


def placement_of(setup: Setup) -> RowPlacement:
    """Scattered hot rows, as many as the setup says; a table that is left to stock is not in it."""
    rng = np.random.default_rng(17)
    tables = model_tables(new_model(setup), leave=setup.left)
    hot_ids = {table.name: np.sort(rng.choice(table.rows, dict(setup.hot)[table.name], replace=False)) for table in tables}
    return RowPlacement(tables=tables, hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


def new_batch(setup: Setup, step: int, rank: int, *, hot: bool = False) -> Batch:
    """A batch that depends on (step, rank) alone; a hot one is promised to be so. Rank 0's batch of step 2 has no id at all."""
    batch = small_model.new_batch(Case(), step, rank, hot_only=placement_of(setup) if hot else None)
    kjt = batch.sparse_features
    values, lengths = kjt.values().to(setup.ids), kjt.lengths()
    if (step, rank) == (2, 0):
        values, lengths = values[:0], torch.zeros_like(lengths)
    kjt = KeyedJaggedTensor(kjt.keys(), values, lengths=lengths)
    return Batch(batch.dense_features, HotKeyedJaggedTensor.promise(kjt) if hot else kjt, batch.labels)


def shard(
    setup: Setup, placement: RowPlacement | None, device: torch.device = small_model.CPU, **planner_options: Any
) -> DistributedModelParallel:
    """A new model, sharded by the stock planner or by ours where a placement is given, with the same start weights every time."""
    model = new_model(setup)
    world = dist.get_world_size()
    topology = Topology(world_size=world, local_world_size=world, compute_device=device.type)
    if placement is None:
        sharders = get_default_sharders()
        constraints = {name: ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"]) for name in ROWS}
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=16, constraints=constraints)
    else:
        sharders = get_fae_sharders()
        planner = FAEShardingPlanner(placement, topology=topology, batch_size=16, stock_tables=setup.left, **planner_options)
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    generator = torch.Generator().manual_seed(5)
    weights = {
        key: value.clone() if key.startswith("over") else torch.rand(value.shape, generator=generator) - 0.5
        for key, value in model.state_dict().items()
    }
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    sharded.load_state_dict(weights)
    return sharded
