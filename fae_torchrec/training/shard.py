"""From an unsharded model to a sharded one with its optimizer: by the stock planner, or by ours where a placement is given."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.distributed.hardware_topology import machine_topology
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.baselines import SAME_ARITHMETIC, StockBaseline, stock_planner


def fae_planner(
    placement: RowPlacement,
    topology: Topology,
    batch_size: int,
    *,
    hot_tier: str = "replicated",
    cold_tier: str = "auto",
    cold_cache_bytes: int | None = None,
    stock_tables: Iterable[str] = (),
) -> FAEShardingPlanner:
    """The planner of a hot/cold run; tables left to stock may be sharded as the stock baseline's are. Arguments as `shard_model`.

    Raises:
        PlannerError: there is no such tier on the device, or a table is both placed and left to stock.
    """
    left = tuple(stock_tables)
    return FAEShardingPlanner(
        placement,
        topology=topology,
        batch_size=batch_size,
        constraints=stock_constraints(left),
        cold_tier=cold_tier,
        hot_tier=hot_tier,
        stock_tables=left,
        cold_cache_bytes=cold_cache_bytes,
    )


def shard_model(
    model: nn.Module,
    placement: RowPlacement | None,
    batch_size: int,
    device: torch.device,
    group: dist.ProcessGroup,
    *,
    hot_tier: str = "replicated",
    cold_tier: str = "auto",
    cold_cache_bytes: int | None = None,
    stock_tables: Iterable[str] = (),
    baseline: StockBaseline | None = None,
    cache_bytes: int | None = None,
) -> DistributedModelParallel:
    """Shards a model and gives it the unsharded model's weights, so that every placement starts from the same.

    Args:
        model: unsharded, with real weights.
        placement: hot and cold rows, or None for TorchRec's own EmbeddingShardingPlanner (over the sharding types that keep the tables'
            optimizer as it is; see `SAME_ARITHMETIC`).
        batch_size: per rank.
        device: where to train.
        group: the ranks.
        hot_tier: as FAEShardingPlanner; of no matter without a placement, and so are those below.
        cold_tier: as FAEShardingPlanner.
        cold_cache_bytes: as FAEShardingPlanner.
        stock_tables: tables that the placement does not know, left to stock sharding.
        baseline: without a placement, where TorchRec's planner may put the tables; None lets it choose.
        cache_bytes: of a baseline that caches, see `stock_planner`.
    """
    # Names, not the module: the unsharded tables are freed with the returned dict's last reader.
    weights = dict(model.state_dict())
    topology = machine_topology(group.size(), device.type)
    if placement is None:
        sharders = get_default_sharders()
        planner = stock_planner(model_tables(model), topology, batch_size, baseline, cache_bytes)
        plan = planner.collective_plan(model, sharders, group)
    else:
        sharders = get_fae_sharders()
        ours = fae_planner(
            placement,
            topology,
            batch_size,
            hot_tier=hot_tier,
            cold_tier=cold_tier,
            cold_cache_bytes=cold_cache_bytes,
            stock_tables=stock_tables,
        )
        plan = ours.collective_plan(model, sharders, group)
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    sharded.load_state_dict(weights)
    return sharded


def build_optimizer(model: DistributedModelParallel, dense_learning_rate: float) -> CombinedOptimizer:
    """The fused optimizer of the tables and an Adagrad of the dense part, as TorchRec's DLRM reference has them."""
    dense_parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    dense = KeyedOptimizerWrapper(dense_parameters, lambda parameters: torch.optim.Adagrad(parameters, lr=dense_learning_rate))
    return CombinedOptimizer([model.fused_optimizer, dense])


def stock_constraints(tables: Iterable[str]) -> dict[str, ParameterConstraints]:
    """What the stock planner may choose for tables that it plans alone: what does the same arithmetic as the unsharded table."""
    return {name: ParameterConstraints(sharding_types=list(SAME_ARITHMETIC)) for name in tables}
