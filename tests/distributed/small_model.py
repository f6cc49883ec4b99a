"""A small model, its data and its placement: what the sharded tests train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSet
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables

OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": RowWiseAdagrad, "adam": torch.optim.Adam}
LEARNING_RATE = 0.1
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One combination of what the parity tests vary."""

    optimizer: str = "sgd"
    pooling: PoolingType = PoolingType.SUM
    weighted: bool = False
    multi_hot: bool = True
    mixed_dims: bool = True
    steps: int = 20
    dtype: DataType = DataType.FP32

    def __str__(self) -> str:
        traits = [self.optimizer, self.pooling.value.lower(), "weighted" if self.weighted else "plain"]
        traits += ["multi" if self.multi_hot else "one", "dims" if self.mixed_dims else "dim", str(self.steps)]
        return "-".join(traits if self.dtype is DataType.FP32 else [*traits, self.dtype.value.lower()])


def configs(case: Case) -> list[EmbeddingBagConfig]:
    """All hot, split and all-cold tables; a feature of two tables, a table of two features, two dims."""
    wide = 8 if case.mixed_dims else 4
    rows = [
        ("tiny", 6, 4, ["a"]),
        ("big", 200, 4, ["b", "c"]),
        ("wide", 90, wide, ["c"]),
        ("frozen", 50, 4, ["d"]),
        ("other", 120, wide, ["e"]),
    ]
    return [
        EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=f, pooling=case.pooling, data_type=case.dtype)
        for n, r, d, f in rows
    ]


ROWS_OF_FEATURE = {"a": 6, "b": 200, "c": 90, "d": 50, "e": 120}


class SmallModel(nn.Module):
    """One EmbeddingBagCollection and one linear layer over everything it gives, whatever the order of its blocks."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(tables=configs(case), is_weighted=case.weighted, device=torch.device("meta"))
        self.names = sorted(name for config in configs(case) for name in (_names(config, case)))
        width = sum(config.embedding_dim * len(config.feature_names) for config in configs(case))
        self.over = nn.Linear(width + 3, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.ebc(batch.sparse_features).to_dict()
        logits = self.over(torch.cat([batch.dense_features, *(pooled[name] for name in self.names)], dim=1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, logits.detach()


def _names(config: EmbeddingBagConfig, case: Case) -> list[str]:
    return [f"c@{config.name}" if feature == "c" else feature for feature in config.feature_names]


def new_model(case: Case) -> SmallModel:
    """A model whose tables carry the fused optimizer's mark."""
    torch.manual_seed(11)
    model = SmallModel(case)
    apply_optimizer_in_backward(OPTIMIZERS[case.optimizer], model.ebc.parameters(), {"lr": LEARNING_RATE})
    return model


def start_weights(case: Case) -> dict[str, torch.Tensor]:
    """The same weights for every placement, by stock key."""
    generator = torch.Generator().manual_seed(5)
    return {
        f"ebc.embedding_bags.{config.name}.weight": torch.rand(config.num_embeddings, config.embedding_dim, generator=generator) - 0.5
        for config in configs(case)
    }


def new_batch(case: Case, step: int, rank: int, size: int = 16, hot_only: RowPlacement | None = None) -> Batch:
    """A batch that depends on (step, rank) alone; with `hot_only`, of hot ids alone."""
    rng = np.random.default_rng([3, step, rank])
    values, lengths = [], []
    for feature, rows in ROWS_OF_FEATURE.items():
        length = rng.integers(0, 4, size) if case.multi_hot else np.ones(size, dtype=np.int64)
        allowed = np.arange(rows)
        if hot_only is not None:
            for table in hot_only.tables:
                if feature in table.feature_names:
                    allowed = np.intersect1d(allowed, hot_only.hot_ids[table.name])
            if not len(allowed):
                length = np.zeros(size, dtype=np.int64)
        lengths.append(length)
        # Squares favour small ids: rows repeat within a batch and across ranks.
        picks = (rng.random(length.sum()) ** 2 * len(allowed)).astype(np.int64)
        values.append(allowed[picks] if len(allowed) else picks)
    flat = torch.from_numpy(np.concatenate(values))
    weights = torch.from_numpy(rng.random(len(flat)).astype(np.float32)) if case.weighted else None
    kjt = KeyedJaggedTensor(list(ROWS_OF_FEATURE), flat, weights, lengths=torch.from_numpy(np.concatenate(lengths)).to(torch.int32))
    dense = torch.from_numpy(rng.random((size, 3)).astype(np.float32))
    return Batch(dense, kjt, torch.from_numpy(rng.integers(0, 2, size).astype(np.float32)))


def new_placement(tables: TableSet) -> RowPlacement:
    """`tiny` all hot, `frozen` all cold, the others split with scattered hot rows."""
    rng = np.random.default_rng(17)
    hot = {"tiny": 6, "big": 60, "wide": 30, "frozen": 0, "other": 25}
    hot_ids = {table.name: np.sort(rng.choice(table.rows, hot[table.name], replace=False)) for table in tables}
    return RowPlacement(tables=tables, hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


def placement_of(case: Case) -> RowPlacement:
    """The placement of the case's tables."""
    return new_placement(model_tables(new_model(case)))


def shard(
    case: Case,
    placement: RowPlacement | None,
    weights: dict[str, torch.Tensor] | None = None,
    hot_tier: str = "replicated",
    device: torch.device = CPU,
    fused_params: dict[str, Any] | None = None,
    **planner_options: Any,
) -> DistributedModelParallel:
    """A new model, sharded by the stock planner or by ours where a placement is given, with the same start weights every time.

    Stock's tables are table-wise and in the device's own memory.
    """
    model = new_model(case)
    group = dist.group.WORLD
    weights = start_weights(case) if weights is None else weights
    dense = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("ebc.")}
    topology = Topology(world_size=dist.get_world_size(), local_world_size=dist.get_world_size(), compute_device=device.type)
    sharders = get_fae_sharders(fused_params)  # exactly stock's for a stock plan
    if placement is None:
        allowed = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
        constraints = {config.name: allowed for config in configs(case)}
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=16, constraints=constraints)
    else:
        planner = FAEShardingPlanner(placement, topology=topology, batch_size=16, hot_tier=hot_tier, **planner_options)
    sharded = DistributedModelParallel(model, device=device, plan=planner.collective_plan(model, sharders, group), sharders=sharders)
    sharded.load_state_dict({**dense, **weights})
    return sharded


def dense_optimizer(model: DistributedModelParallel) -> torch.optim.Optimizer:
    """Plain SGD on what is not fused."""
    return torch.optim.SGD([param for name, param in model.named_parameters() if "over" in name], lr=LEARNING_RATE)


def train(model: DistributedModelParallel, batches: Iterable[Batch]) -> list[float]:
    """Trains without a pipeline; returns the losses."""
    optimizer = dense_optimizer(model)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        model.fused_optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole_tensors(state: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Puts a (sharded) state together from every rank's local shards; ranks may hold different keys. Collective."""
    mine = {
        key: (tuple(value.size()), [(shard.metadata.shard_offsets, _copied(shard.tensor)) for shard in value.local_shards()])
        if isinstance(value, ShardedTensor)
        else _copied(value)
        for key, value in state.items()
    }
    everyone: list[dict[str, object]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    for state_of_rank in everyone:
        for key, value in state_of_rank.items():
            if isinstance(value, torch.Tensor):
                whole.setdefault(key, value)
                continue
            size, shards = value
            out = whole.setdefault(key, torch.full(size, torch.nan))
            for offsets, tensor in shards:
                out[tuple(slice(start, start + length) for start, length in zip(offsets, tensor.shape, strict=True))] = tensor
    return whole


def _copied(tensor: Any) -> torch.Tensor:
    copied: torch.Tensor = tensor.detach().cpu().clone()
    return copied


def optimizer_state(model: DistributedModelParallel) -> dict[str, torch.Tensor]:
    """The fused optimizer's state as whole tensors by "<parameter>/<state>". Collective."""
    state = model.fused_optimizer.state_dict()["state"]
    return whole_tensors({f"{key}/{name}": value for key, states in state.items() for name, value in states.items()})
