"""FAEShardingPlanner: a TorchRec ShardingPlanner that puts popular rows into a replicated hot tier; stock planning does the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingPlan, ShardingPlanner
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from fae_torchrec.core.errors import FingerprintError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer, TableKind, TableSet
from fae_torchrec.distributed.constraints import cold_constraints
from fae_torchrec.distributed.local_ranks import from_first_rank
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.sharder import FAEEmbeddingBagCollectionSharder, get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables

# Adam's step count would drift between tiers that see different numbers of batches.
_SUPPORTED = {Optimizer.SGD, Optimizer.ADAGRAD, Optimizer.ROWWISE_ADAGRAD}


class FAEShardingPlanner(ShardingPlanner):
    """Plans the hot tier by the placement and the cold tier by TorchRec's own EmbeddingShardingPlanner.

    Every EmbeddingBagCollection with a hot row gets the hot/cold module; one without gets the stock module, its tables planned as cold
    ones; all other modules get the stock plan. The hot tier's bytes are taken from every rank's storage before the stock planner sees it.

    Args:
        placement: where the rows of the model's tables live; the same on every rank.
        topology: as for EmbeddingShardingPlanner. Default: this process group on CUDA if there is any, else CPU.
        batch_size: per rank.
        constraints: as for EmbeddingShardingPlanner, by table.
        cold_tier: "host", "uvm", "uvm_caching" or "auto" (CPU: host; CUDA: uvm_caching).
        **stock: further arguments of EmbeddingShardingPlanner (`storage_reservation`, `proposer`, `partitioner`, `stats`, ...).

    Raises:
        PlannerError: the cold tier or a constraint does not fit, or the hot rows do not fit into a rank's storage.
    """

    def __init__(
        self,
        placement: RowPlacement,
        topology: Topology | None = None,
        batch_size: int | None = None,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        cold_tier: str = "auto",
        **stock: Any,
    ) -> None:
        topology = topology or _default_topology()
        self._placement = placement
        self._planner = EmbeddingShardingPlanner(
            topology=_without_hot_tier(topology, placement.hot_bytes),
            batch_size=batch_size,
            constraints=cold_constraints(placement, topology.compute_device, cold_tier, constraints),
            **stock,
        )

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """Plans one model; no collective.

        Args:
            module: the unsharded model.
            sharders: `get_fae_sharders()`.

        Returns:
            A ShardingPlan whose entries for hot/cold collections are FAEModuleShardingPlan.

        Raises:
            FingerprintError: the placement belongs to other tables than the model's.
            PlannerError: a table uses what hot/cold tables do not support; says which and what to do.
        """
        self._check(module, sharders)
        return self._attach(self._plan_cold_tier(module, sharders), module, sharders)

    def collective_plan(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]] | None = None, pg: dist.ProcessGroup | None = None
    ) -> ShardingPlan:
        """Plans the cold tier on rank 0 and broadcasts it; every rank adds its own copy of the placement.

        Args:
            module: the unsharded model.
            sharders: default `get_fae_sharders()`.
            pg: default the whole world.

        Raises:
            FingerprintError: as `plan`, or the ranks hold different placements; on every rank alike.
            PlannerError: as `plan`; on every rank alike.
        """
        sharders = get_fae_sharders() if sharders is None else sharders
        pg = pg or dist.group.WORLD
        if pg is None:
            raise PlannerError(
                "collective_plan needs a process group and none is initialized; call torch.distributed.init_process_group, or use plan()",
                PlannerErrorType.INPUT_VALIDATION,
            )
        self._check_same_placement(pg)  # first: with the same placement, the ranks fail or pass alike
        self._check(module, sharders)
        stock = from_first_rank(lambda: self._plan_cold_tier(module, sharders), pg)
        return self._attach(stock, module, sharders)

    def _plan_cold_tier(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        cold = [
            _ColdTierSharder(sharder, self._placement) if isinstance(sharder, FAEEmbeddingBagCollectionSharder) else sharder
            for sharder in sharders
        ]
        return self._planner.plan(module, cold)

    def _attach(self, stock: ShardingPlan, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        plan = dict(stock.plan)
        for path, collection in _collections(module, sharders):
            if any(self._placement.hot_rows(config.name) for config in collection.embedding_bag_configs()):
                cold = plan.get(path, EmbeddingModuleShardingPlan())
                assert isinstance(cold, EmbeddingModuleShardingPlan)
                plan[path] = FAEModuleShardingPlan.attach(cold, self._placement)
        return ShardingPlan(plan)

    def _check(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> None:
        """Raises for what cannot be planned, before any collective."""
        if not any(isinstance(sharder, FAEEmbeddingBagCollectionSharder) for sharder in sharders):
            raise PlannerError(
                "the sharders hold no FAEEmbeddingBagCollectionSharder, so nothing could build the hot tier; pass get_fae_sharders()",
                PlannerErrorType.INPUT_VALIDATION,
            )
        default = _default_optimizer(sharders)
        tables = TableSet(tuple(table for _, collection in _collections(module, sharders) for table in model_tables(collection, default)))
        self._placement.check_tables(tables)
        for table in tables:
            if self._placement.hot_rows(table.name) and table.optimizer not in _SUPPORTED:
                raise PlannerError(
                    f"table {table.name!r} is optimized by {table.optimizer.value}, hot tables may use "
                    f"{sorted(optimizer.value for optimizer in _SUPPORTED)}; choose one of these or plan this model with "
                    "EmbeddingShardingPlanner",
                    PlannerErrorType.INPUT_VALIDATION,
                )
        for path, collection in _collections(module, sharders):
            mean = [config.name for config in collection.embedding_bag_configs() if config.pooling is PoolingType.MEAN]
            if collection.is_weighted() and mean:
                raise PlannerError(
                    f"{path}: tables {mean} pool weighted ids by MEAN, which hot/cold tables do not support; use SUM or plan this model "
                    "with EmbeddingShardingPlanner",
                    PlannerErrorType.INPUT_VALIDATION,
                )

    def _check_same_placement(self, pg: dist.ProcessGroup) -> None:
        mine = self._placement.fingerprint
        everyone: list[str] = [mine] * pg.size()
        if pg.size() > 1:
            dist.all_gather_object(everyone, mine, group=pg)
        if len(set(everyone)) > 1:
            raise FingerprintError(
                f"the ranks hold different row placements: {everyone} by rank; load the same placement file on every rank"
            )


class _ColdTierSharder(EmbeddingBagCollectionSharder):
    """What the stock planner sees of a hot/cold collection: its split and all-cold tables."""

    def __init__(self, sharder: FAEEmbeddingBagCollectionSharder, placement: RowPlacement) -> None:
        super().__init__(sharder.fused_params, sharder.qcomm_codecs_registry)
        self._placement = placement

    def shardable_parameters(self, module: EmbeddingBagCollection) -> dict[str, nn.Parameter]:
        parameters = super().shardable_parameters(module)
        return {name: parameter for name, parameter in parameters.items() if self._placement.kind(name) is not TableKind.HOT}


def _collections(
    module: nn.Module, sharders: list[ModuleSharder[nn.Module]], path: str = ""
) -> Iterator[tuple[str, EmbeddingBagCollection]]:
    """The collections our sharder is asked for, with their paths: as DMP walks the model, not looking into what another sharder takes."""
    if type(module) is EmbeddingBagCollection:
        yield path, module
    elif type(module) not in {sharder.module_type for sharder in sharders}:
        for name, child in module.named_children():
            yield from _collections(child, sharders, f"{path}.{name}" if path else name)


def _default_optimizer(sharders: list[ModuleSharder[nn.Module]]) -> Optimizer:
    """The optimizer of unmarked tables: what our sharder's fused_params say, else FBGEMM's default."""
    ours = next(sharder for sharder in sharders if isinstance(sharder, FAEEmbeddingBagCollectionSharder))
    name = getattr((ours.fused_params or {}).get("optimizer"), "value", "exact_sgd")
    by_fbgemm_name = {
        "sgd": Optimizer.SGD,
        "exact_sgd": Optimizer.SGD,
        "exact_adagrad": Optimizer.ADAGRAD,
        "rowwise_adagrad": Optimizer.ROWWISE_ADAGRAD,
        "exact_row_wise_adagrad": Optimizer.ROWWISE_ADAGRAD,
        "adam": Optimizer.ADAM,
    }
    if name not in by_fbgemm_name:
        raise PlannerError(
            f"the sharder's fused_params name the optimizer {name!r}; hot tables may use {sorted(o.value for o in _SUPPORTED)}",
            PlannerErrorType.INPUT_VALIDATION,
        )
    return by_fbgemm_name[name]


def _default_topology() -> Topology:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Topology(world_size=world_size, local_world_size=get_local_size(world_size), compute_device=device)


def _without_hot_tier(topology: Topology, hot_bytes: int) -> Topology:
    """The topology that is left for the cold tier."""
    left = copy.deepcopy(topology)
    for device in left.devices:
        memory = "hbm" if topology.compute_device == "cuda" else "ddr"
        free = getattr(device.storage, memory) - hot_bytes
        if free < 0:
            raise PlannerError(
                f"the hot rows take {hot_bytes:,} bytes on every rank, rank {device.rank} has {free + hot_bytes:,} bytes of {memory}; "
                "select the hot set under a smaller budget",
                PlannerErrorType.INSUFFICIENT_STORAGE,
            )
        setattr(device.storage, memory, free)
    return left
