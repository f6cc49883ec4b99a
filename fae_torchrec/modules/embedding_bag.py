"""The unsharded hot/cold EmbeddingBagCollection: the reference for tests, for CPU inference and for use without a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind, TableSet
from fae_torchrec.modules.conversion import hot_rows_of, merge_into_stock
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.modules.pooling import combine_tiers
from fae_torchrec.modules.tier_split import TierSplit, tier_configs


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
        self._rows = {config.name: config.num_embeddings for config in self._configs}
        self._kinds = {config.name: placement.kind(config.name) for config in self._configs}
        self._hot_ids = {config.name: torch.as_tensor(placement.hot_ids[config.name]) for config in self._configs}
        self.tier_split = TierSplit(self._configs, placement, self._device)
        hot, cold = (tier_configs(self._configs, placement, hot=hot) for hot in (True, False))
        self.hot = EmbeddingBagCollection(hot, self._is_weighted, self._device) if hot else None
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
            KeyedTensor [B, sum of dims] on the hot device; blocks of all-hot tables first, then split, then all-cold.
        """
        ids = self.tier_split(features)
        hot = self.hot(ids.hot).values() if self.hot is not None else None
        cold = self.cold(ids.cold.to(self.cold.device)).values().to(self._device) if self.cold is not None else None
        return combine_tiers(self.tier_split.lookups, hot, cold, ids.divisor)

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


def _tier_key(prefix: str, tier: str, table: str) -> str:
    return f"{prefix}{tier}.embedding_bags.{table}.weight"


def _to_stock_keys(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    """State dict hook: whole stock tables in place of the two tiers."""
    assert isinstance(module, FAEEmbeddingBagCollection)
    for table, kind in module._kinds.items():
        hot = state.pop(_tier_key(prefix, "hot", table), None)
        cold = state.pop(_tier_key(prefix, "cold", table), None)
        if kind is TableKind.SPLIT:
            weight = merge_into_stock(cold.detach(), hot.detach(), module._hot_ids[table])
        else:
            weight = hot if kind is TableKind.HOT else cold
        state[f"{prefix}embedding_bags.{table}.weight"] = weight


def _from_stock_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: the two tiers in place of whole stock tables."""
    assert isinstance(module, FAEEmbeddingBagCollection)
    for table, kind in module._kinds.items():
        weight = state.pop(f"{prefix}embedding_bags.{table}.weight", None)
        if weight is None:
            continue  # load_state_dict reports the tiers' keys as missing
        # Whole tables go to the tier that holds as many rows, so that load_state_dict reports another shape.
        state[_tier_key(prefix, "hot" if kind is TableKind.HOT else "cold", table)] = weight
        if kind is TableKind.SPLIT and len(weight) == module._rows[table]:
            state[_tier_key(prefix, "hot", table)] = hot_rows_of(weight, module._hot_ids[table])
