"""The sharders that turn stock collections into hot/cold ones where the plan says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, ParameterSharding, QuantizedCommCodecs, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.sharded_embedding import ShardedFAEEmbeddingCollection
from fae_torchrec.distributed.sharded_embedding_bag import ShardedFAEEmbeddingBagCollection


class FAEEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """Shards a stock EmbeddingBagCollection: hot/cold for a plan of FAEShardingPlanner, exactly as stock for any other plan.

    Takes the arguments of TorchRec's EmbeddingBagCollectionSharder (`fused_params`, `qcomm_codecs_registry`, ...).
    """

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> nn.Module:
        """As ModuleSharder.shard."""
        if not isinstance(params, FAEModuleShardingPlan):
            stock: nn.Module = super().shard(module, params, env, device, module_fqn)
            return stock
        return ShardedFAEEmbeddingBagCollection(module, params, env, self.fused_params, device, self.qcomm_codecs_registry, module_fqn)


class FAEEmbeddingCollectionSharder(EmbeddingCollectionSharder):
    """Shards a stock EmbeddingCollection: hot/cold for a plan of FAEShardingPlanner, exactly as stock for any other plan.

    Takes the arguments of TorchRec's EmbeddingCollectionSharder; `use_index_dedup`, which changes no result, has no effect on hot/cold
    collections.
    """

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> nn.Module:
        """As ModuleSharder.shard."""
        if not isinstance(params, FAEModuleShardingPlan):
            stock: nn.Module = super().shard(module, params, env, device, module_fqn)
            return stock
        return ShardedFAEEmbeddingCollection(module, params, env, self.fused_params, device, self.qcomm_codecs_registry, module_fqn)


def get_fae_sharders(
    fused_params: dict[str, Any] | None = None, qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None
) -> list[ModuleSharder[nn.Module]]:
    """TorchRec's default sharders, with ours for EmbeddingBagCollection and EmbeddingCollection.

    Args:
        fused_params: passed to our sharders, for example `{"learning_rate": 0.1, "optimizer": EmbOptimType.EXACT_SGD}` where the model
            does not use `apply_optimizer_in_backward`.
        qcomm_codecs_registry: TorchRec's quantized communication (`get_qcomm_codecs_registry`), passed to our sharders; both tiers take it.
    """
    ours = {
        sharder.module_type: sharder
        for sharder in (
            FAEEmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry),
            FAEEmbeddingCollectionSharder(fused_params, qcomm_codecs_registry),
        )
    }
    return [ours.get(sharder.module_type, sharder) for sharder in get_default_sharders()]
