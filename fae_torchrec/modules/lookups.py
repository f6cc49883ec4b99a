"""The lookups of a collection and the groups of its hot tables: the order of everything that the two tiers exchange."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind

TableConfig: TypeAlias = EmbeddingBagConfig | EmbeddingConfig
"""A stock table of an EmbeddingBagCollection (pooled) or of an EmbeddingCollection (not pooled)."""


@dataclass(frozen=True)
class Lookup:
    """One (table, feature) pair: a column block of a pooled output, a sequence of rows of an unpooled one.

    Attributes:
        table: table name.
        feature: key of the KeyedJaggedTensor that feeds it.
        name: the stock name of what it gives: the feature, or `feature@table` where tables share the feature.
        key: unique key of the pair inside the tiers.
        dim: columns of the block.
        mean: whether its bags are averaged.
        kind: where the table's rows live.
    """

    table: str
    feature: str
    name: str
    key: str
    dim: int
    mean: bool
    kind: TableKind


@dataclass(frozen=True)
class HotGroup:
    """Tables that are alike enough (dim, dtype, optimizer) for their hot rows to lie in one kernel's table, one after the other.

    Attributes:
        dim: columns of every table.
        tables: names and hot rows of the tables that have hot rows; slots are numbered over them in this order.
        lookups: of these tables, and of all-cold tables of the same dim: their bags are empty here and have room in the output.
    """

    dim: int
    tables: tuple[tuple[str, int], ...]
    lookups: tuple[Lookup, ...]

    @property
    def num_slots(self) -> int:
        """Hot rows of all tables."""
        return sum(rows for _, rows in self.tables)


def hot_groups(
    configs: Sequence[TableConfig], placement: RowPlacement, alike: Callable[[TableConfig], Hashable] | None = None
) -> list[HotGroup]:
    """Groups the tables of one collection.

    Args:
        configs: the stock tables of the collection; those that the placement does not know are left out, but share their features' names.
        placement: where the rows of the others live.
        alike: what tables of one group have in common besides dim and dtype, such as their optimizer.

    Returns:
        The groups; the output's blocks are their lookups in order, group by group.
    """
    names = stock_names(configs)
    configs = [config for config in configs if config.name in placement.tables.names]
    lookups = {config.name: _lookups(config, names, placement) for config in configs}
    members: dict[Hashable, list[TableConfig]] = {}
    for config in configs:
        if placement.hot_rows(config.name):
            key = (config.embedding_dim, config.data_type, alike(config) if alike else None)
            members.setdefault(key, []).append(config)
    for config in configs:
        if not placement.hot_rows(config.name):
            same_dim = (key for key, tables in members.items() if tables[0].embedding_dim == config.embedding_dim)
            members.setdefault(next(same_dim, ("all cold", config.embedding_dim)), []).append(config)
    return [
        HotGroup(
            dim=tables[0].embedding_dim,
            tables=tuple((config.name, placement.hot_rows(config.name)) for config in tables if placement.hot_rows(config.name)),
            lookups=tuple(lookup for config in tables for lookup in lookups[config.name]),
        )
        for tables in members.values()
    ]


def cold_configs(configs: Sequence[TableConfig], placement: RowPlacement) -> list[TableConfig]:
    """The cold tier as stock tables: split and all-cold tables, at full size.

    Pooling is always SUM: the tiers add up, and a mean is divided once by the length of the whole bag. Features are named by lookup
    (`feature@table`), so that no two tables share one.
    """
    placed = [config for config in configs if config.name in placement.tables.names]
    return [tier_config(config, config.num_embeddings) for config in placed if placement.kind(config.name) is not TableKind.HOT]


def tier_config(config: TableConfig, rows: int) -> TableConfig:
    """One table as a tier holds it: that many rows, summing, with features named by lookup; the rest stays the stock table's."""
    features = [f"{feature}@{config.name}" for feature in config.feature_names]
    if isinstance(config, EmbeddingBagConfig):
        return replace(config, num_embeddings=rows, feature_names=features, pooling=PoolingType.SUM)
    return replace(config, num_embeddings=rows, feature_names=features)


def stock_names(configs: Sequence[TableConfig]) -> dict[str, str]:
    """What the stock collection calls the output of each lookup, by the lookup's key `feature@table`."""
    by_table: list[list[str]] = get_embedding_names_by_table(list(configs))
    return {
        f"{feature}@{config.name}": name
        for config, names in zip(configs, by_table, strict=True)
        for feature, name in zip(config.feature_names, names, strict=True)
    }


def _lookups(config: TableConfig, names: Mapping[str, str], placement: RowPlacement) -> list[Lookup]:
    mean = isinstance(config, EmbeddingBagConfig) and config.pooling is PoolingType.MEAN
    keys = [f"{feature}@{config.name}" for feature in config.feature_names]
    return [
        Lookup(config.name, feature, names[key], key, config.embedding_dim, mean, placement.kind(config.name))
        for feature, key in zip(config.feature_names, keys, strict=True)
    ]
