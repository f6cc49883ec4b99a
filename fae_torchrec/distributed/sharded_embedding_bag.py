"""The sharded hot/cold EmbeddingBagCollection: hot bags summed in the hot tier, the few cold bags packed through the stock cold tier."""

from __future__ import annotations

from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import Awaitable, CommOp, LazyAwaitable, LazyGetItemMixin, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

from fae_torchrec.distributed.hot_cold_module import ShardedHotColdModule
from fae_torchrec.distributed.tier_tables import Collection
from fae_torchrec.distributed.tiers import FAEContext
from fae_torchrec.modules.bag_split import BagSplit
from fae_torchrec.modules.lookups import HotGroup, stock_names
from fae_torchrec.modules.pooling import TierJoin
from fae_torchrec.modules.tier_split import TieredIds


class ShardedFAEEmbeddingBagCollection(ShardedHotColdModule):
    """The sharded hot/cold form of TorchRec's EmbeddingBagCollection; see ShardedHotColdModule."""

    stock_type = EmbeddingBagCollection
    prefix = "embedding_bags"
    gradient_comm = CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        split = self.tier_split
        # Private, and the keys of every KeyedTensor that the stock module (torchrec 1.8) gives, which are in the order of its ranks; the
        # 2-rank parity test fails if it moves.
        columns = [name for tier in self._cold for name in tier.module._embedding_names]
        self.tier_join = TierJoin(split.lookups, columns, [lookup.key for lookup in split.cold_lookups], self._device)
        self.stock_names = stock_names(list(self._configs.values()))

    def _new_split(self, groups: list[HotGroup], mode: BoundsCheckMode) -> BagSplit:
        return BagSplit(*self._split_args(groups, mode))

    def _new_stock_module(self, collection: Collection, plan: dict[str, Any], env: ShardingEnv, device: torch.device) -> nn.Module:
        module: nn.Module = ShardedEmbeddingBagCollection(
            collection, plan, env, self._fused_params, device, self.qcomm_codecs_registry, self._module_fqn
        )
        return module

    def compute_and_output_dist(self, ctx: FAEContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """Looks all tiers up and joins them when waited for."""
        assert ctx.ids is not None
        hot, cold, left = self._look_up(ctx, input)
        return _BagsAwaitable(self, ctx.ids, hot, cold, left)


class _BagsAwaitable(LazyGetItemMixin[str, torch.Tensor], LazyAwaitable[KeyedTensor]):
    """Waits for the stock tiers' output dists and joins the tiers."""

    def __init__(
        self,
        module: ShardedFAEEmbeddingBagCollection,
        ids: TieredIds,
        hot: Awaitable[torch.Tensor],
        cold: LazyAwaitable[KeyedTensor] | None,
        left: LazyAwaitable[KeyedTensor] | None,
    ) -> None:
        super().__init__()
        self._module, self._ids, self._hot, self._cold, self._left = module, ids, hot, cold, left

    def _wait_impl(self) -> KeyedTensor:
        module, ids = self._module, self._ids
        cold = None if self._cold is None else self._cold.wait().values().to(module._device)
        joined = module.tier_join.keyed(
            module.clip_gradient(module.tier_join(module.wait_for_hot(self._hot), cold, ids.cold_at, ids.lengths))
        )
        if self._left is None:
            return joined
        left = self._left.wait()
        keys: list[str] = left.keys()
        names = [module.stock_names[key] for key in keys]
        return KeyedTensor(
            keys=[*joined.keys(), *names],
            length_per_key=[*joined.length_per_key(), *left.length_per_key()],
            values=torch.cat([joined.values(), left.values()], dim=1),
        )
