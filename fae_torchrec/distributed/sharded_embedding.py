"""The sharded hot/cold EmbeddingCollection: a row per id, hot ones from the hot tier, the others through the stock cold tier."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import Awaitable, CommOp, LazyAwaitable, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor

from fae_torchrec.distributed.hot_cold_module import ShardedHotColdModule
from fae_torchrec.distributed.tier_tables import Collection
from fae_torchrec.distributed.tiers import FAEContext
from fae_torchrec.modules.lookups import stock_names
from fae_torchrec.modules.sequence_split import SequenceIds, SequenceSplit, join_rows

Sequences = dict[str, JaggedTensor]


class ShardedFAEEmbeddingCollection(ShardedHotColdModule):
    """The sharded hot/cold form of TorchRec's EmbeddingCollection; see ShardedHotColdModule.

    Its output is the unsharded stock collection's: one JaggedTensor per lookup, in the order of the tables (stock's sharded one orders
    them by rank).
    """

    stock_type = EmbeddingCollection
    prefix = "embeddings"
    gradient_comm = CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stock_names = stock_names(list(self._configs.values()))

    def _new_split(self, device: torch.device) -> SequenceSplit:
        return SequenceSplit(*self._split_args(device))

    def _new_stock_module(
        self, collection: Collection, plan: dict[str, Any], env: ShardingEnv, device: torch.device, fused_params: dict[str, Any] | None
    ) -> nn.Module:
        module: nn.Module = ShardedEmbeddingCollection(
            collection, plan, env, fused_params, device, self.qcomm_codecs_registry, module_fqn=self._module_fqn
        )
        return module

    def compute_and_output_dist(self, ctx: FAEContext, input: KJTList) -> LazyAwaitable[Sequences]:
        """Looks all tiers up and joins them when waited for."""
        assert isinstance(ctx.ids, SequenceIds)
        hot, cold, left = self._look_up(ctx, input)
        return _SequencesAwaitable(self, ctx.ids, hot, cold, left)


class _SequencesAwaitable(LazyAwaitable[Sequences]):
    """Waits for the stock tiers' output dists and joins the tiers."""

    def __init__(
        self,
        module: ShardedFAEEmbeddingCollection,
        ids: SequenceIds,
        hot: Awaitable[torch.Tensor],
        cold: LazyAwaitable[Sequences] | None,
        left: LazyAwaitable[Sequences] | None,
    ) -> None:
        super().__init__()
        self._module, self._ids, self._hot, self._cold, self._left = module, ids, hot, cold, left

    def _wait_impl(self) -> Sequences:
        module, ids = self._module, self._ids
        rows = module.clip_gradient(join_rows(module.wait_for_hot(self._hot), None if self._cold is None else self._cold.wait(), ids))
        by_lookup = ids.by_lookup(rows, module.tier_split.lookups)
        if self._left is not None:
            by_lookup.update(self._left.wait())
        return {name: by_lookup[key] for key, name in module.stock_names.items()}
