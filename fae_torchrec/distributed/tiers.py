"""The tiers of a sharded hot/cold collection as stock collections: what they hold, and how a batch goes through one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.types import Awaitable
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
class FAEContext(Multistreamable):
    """What the input dist of one batch leaves for compute and output dist.

    Attributes:
        ids: the batch's ids by tier.
        cold: the cold tier's stock context, None for a hot batch and where no table has a cold row.
        left: the stock context of the tables left to stock sharding, None where there are none.
        sharding_contexts: as TorchRec's pipelines want them: one per awaitable, None where a tier of ours has none.
    """

    ids: TieredIds | None = None
    cold: Multistreamable | None = None
    left: Multistreamable | None = None
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
