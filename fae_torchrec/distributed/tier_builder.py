"""TierBuilder makes the tiers of one collection from its plan: hot, cold, the tables left to stock, and the staging area between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.distributed.types import QuantizedCommCodec, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from fae_torchrec.core.tables import TableKind
from fae_torchrec.distributed.homes import local_tables
from fae_torchrec.distributed.host_tier import HOST, HostTier, host_env
from fae_torchrec.distributed.local_tier import LocalTier
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.replicated import ReplicatedHotTier
from fae_torchrec.distributed.sharded_hot_tier import ShardedHotBags, ShardedHotSequences, ShardedHotTier
from fae_torchrec.distributed.staging import RowHomes, Staging
from fae_torchrec.distributed.tier_tables import Collection, merged_tables, optimizer_key, tier_collection
from fae_torchrec.distributed.tiers import StockTier
from fae_torchrec.modules.lookups import HotGroup, TableConfig, tier_config
from fae_torchrec.modules.model_tables import table_weights

NewStockModule = Callable[[Collection, dict[str, Any], ShardingEnv, torch.device, dict[str, Any] | None], nn.Module]


@dataclass
class TierBuilder:
    """What all tiers of one collection are made of.

    Attributes:
        module: the unsharded stock collection.
        plan: where every table's home and hot rows lie.
        env: the ranks.
        fused_params: the sharder's fused parameters.
        device: of the hot tier and of the stock tiers' kernels.
        groups: tables whose hot rows share a kernel.
        new_stock: shards a stock collection as stock does.
    """

    module: Collection
    plan: FAEModuleShardingPlan
    env: ShardingEnv
    fused_params: dict[str, Any] | None
    device: torch.device
    groups: list[HotGroup]
    new_stock: NewStockModule

    def __post_init__(self) -> None:
        self.pooled = isinstance(self.module, EmbeddingBagCollection)
        self.staging_capacity = self._rows_to_stage()

    def hot(self, tables: Sequence[TableConfig], codec: QuantizedCommCodec | None) -> ReplicatedHotTier | ShardedHotTier:
        """The hot tier.

        Args:
            tables: the collection's.
            codec: of the gradients that replicas exchange, or None.
        """
        if self.plan.hot_tier != "replicated":
            configs = {config.name: config for config in tables}
            hot = [tier_config(configs[name], rows) for group in self.groups for name, rows in group.tables]
            stock = self.new_stock(tier_collection(self.module, hot), dict(self.plan.hot), self.env, self.device, self.fused_params)
            kind = ShardedHotBags if self.pooled else ShardedHotSequences
            return kind(stock, self.groups, self.env.process_group, self.device)
        return ReplicatedHotTier(
            self.groups,
            merged_tables(self.module, self.groups, [2 * rows for rows in self.staging_capacity]),
            pooled=self.pooled,
            fused_params=self.fused_params,
            env=self.env,
            device=self.device,
            codec=codec,
        )

    def cold(self, configs: list[TableConfig], keys: list[str]) -> list[StockTier]:
        """The cold tier as a list of one, or of none where no table has a cold row.

        Args:
            configs: of the tables with cold rows.
            keys: of their lookups, in the order in which they get ids.
        """
        if not configs:
            return []
        # TierSplit has brought the ids into bounds.
        params = {**(self.fused_params or {}), "bounds_check_mode": BoundsCheckMode.NONE}
        if self.plan.cold_on_host and self.device.type != HOST.type:
            return [HostTier(self._homes(configs, host_env(self.env), HOST, params), configs, keys)]
        stock = self._homes(configs, self.env, self.device, params)
        local = self.env.world_size == 1 and self.pooled and LocalTier.fits(stock)
        return [(LocalTier if local else StockTier)(stock, configs, keys)]

    def left(self, configs: list[TableConfig]) -> list[StockTier]:
        """The tables left to stock sharding, as a list of one or of none.

        Args:
            configs: of these tables.
        """
        if not configs:
            return []
        keys = [key for config in configs for key in config.feature_names]
        return [StockTier(self._homes(configs, self.env, self.device, self.fused_params), configs, keys)]

    def staging(self, hot: ReplicatedHotTier | ShardedHotTier, cold_lookups: list[nn.Module]) -> Staging | None:
        """What brings cold rows beside the hot ones; None where nothing is staged.

        Args:
            hot: the tier, with room for them.
            cold_lookups: the stock lookups of the cold tier.
        """
        if not any(self.staging_capacity) or not isinstance(hot, ReplicatedHotTier):
            return None
        homes = RowHomes.of(self.groups, local_tables(cold_lookups))
        return None if homes is None else Staging(homes, list(hot.spare_rows()), self.staging_capacity, self.device)

    def _rows_to_stage(self) -> list[int]:
        """By group, the rows of a half of its staging area: the plan's, dealt by cold lookups. 0 where nothing can be staged."""
        cold = [[lookup.table for lookup in group.lookups if lookup.kind is not TableKind.HOT] for group in self.groups]
        none = [0] * len(self.groups)
        if not self.plan.staging_rows or self.env.world_size > 1 or not any(cold):
            return none
        weights = table_weights(self.module)
        for group, tables in zip(self.groups, cold, strict=True):
            # All of a group's cold rows must be such as its kernel has.
            alike = group.tables and {(optimizer_key(weights[t]), weights[t].dtype) for t in (group.tables[0][0], *tables)}
            if tables and (not alike or len(alike) > 1):
                return none
        lookups = sum(map(len, cold))
        return [self.plan.staging_rows * len(tables) // lookups for tables in cold]

    def _homes(self, configs: list[TableConfig], env: ShardingEnv, device: torch.device, fused_params: dict[str, Any] | None) -> nn.Module:
        plan = {config.name: self.plan[config.name] for config in configs}
        return self.new_stock(tier_collection(self.module, configs), plan, env, device, fused_params)
