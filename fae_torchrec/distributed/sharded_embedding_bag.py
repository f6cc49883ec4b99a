"""The sharded hot/cold EmbeddingBagCollection: hot bags summed in the hot tier, the few cold bags packed through the stock cold tier."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import Awaitable, CommOp, LazyAwaitable, LazyGetItemMixin, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.data.batches import AheadKeyedJaggedTensor
from fae_torchrec.distributed.hot_cold_module import ShardedHotColdModule
from fae_torchrec.distributed.staging import StagedBatch
from fae_torchrec.distributed.tier_tables import Collection
from fae_torchrec.distributed.tiers import FAEContext
from fae_torchrec.modules.bag_split import BagSplit
from fae_torchrec.modules.lookups import stock_names
from fae_torchrec.modules.pooling import TierJoin
from fae_torchrec.modules.staged_split import StagedSplit
from fae_torchrec.modules.tier_split import AheadIds, TieredIds


class ShardedFAEEmbeddingBagCollection(ShardedHotColdModule):
    """The sharded hot/cold form of TorchRec's EmbeddingBagCollection; see ShardedHotColdModule."""

    stock_type = EmbeddingBagCollection
    prefix = "embedding_bags"
    gradient_comm = CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL
    tier_split: BagSplit

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        split = self.tier_split
        # Private, and the keys of every KeyedTensor that the stock module (torchrec 1.8) gives, which are in the order of its ranks; the
        # 2-rank parity test fails if it moves.
        columns = [name for tier in self._cold for name in tier.module._embedding_names]
        self.tier_join = TierJoin(split.lookups, columns, [lookup.key for lookup in split.cold_lookups], self._device)
        self.stock_names = stock_names(list(self._configs.values()))
        lookups = [lookup.key for lookup in split.lookups]
        tiers = [self.module_sharding_plan.hot_tier, self._staging_capacity]
        self.split_key = fingerprint("tier split", self.placement.fingerprint, lookups, tiers)
        self._host_join = [copy.deepcopy(self.tier_join).to("cpu")]  # for `with_units`; in a list, so that it stays on the host

    def _new_split(self, device: torch.device) -> BagSplit:
        return BagSplit(*self._split_args(device))

    def _new_stock_module(
        self, collection: Collection, plan: dict[str, Any], env: ShardingEnv, device: torch.device, fused_params: dict[str, Any] | None
    ) -> nn.Module:
        module: nn.Module = ShardedEmbeddingBagCollection(
            collection, plan, env, fused_params, device, self.qcomm_codecs_registry, self._module_fqn
        )
        return module

    def host_split(self) -> BagSplit:
        """A split of the same tables for ids on the CPU, with the fastest index there is."""
        args = self._split_args(torch.device("cpu"))[:5]
        fastest: dict[str, Any] = {"compact_above_rows": sys.maxsize, "by_group": self.tier_split.by_group}
        if self._staging is None:
            return BagSplit(*args, **fastest)
        return StagedSplit(*args, **fastest, first_home=self._staging.first_home, capacity=self._staging_capacity)

    def with_units(self, ahead: AheadIds) -> AheadIds:
        """Ids that `host_split` has split, ready to be sent: with everything known of them that can be."""
        if ahead.ids.cold_at is not None:
            ahead.ids.units = self._host_join[0].units(ahead.ids.cold_at)
            ahead.ids.cold_at = None
        return ahead

    def _by_tier(self, ctx: FAEContext, features: KeyedJaggedTensor, *, promised_hot: bool) -> TieredIds:
        ahead = features.ahead.get(self.split_key) if isinstance(features, AheadKeyedJaggedTensor) else None
        if ahead is not None:
            ids = self.tier_split.arrived(ahead)
            ctx.staged = None if ahead.staged is None else StagedBatch(ahead.staged)
            if self._env.world_size > 1:  # the ranks tell each other
                ids = replace(ids, misses=ids.misses.to(self._device, non_blocking=True))
            return ids
        ids = super()._by_tier(ctx, features, promised_hot=promised_hot)
        ids.units = None if ids.cold_at is None else self.tier_join.units(ids.cold_at)
        return ids

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
            module.clip_gradient(module.tier_join(module.wait_for_hot(self._hot), cold, ids.units, ids.lengths))
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
