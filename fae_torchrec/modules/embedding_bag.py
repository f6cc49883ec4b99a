"""The unsharded hot/cold EmbeddingBagCollection: the reference for tests, for CPU inference and for use without a process group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind, TableSet
from fae_torchrec.modules.conversion import hot_rows_of, merge_into_stock
from fae_torchrec.modules.lookups import cold_configs, hot_groups
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.modules.pooling import TierJoin, join_groups
from fae_torchrec.modules.tier_split import BagSplit, HotBags


class FAEEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """A stock EmbeddingBagCollection whose hot rows lie in a tier of their own, perhaps on another device.

    Gives what the stock collection gives (up to rounding), for any batch. Its `state_dict` is the stock one: keys
    `embedding_bags.<table>.weight`, whole tables, both ways.

    Args:
        ebc: the stock collection; its weights are copied (unless it is on the meta device).
        placement: where the rows of its tables live.
        hot_device: device of the hot tier and of the output; ids are expected there. Default: the device of `ebc`.
        cold_device: device of the cold tier. Default: the device of `ebc`.

    Raises:
        ConfigError: a table's dtype or optimizer is not supported.
        FingerprintError: the placement lacks a table of `ebc`, or has it with other rows or features.
    """

    def __init__(
        self,
        ebc: EmbeddingBagCollection,
        placement: RowPlacement,
        hot_device: torch.device | None = None,
        cold_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        tables = model_tables(ebc)
        placed = TableSet(tuple(placement.tables[name] for name in tables.names if name in placement.tables.names))
        placed.check_same(tables, f"row placement {placement.fingerprint}")  # it may hold the tables of other collections too
        self._configs: list[EmbeddingBagConfig] = ebc.embedding_bag_configs()
        self._is_weighted: bool = ebc.is_weighted()
        self._device = hot_device or ebc.device
        self._kinds = {config.name: placement.kind(config.name) for config in self._configs}
        self._hot_ids = {config.name: torch.as_tensor(placement.hot_ids[config.name]) for config in self._configs}
        self._groups = hot_groups(self._configs, placement)
        self.tier_split = BagSplit(self._groups, self._configs, placement, self._device, BoundsCheckMode.FATAL)
        cold = cold_configs(self._configs, placement)
        columns = [key for config in cold for key in config.feature_names]
        self._join = TierJoin(self.tier_split.lookups, columns, [lookup.key for lookup in self.tier_split.cold_lookups], self._device)
        dtypes = {config.name: ebc.embedding_bags[config.name].weight.dtype for config in self._configs}
        self.hot = nn.ParameterList(
            torch.empty(group.num_slots, group.dim, device=self._device, dtype=dtypes[group.lookups[0].table]) for group in self._groups
        )
        self.cold = EmbeddingBagCollection(cold, self._is_weighted, cold_device or ebc.device) if cold else None
        self.register_state_dict_post_hook(_to_stock_keys)
        self.register_load_state_dict_pre_hook(_from_stock_keys)
        if ebc.device.type != "meta":
            self.load_state_dict(ebc.state_dict())

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pools raw ids through both tiers.

        Args:
            features: raw ids [F, B] on the hot device.

        Returns:
            KeyedTensor [B, sum of dims] on the hot device; its blocks are in the order of the hot groups.
        """
        ids = self.tier_split(features)
        parts = [_sum_bags(weight, bags) for weight, bags in zip(self.hot, ids.hot, strict=True)]
        cold = self.cold(ids.cold.to(self.cold.device)).values().to(self._device) if self.cold is not None else None
        return self._join.keyed(self._join(join_groups(parts, self._groups), cold, ids.cold_at, ids.lengths))

    def slots_of(self) -> Iterator[tuple[str, str, int, int]]:
        """Where each table's hot rows lie: (table, name of the parameter, first slot, hot rows)."""
        for number, group in enumerate(self._groups):
            first = 0
            for table, rows in group.tables:
                yield table, f"hot.{number}", first, rows
                first += rows

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The stock tables."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether batches carry a weight per id."""
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        """Device of the hot tier and of the output."""
        return self._device


def _sum_bags(weight: torch.Tensor, bags: HotBags) -> torch.Tensor:
    if not weight.shape[0]:  # embedding_bag refuses an empty table; a group of all-cold tables
        return weight.new_zeros(bags.offsets.numel() - 1, weight.shape[1])
    weights = None if bags.weights is None else bags.weights.to(weight.dtype)
    sums: torch.Tensor = torch.nn.functional.embedding_bag(
        bags.slots, weight, bags.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
    return sums


def _to_stock_keys(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    """State dict hook: whole stock tables in place of the two tiers."""
    assert isinstance(module, FAEEmbeddingBagCollection)
    hot = {table: state[prefix + name][first : first + rows] for table, name, first, rows in module.slots_of()}
    cold = {table: state.pop(f"{prefix}cold.embedding_bags.{table}.weight", None) for table in module._kinds}
    for number in range(len(module.hot)):
        del state[f"{prefix}hot.{number}"]
    for table, kind in module._kinds.items():
        if kind is TableKind.SPLIT:
            weight = merge_into_stock(cold[table].detach(), hot[table].detach(), module._hot_ids[table])
        else:
            weight = hot[table] if kind is TableKind.HOT else cold[table]
        state[f"{prefix}embedding_bags.{table}.weight"] = weight


def _from_stock_keys(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _metadata: dict[str, Any],
    _strict: bool,
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Load hook: the two tiers in place of whole stock tables; a table that is missing or has another shape keeps its rows."""
    assert isinstance(module, FAEEmbeddingBagCollection)
    weights = dict(module.named_parameters())
    stock: dict[str, torch.Tensor] = {}
    for config in module.embedding_bag_configs():
        key, shape = f"{prefix}embedding_bags.{config.name}.weight", (config.num_embeddings, config.embedding_dim)
        if key not in state:
            missing.append(key)
        elif tuple(state[key].shape) != shape:
            errors.append(f"size mismatch for {key}: received shape {tuple(state[key].shape)}, the table has {shape}")
        else:
            stock[config.name] = state[key]
        state.pop(key, None)
    state.update({f"{prefix}hot.{number}": weight.detach().clone() for number, weight in enumerate(module.hot)})
    for table, name, first, rows in module.slots_of():
        if table in stock:
            state[prefix + name][first : first + rows] = hot_rows_of(stock[table], module._hot_ids[table])
    for table, kind in module._kinds.items():
        if kind is not TableKind.HOT:
            name = f"cold.embedding_bags.{table}.weight"
            state[prefix + name] = stock.get(table, weights[name].detach())
