"""The tiers of a sharded hot/cold collection as stock collections: what they hold, and how a batch goes through one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import Awaitable, LazyAwaitable
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Multistreamable

from fae_torchrec.modules.lookups import HotGroup, TableConfig
from fae_torchrec.modules.model_tables import table_configs, table_weights
from fae_torchrec.modules.tier_split import TieredIds

Collection: TypeAlias = EmbeddingBagCollection | EmbeddingCollection
_MARKS = ("_optimizer_classes", "_optimizer_kwargs")  # left by apply_optimizer_in_backward


@dataclass
class RowsAhead:
    """Cold rows that were looked up before their batch's turn.

    Attributes:
        loads: how often weights had been loaded by then: rows from before a load are not used.
        resume: makes kernels count a step as the current one (`StepCount.resume`).
        output: the stock collection's output, on its way.
        step: the batch's own step, known at its turn; its update belongs to it.
    """

    loads: int
    resume: Callable[[int], None]
    output: LazyAwaitable[Any] | None = None
    step: int = 0

    def take(self, step: int) -> LazyAwaitable[Any]:
        """The output, at the batch's turn."""
        assert self.output is not None
        self.step = step
        return self.output


@dataclass
class FAEContext(Multistreamable):
    """What the input dist of one batch leaves for compute and output dist.

    Attributes:
        ids: the batch's ids by tier.
        cold: the cold tier's stock context, None for a hot batch and where no table has a cold row.
        left: the stock context of the tables left to stock sharding, None where there are none.
        ahead: the cold rows, where they were looked up before the batch's turn.
        sharding_contexts: as TorchRec's pipelines want them: one per awaitable, None where a tier of ours has none.
    """

    ids: TieredIds | None = None
    cold: Multistreamable | None = None
    left: Multistreamable | None = None
    ahead: RowsAhead | None = None
    sharding_contexts: list[EmbeddingShardingContext | None] = field(default_factory=list)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for part in (self.ids, self.cold, self.left):
            if part is not None:
                part.record_stream(stream)


class StockTier:
    """A stock sharded collection as a part of ours: the cold tier, or the tables left to stock sharding.

    Kept out of nn.Module's registry (as stock keeps its lookups): names and state are those of the whole collection.

    Args:
        module: the sharded stock module.
        tables: its tables.
        keys: keys of every batch it gets, in this order; stock remembers the order of its first.
    """

    def __init__(self, module: Any, tables: Sequence[TableConfig], keys: Sequence[str]) -> None:
        self.module = module
        self.tables = [table.name for table in tables]
        self.keys = list(keys)

    def input_dist(self, ctx: FAEContext, features: KeyedJaggedTensor) -> tuple[Multistreamable, list[Awaitable[Any]]]:
        """Starts the input dist of one batch.

        Returns:
            The stock context, whose sharding contexts are added to `ctx`, and the awaitables.
        """
        stock = self.module.create_context()
        awaitables = self.module.input_dist(stock, features).awaitables
        ctx.sharding_contexts.extend(stock.sharding_contexts)
        return stock, awaitables

    def look_ahead(self, stock: Multistreamable, inputs: KJTList, ahead: RowsAhead) -> None:
        """Looks a coming batch up and starts its output dist, as far as values go; its update keeps its own turn. Collective.

        A fused kernel takes learning rate and step count at its forward, which would be those of an earlier step here. So the lookup is
        made without gradient, and backward makes the forward that its update needs.

        Args:
            stock: the batch's stock context.
            inputs: what its input dist gave.
            ahead: gets the output.
        """
        lookups = self.module._lookups
        self.module._lookups = [_LookupAhead(lookup, ahead) for lookup in lookups]
        try:
            ahead.output = self.module.compute_and_output_dist(stock, inputs)
        finally:
            self.module._lookups = lookups

    def prefetch(self, inputs: KJTList, forward_stream: torch.Stream | None) -> None:
        """The stock prefetch into caches, if kernels lock what they prefetch (`prefetch_pipeline` in fused_params), as TorchRec asks."""
        if all(kernel.prefetch_pipeline for kernel in self._kernels()):
            self.module.prefetch(inputs, forward_stream)

    def forget_prefetched(self) -> None:
        """Takes back what `prefetch` announced to FBGEMM's cached kernels and no forward has used: the next forward is another batch's.

        The rows stay in the cache, unlocked. Written for CUDA (FBGEMM 1.8's private lists), not yet run there.
        """
        for kernel in self._kernels():
            for locations in kernel.lxu_cache_locations_list if kernel.prefetch_pipeline else []:
                torch.ops.fbgemm.lxu_cache_locking_counter_decrement(kernel.lxu_cache_locking_counter, locations)
            kernel.lxu_cache_locations_list.clear()
            kernel.timesteps_prefetched.clear()

    def _kernels(self) -> list[Any]:
        modules = (module for lookup in self.module._lookups for module in lookup.modules())
        return [module for module in modules if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)]

    @property
    def num_inputs(self) -> int:
        """Awaitables that an input dist gives: one per sharding type."""
        return len(self.module._input_dists)

    def prime(self, device: torch.device, *, weighted: bool) -> None:
        """Runs one batch of empty bags through the input dist, which stock creates at its first batch.

        TorchRec's pipelines want it created once their first batch is in; theirs may be hot and never reach the cold tier.
        """
        none = torch.empty(0, dtype=torch.int64, device=device)
        weights = none.to(torch.float32) if weighted else None
        lengths = torch.zeros(len(self.keys), dtype=torch.int32, device=device)
        ctx = self.module.create_context()
        self.module.input_dist(ctx, KeyedJaggedTensor(self.keys, none, weights, lengths)).wait().wait()


class _LookupAhead:
    """Stands for a stock lookup while a batch is looked up ahead."""

    def __init__(self, lookup: nn.Module, ahead: RowsAhead) -> None:
        self._lookup, self._ahead = lookup, ahead

    def __call__(self, features: KeyedJaggedTensor) -> torch.Tensor:
        anchor = torch.empty(0, device=features.device(), requires_grad=True)  # what makes autograd call the backward
        values: torch.Tensor = _ValuesAhead.apply(anchor, self._lookup, self._ahead, features)  # type: ignore[no-untyped-call]
        return values


class _ValuesAhead(torch.autograd.Function):
    """A lookup's values, whose backward is that of a lookup made in backward."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, lookup: nn.Module, ahead: RowsAhead, features: KeyedJaggedTensor) -> torch.Tensor:
        ctx.lookup, ctx.ahead, ctx.features = lookup, ahead, features
        values: torch.Tensor = lookup(features)
        return values.detach()  # a rank without a table gives a buffer of its own

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
        ctx.ahead.resume(ctx.ahead.step)
        with torch.enable_grad():
            values = ctx.lookup(ctx.features)
        values.backward(grad)
        return None, None, None, None


def optimizer_key(weight: nn.Parameter) -> Hashable:
    """What two tables that share a kernel must have in common: the fused optimizer that `apply_optimizer_in_backward` marked."""
    return repr([getattr(weight, mark, None) for mark in _MARKS])


def tier_collection(stock: Collection, configs: Sequence[TableConfig], like: Mapping[str, str] | None = None) -> Collection:
    """A collection of one tier's tables on the meta device, its parameters marked as the stock ones are.

    Args:
        stock: the unsharded stock collection.
        configs: the tier's tables.
        like: by table, the stock table whose mark it takes. Default: that of the same name.
    """
    meta = torch.device("meta")
    if isinstance(stock, EmbeddingBagCollection):
        tier: Collection = EmbeddingBagCollection(list(configs), stock.is_weighted(), meta)
    else:
        tier = EmbeddingCollection(list(configs), meta, need_indices=False)
    _mark(table_weights(tier), table_weights(stock), like)
    return tier


def merged_tables(stock: Collection, groups: Sequence[HotGroup]) -> EmbeddingBagCollection:
    """One table per group that has slots: a row of zeros for cold ids, then the hot rows, one table's after the other's.

    On the meta device, marked as stock's.
    """
    dtypes = {config.name: config.data_type for config in table_configs(stock)}
    merged, like = [], {}
    for number, group in enumerate(groups):
        if not group.num_slots:
            continue
        name = f"hot{number}"
        like[name] = group.tables[0][0]
        merged.append(
            EmbeddingBagConfig(
                name=name,
                embedding_dim=group.dim,
                num_embeddings=group.num_slots + 1,
                feature_names=[name],
                pooling=PoolingType.SUM,
                data_type=dtypes[like[name]],
            )
        )
    tables = EmbeddingBagCollection(merged, False, torch.device("meta"))
    _mark(table_weights(tables), table_weights(stock), like)
    return tables


def left_configs(stock: Collection, placed: Sequence[str]) -> list[TableConfig]:
    """The tables that the placement does not know and that stay stock's, with features named by lookup (`feature@table`)."""
    return [
        replace(config, feature_names=[f"{feature}@{config.name}" for feature in config.feature_names])
        for config in table_configs(stock)
        if config.name not in placed
    ]


def _mark(weights: Mapping[str, nn.Parameter], stock: Mapping[str, nn.Parameter], like: Mapping[str, str] | None) -> None:
    for table, weight in weights.items():
        source = stock[like[table] if like else table]
        for mark in _MARKS:
            if hasattr(source, mark):
                setattr(weight, mark, [dict(value) if isinstance(value, dict) else value for value in getattr(source, mark)])
