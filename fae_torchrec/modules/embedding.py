"""The unsharded hot/cold EmbeddingCollection: the reference for tests, for CPU inference and for use without a process group."""

from __future__ import annotations

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection, EmbeddingCollectionInterface, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.modules.hot_cold_collection import HotColdCollection
from fae_torchrec.modules.lookups import stock_names
from fae_torchrec.modules.sequence_split import SequenceSplit, join_rows


class FAEEmbeddingCollection(HotColdCollection, EmbeddingCollectionInterface):
    """A stock EmbeddingCollection whose hot rows lie in a tier of their own, perhaps on another device.

    Gives what the stock collection gives, for any batch. Its `state_dict` is the stock one: keys `embeddings.<table>.weight`, whole
    tables, both ways.

    Args:
        ec: the stock collection; its weights are copied (unless it is on the meta device).
        placement: where the rows of its tables live.
        hot_device: device of the hot tier and of the output; ids are expected there. Default: the device of `ec`.
        cold_device: device of the cold tier. Default: the device of `ec`.

    Raises:
        ConfigError: a table's dtype or optimizer is not supported, or `ec` was made with `need_indices`.
        FingerprintError: the placement lacks a table of `ec`, or has it with other rows or features.
    """

    prefix = "embeddings"

    def __init__(
        self,
        ec: EmbeddingCollection,
        placement: RowPlacement,
        hot_device: torch.device | None = None,
        cold_device: torch.device | None = None,
    ) -> None:
        if ec.need_indices():
            raise ConfigError(
                f"the EmbeddingCollection of tables {[config.name for config in ec.embedding_configs()]} has need_indices=True, which "
                "hot/cold tables do not support; make it with need_indices=False"
            )
        super().__init__(ec, placement, hot_device, cold_device, EmbeddingCollection)
        self._configs: list[EmbeddingConfig] = ec.embedding_configs()
        self._names = stock_names(self._configs)
        self.tier_split = SequenceSplit(self._groups, self._configs, placement, self._device, BoundsCheckMode.FATAL)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Looks raw ids up in both tiers.

        Args:
            features: raw ids [F, B] on the hot device.

        Returns:
            By stock name, in the order of the tables: a row [dim] float32 for every id, on the hot device, and the batch's lengths.
        """
        ids = self.tier_split(features)
        hot = torch.cat([rows.float() for rows in self.sum_hot(ids.hot)])
        cold = self.cold(ids.cold.to(self.cold.device)) if self.cold is not None else None
        rows = join_rows(hot, cold, ids)
        by_lookup = ids.by_lookup(rows, self.tier_split.lookups)
        return {name: by_lookup[key] for key, name in self._names.items()}

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The stock tables."""
        return self._configs

    def need_indices(self) -> bool:
        """Whether the output carries the ids: never."""
        return False

    def embedding_dim(self) -> int:
        """Columns of every table."""
        return int(self._configs[0].embedding_dim)

    def embedding_names_by_table(self) -> list[list[str]]:
        """The names of the output, by table."""
        names: list[list[str]] = get_embedding_names_by_table(self._configs)
        return names
