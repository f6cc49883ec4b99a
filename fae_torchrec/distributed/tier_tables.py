"""The tiers' tables as unsharded stock collections on the meta device, marked with the optimizers of the collection they stand for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from fae_torchrec.modules.lookups import HotGroup, TableConfig
from fae_torchrec.modules.model_tables import table_configs, table_weights

Collection: TypeAlias = EmbeddingBagCollection | EmbeddingCollection
_MARKS = ("_optimizer_classes", "_optimizer_kwargs")  # left by apply_optimizer_in_backward


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


def merged_tables(stock: Collection, groups: Sequence[HotGroup], spare: Sequence[int]) -> EmbeddingBagCollection:
    """One table per group that has slots: a row of zeros for cold ids, then the hot rows, one table's after the other's, then spare ones.

    On the meta device, marked as stock's.

    Args:
        stock: the unsharded stock collection.
        groups: of its tables.
        spare: rows behind the hot ones, by group.
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
                num_embeddings=1 + group.num_slots + spare[number],
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
