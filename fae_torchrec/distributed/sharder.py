"""The sharder that turns a stock EmbeddingBagCollection into the hot/cold one where the plan says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
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


def get_fae_sharders(fused_params: dict[str, Any] | None = None) -> list[ModuleSharder[nn.Module]]:
    """TorchRec's default sharders, with ours for EmbeddingBagCollection.

    Args:
        fused_params: passed to our sharder, for example `{"learning_rate": 0.1, "optimizer": EmbOptimType.EXACT_SGD}` where the model does
            not use `apply_optimizer_in_backward`.
    """
    return [
        FAEEmbeddingBagCollectionSharder(fused_params) if sharder.module_type is EmbeddingBagCollection else sharder
        for sharder in get_default_sharders()
    ]
