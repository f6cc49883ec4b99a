"""The sharded hot/cold EmbeddingBagCollection: a replicated fused hot tier beside a stock-sharded cold tier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from fbgemm_gpu.permute_pooled_embedding_modules import PermutePooledEmbeddings
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.nn.modules.module import _IncompatibleKeys
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext, KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import KJTList, ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext, ShardedEmbeddingBagCollection
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    LazyGetItemMixin,
    QuantizedCommCodecs,
    ShardingEnv,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.streamable import Multistreamable

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind
from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.distributed.fused_optimizer import HotColdFusedOptimizer, HotTierOptimizer
from fae_torchrec.distributed.homes import Homes, local_tables
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.process_group import sum_of_disjoint
from fae_torchrec.distributed.replicated import HotContext, ReplicatedHotTier
from fae_torchrec.modules.pooling import block_permutation, combine_tiers
from fae_torchrec.modules.tier_split import Lookup, TierSplit, tier_configs


@dataclass
class FAEContext(Multistreamable):
    """What the input dist of one batch leaves for compute and output dist.

    Attributes:
        hot: the hot tier's context, None where no table has a hot row.
        cold: the cold tier's stock context, None for a hot batch and where no table has a cold row.
        divisor: float32 [B, sum of dims] or None; see `TieredIds`.
        sharding_contexts: as TorchRec's pipelines want them: one per awaitable, nothing for the hot tier's.
    """

    hot: HotContext | None = None
    cold: EmbeddingBagCollectionContext | None = None
    divisor: torch.Tensor | None = None
    sharding_contexts: list[EmbeddingShardingContext | None] = field(default_factory=list)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for part in (self.hot, self.cold, self.divisor):
            if part is not None:
                part.record_stream(stream)


class _TiersAwaitable(LazyGetItemMixin[str, torch.Tensor], LazyAwaitable[KeyedTensor]):
    """Waits for the cold tier's output dist and joins the tiers."""

    def __init__(
        self,
        lookups: list[Lookup],
        hot: torch.Tensor | None,
        cold: Awaitable[KeyedTensor] | None,
        in_order: PermutePooledEmbeddings | None,
        divisor: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self._lookups, self._hot, self._cold, self._in_order, self._divisor = lookups, hot, cold, in_order, divisor

    def _wait_impl(self) -> KeyedTensor:
        cold = None if self._cold is None else self._cold.wait().values()
        if cold is not None and self._in_order is not None:
            cold = self._in_order(cold)
        return combine_tiers(self._lookups, self._hot, cold, self._divisor)


class ShardedFAEEmbeddingBagCollection(ShardedEmbeddingModule[KJTList, list[torch.Tensor], KeyedTensor, FAEContext], FusedOptimizerModule):
    """Gives what the stock sharded collection gives, with its hot rows in a tier of their own.

    A raw batch goes through both tiers. A batch whose KeyedJaggedTensor is a `HotKeyedJaggedTensor` skips the cold tier whole: no cold
    input dist, no lookup, no output dist, forward or backward.

    Args:
        module: the stock collection, marked by `apply_optimizer_in_backward` if at all.
        plan: the cold tables' stock plan and the placement.
        env: the ranks.
        fused_params: the sharder's fused parameters.
        device: device of the hot tier and of the cold tier's kernels.
        qcomm_codecs_registry: quantized communication of the cold tier.
        module_fqn: name in traces.
    """

    def __init__(
        self,
        module: EmbeddingBagCollection,
        plan: FAEModuleShardingPlan,
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=qcomm_codecs_registry)
        self.placement = plan.placement
        self.module_sharding_plan = plan
        self._env = env
        self._module_fqn = module_fqn
        device = device or torch.device("cpu")
        configs = self._configs = module.embedding_bag_configs()
        self._kinds = {config.name: self.placement.kind(config.name) for config in configs}
        self.tier_split = TierSplit(configs, self.placement, device)
        hot, cold = (_tier(module, self.placement, hot=hot) for hot in (True, False))
        # The tiers stay out of nn.Module's registry (as stock keeps its lookups): names and state are the stock ones.
        self._hot = [ReplicatedHotTier(hot, fused_params, env, device)] if hot else []
        self._cold = (
            [ShardedEmbeddingBagCollection(cold, dict(plan), env, fused_params, device, qcomm_codecs_registry, module_fqn)] if cold else []
        )
        # Stock gives the columns of the cold tier in the order of its ranks.
        self._cold_in_order = self._cold_permutation(device)
        self._hot_lookups: list[nn.Module] = [lookup for tier in self._hot for lookup in tier.lookups]
        cold_lookups = [lookup for tier in self._cold for lookup in tier._lookups]
        self._lookups = [*self._hot_lookups, *cold_lookups]
        hot_ids = {
            name: torch.as_tensor(self.placement.hot_ids[name]).to(device) for name, kind in self._kinds.items() if kind is TableKind.SPLIT
        }
        self._homes = Homes(self._hot_lookups, cold_lookups, hot_ids, env.process_group)
        self._optim = self._fused_optimizer()
        self._register_stock_parameters()
        self._start_alike()
        if module.device.type not in ("meta", "cpu"):  # as stock: weights that already lie on the device are kept
            self.load_state_dict(module.state_dict(), strict=False)
        self._prime_cold_input_dist(device)

    def input_dist(self, ctx: FAEContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        """Splits the ids by tier and starts their exchange: the hot tier's first, then (not for a hot batch) the cold tier's.

        Args:
            ctx: filled for `compute_and_output_dist`.
            features: raw ids [F, B]; a HotKeyedJaggedTensor promises that all are hot.

        Raises:
            HotBatchError: on waiting, on every rank alike: a promise is broken or the ranks disagree about the kind.
        """
        promised_hot = isinstance(features, HotKeyedJaggedTensor)
        with torch.no_grad():
            ids = self.tier_split(features, promised_hot=promised_hot)
            ctx.divisor = ids.divisor
            awaitables: list[Awaitable[Awaitable[KeyedJaggedTensor]]] = []
            for tier in self._hot:
                ctx.hot = HotContext()
                awaitables.append(tier.input_dist(ctx.hot, ids.hot, ids.misses, promised_hot=promised_hot))
                ctx.sharding_contexts.append(None)
            if ids.cold is not None:
                for tier in self._cold:
                    ctx.cold = tier.create_context()
                    awaitables.extend(tier.input_dist(ctx.cold, ids.cold).awaitables)
                    ctx.sharding_contexts.extend(ctx.cold.sharding_contexts)
        return KJTListSplitsAwaitable(awaitables, ctx, self._module_fqn)

    def compute_and_output_dist(self, ctx: FAEContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """Looks up both tiers; the cold tier first, so that its output dist runs while the hot tier is looked up."""
        hot_input, cold_input = list(input)[: len(self._hot)], list(input)[len(self._hot) :]
        cold = self._cold[0].compute_and_output_dist(ctx.cold, KJTList(cold_input)) if ctx.cold is not None else None
        hot = self._hot[0].forward(ctx.hot, hot_input[0]) if ctx.hot is not None else None
        if hot is not None and hot.requires_grad:
            # The fused update follows in backward.
            hot.register_hook(lambda _: self._homes.hot_rows_change())  # type: ignore[no-untyped-call]
        return _TiersAwaitable(self.tier_split.lookups, hot, cold, self._cold_in_order, ctx.divisor)

    def compute(self, ctx: FAEContext, dist_input: KJTList) -> list[torch.Tensor]:
        """Not a step of its own here: the tiers overlap in `compute_and_output_dist`."""
        raise TypeError("call compute_and_output_dist: compute and output dist of the two tiers overlap and are not separate steps")

    def output_dist(self, ctx: FAEContext, output: list[torch.Tensor]) -> LazyAwaitable[KeyedTensor]:
        """Not a step of its own here: see `compute`."""
        raise TypeError("call compute_and_output_dist: compute and output dist of the two tiers overlap and are not separate steps")

    def prefetch(self, dist_input: KJTList, forward_stream: torch.Stream | None = None, ctx: FAEContext | None = None) -> None:
        """Prefetches the cold tier's cached rows (UVM caching); a hot batch has none."""
        for tier in self._cold:
            cold_input = list(dist_input)[len(self._hot) :]
            if cold_input:
                tier.prefetch(KJTList(cold_input), forward_stream)

    def create_context(self) -> FAEContext:
        """An empty context for one batch."""
        return FAEContext()

    @property
    def fused_optimizer(self) -> HotColdFusedOptimizer:
        """The stock-shaped optimizer of both tiers."""
        return self._optim

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        """The stock module this one stands for."""
        stock: type[nn.Module] = EmbeddingBagCollection
        return stock

    @property
    def _input_dists(self) -> list[nn.Module]:
        """The cold tier's stock input dists: TorchRec's pipelines fuse their splits exchange."""
        return [input_dist for tier in self._cold for input_dist in tier._input_dists]

    @_input_dists.setter
    def _input_dists(self, value: list[nn.Module]) -> None:
        assert not value, "set by the base class to an empty list only"

    def write_back(self) -> None:
        """Copies every hot row, weights and optimizer state, to its home, unless none has changed since. Local: no collective."""
        self._homes.write_back()

    def promote(self) -> None:
        """Copies every home to its hot row. Collective: all ranks take part."""
        self._homes.promote()

    def state_dict(
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The stock state: `embedding_bags.<table>.weight`, sharded as the stock plan; all-hot tables whole, as stock's data parallel."""
        state: dict[str, Any] = {} if destination is None else destination
        self.write_back()
        for tier in self._cold:
            tier.state_dict(destination=state, prefix=prefix, keep_vars=keep_vars)
        for name, weight in self._all_hot_weights():
            state[f"{prefix}embedding_bags.{name}.weight"] = weight
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> _IncompatibleKeys:
        """Loads a stock state (whole tensors, or sharded as this plan) and promotes the hot rows. Collective: all ranks take part.

        Optimizer state stays as it is, and so do tables that the state lacks (with `strict=False`).

        Raises:
            RuntimeError: a key is missing or unexpected (with `strict`), or a tensor has another shape than its table.
        """
        self._check_shapes(state_dict)
        self.write_back()  # what is not loaded must be current when homes are promoted
        rest = dict(state_dict)
        missing = []
        for name, weight in self._all_hot_weights():
            key = f"embedding_bags.{name}.weight"
            if key in rest:
                weight.copy_(self._whole(rest.pop(key), weight))
            else:
                missing.append(key)
        unexpected = list(rest)
        for tier in self._cold:
            result = tier.load_state_dict(rest, strict=False)
            missing += result.missing_keys
            unexpected = list(result.unexpected_keys)
        self.promote()
        if strict and (missing or unexpected):
            raise RuntimeError(f"state dict of {type(self).__name__} does not fit: missing keys {missing}, unexpected keys {unexpected}")
        return _IncompatibleKeys(missing, unexpected)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What a parent's `nn.Module.load_state_dict` would call, past `load_state_dict`: the hot rows would keep their old values."""
        raise RuntimeError(
            "the state of hot/cold tables was to be loaded by torch.nn.Module.load_state_dict of a parent module, which cannot promote hot "
            "rows; call DistributedModelParallel.load_state_dict, or load_state_dict of the sharded collection itself"
        )

    def _check_shapes(self, state_dict: Mapping[str, Any]) -> None:
        """Raises on every rank alike, before any collective, what stock would notice on the rank that holds the table alone."""
        for config in self._configs:
            key, shape = f"embedding_bags.{config.name}.weight", (config.num_embeddings, config.embedding_dim)
            if key not in state_dict:
                continue
            value = state_dict[key]
            given = tuple(value.metadata().size if isinstance(value, ShardedTensor) else value.shape)
            if given != shape:
                raise RuntimeError(f"{key}: received shape {given}, the table has {shape}; load a state of this model")

    def _whole(self, stock: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A tensor of a stock state, put together from all ranks where stock has it sharded."""
        if not isinstance(stock, ShardedTensor):
            return stock
        whole = torch.zeros_like(like)
        for shard in stock.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            whole[row : row + rows, column : column + columns] = shard.tensor
        sum_of_disjoint(whole, self._env.process_group)
        return whole

    def _all_hot_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for table in local_tables(self._hot_lookups):
            if self._kinds[table.table] is TableKind.HOT:
                yield table.table, table.weights

    def _fused_optimizer(self) -> HotColdFusedOptimizer:
        all_hot = [name for name, kind in self._kinds.items() if kind is TableKind.HOT]
        hot = [
            HotTierOptimizer(kernel.fused_optimizer, all_hot)
            for lookup in self._hot_lookups
            for kernel in lookup.modules()
            if isinstance(kernel, FusedOptimizerModule)
        ]
        cold = self._cold[0].fused_optimizer if self._cold else None
        return HotColdFusedOptimizer(hot, cold, self.write_back, self.promote)

    def _cold_permutation(self, device: torch.device) -> PermutePooledEmbeddings | None:
        """Brings the cold tier's columns into the order of the lookups."""
        want = {lookup.key: lookup.dim for lookup in self.tier_split.lookups if lookup.kind is not TableKind.HOT}
        # Private, and the keys of every KeyedTensor that the stock module (torchrec 1.8) gives; the 2-rank parity test fails if it moves.
        return block_permutation(self._cold[0]._embedding_names, list(want), want, device) if self._cold else None

    def _register_stock_parameters(self) -> None:
        """Registers `embedding_bags.<table>.weight` as stock does: the home of a split or cold table, the rows of an all-hot one."""
        lookups: list[Any] = self._hot_lookups
        hot = {name: weight for lookup in lookups for name, weight in lookup.named_parameters_by_table()}
        self.embedding_bags = nn.ModuleDict()
        for name, kind in self._kinds.items():
            holder = nn.Module()
            weight = hot[name] if kind is TableKind.HOT else self._cold[0].embedding_bags[name].weight
            holder.register_parameter("weight", weight)
            self.embedding_bags[name] = holder

    def _start_alike(self) -> None:
        """All-hot tables start as rank 0's (as stock's data parallel), hot rows of split tables as their homes."""
        start = {config.name: config.init_fn for config in self._configs}
        for name, weight in self._all_hot_weights():
            if self._env.rank == 0:
                start[name](weight)
            else:
                weight.zero_()
            sum_of_disjoint(weight, self._env.process_group)
        self.promote()

    def _prime_cold_input_dist(self, device: torch.device) -> None:
        """Runs one batch of empty bags through the cold input dist, which stock creates at its first batch.

        TorchRec's pipelines want it created once their first batch is in; theirs may be hot and never reach the cold tier.
        """
        for tier in self._cold:
            keys = [lookup.key for lookup in self.tier_split.lookups if lookup.kind is not TableKind.HOT]
            none = torch.empty(0, dtype=torch.int64, device=device)
            weights = none.to(torch.float32) if tier._is_weighted else None
            lengths = torch.zeros(len(keys), dtype=torch.int32, device=device)
            tier.input_dist(tier.create_context(), KeyedJaggedTensor(keys, none, weights, lengths)).wait().wait()


def _tier(module: EmbeddingBagCollection, placement: RowPlacement, *, hot: bool) -> EmbeddingBagCollection | None:
    """One tier's tables as a collection on the meta device, its parameters marked as the stock ones are; None without tables."""
    configs = tier_configs(module.embedding_bag_configs(), placement, hot=hot)
    if not configs:
        return None
    tier = EmbeddingBagCollection(configs, module.is_weighted(), torch.device("meta"))
    for config in configs:
        stock, weight = module.embedding_bags[config.name].weight, tier.embedding_bags[config.name].weight
        for mark in ("_optimizer_classes", "_optimizer_kwargs"):  # left by apply_optimizer_in_backward
            if hasattr(stock, mark):
                setattr(weight, mark, [dict(value) if isinstance(value, dict) else value for value in getattr(stock, mark)])
    return tier
