"""The unsharded hot/cold EmbeddingBagCollection: the reference for tests, for CPU inference and for use without a process group."""

from __future__ import annotations

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.modules.bag_split import BagSplit
from fae_torchrec.modules.hot_cold_collection import HotColdCollection
from fae_torchrec.modules.pooling import TierJoin, join_groups


class FAEEmbeddingBagCollection(HotColdCollection, EmbeddingBagCollectionInterface):
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

    prefix = "embedding_bags"

    def __init__(
        self,
        ebc: EmbeddingBagCollection,
        placement: RowPlacement,
        hot_device: torch.device | None = None,
        cold_device: torch.device | None = None,
    ) -> None:
        def new_cold_tier(tables: list[EmbeddingBagConfig], device: torch.device) -> EmbeddingBagCollection:
            return EmbeddingBagCollection(tables, ebc.is_weighted(), device)

        super().__init__(ebc, placement, hot_device, cold_device, new_cold_tier)
        self._configs: list[EmbeddingBagConfig] = ebc.embedding_bag_configs()
        self._is_weighted: bool = ebc.is_weighted()
        self.tier_split = BagSplit(self._groups, self._configs, placement, self._device, BoundsCheckMode.FATAL)
        columns = [] if self.cold is None else [key for config in self.cold.embedding_bag_configs() for key in config.feature_names]
        self._join = TierJoin(self.tier_split.lookups, columns, [lookup.key for lookup in self.tier_split.cold_lookups], self._device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pools raw ids through both tiers.

        Args:
            features: raw ids [F, B] on the hot device.

        Returns:
            KeyedTensor [B, sum of dims] on the hot device; its blocks are in the order of the hot groups.
        """
        ids = self.tier_split(features)
        cold = self.cold(ids.cold.to(self.cold.device)).values().to(self._device) if self.cold is not None else None
        units = None if ids.cold_at is None else self._join.units(ids.cold_at)
        return self._join.keyed(self._join(join_groups(self.sum_hot(ids.hot), self._groups), cold, units, ids.lengths))

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The stock tables."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether batches carry a weight per id."""
        return self._is_weighted
