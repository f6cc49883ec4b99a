"""TierSplit sends every id of a KeyedJaggedTensor to its tier: hot ids become slots, cold ids stay at their home."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind


@dataclass(frozen=True)
class Lookup:
    """One (table, feature) pair: a column block of the output.

    Attributes:
        table: table name.
        feature: key of the KeyedJaggedTensor that feeds it.
        name: the stock name of the output block: the feature, or `feature@table` where tables share the feature.
        key: unique key of the pair inside the tiers.
        dim: columns of the block.
        pooling: the pooling of the stock table.
        kind: where the table's rows live.
    """

    table: str
    feature: str
    name: str
    key: str
    dim: int
    pooling: PoolingType
    kind: TableKind


def lookups_by_tier(configs: Sequence[EmbeddingBagConfig], placement: RowPlacement) -> list[Lookup]:
    """Lists the lookups of a collection: those of all-hot tables first, then of split, then of all-cold tables.

    This is the order of the output's blocks: hot columns and cold columns overlap in the split ones alone, so that one slice of each
    is added and nothing is permuted.

    Args:
        configs: the stock tables of one EmbeddingBagCollection.
        placement: where their rows live.
    """
    lookups = [
        Lookup(config.name, feature, name, f"{feature}@{config.name}", config.embedding_dim, config.pooling, placement.kind(config.name))
        for config, names in zip(configs, get_embedding_names_by_table(list(configs)), strict=True)
        for feature, name in zip(config.feature_names, names, strict=True)
    ]
    return [lookup for kind in TableKind for lookup in lookups if lookup.kind is kind]


def tier_configs(configs: Iterable[EmbeddingBagConfig], placement: RowPlacement, *, hot: bool) -> list[EmbeddingBagConfig]:
    """The tables of one tier as stock configs, all-hot tables first, then split, then all-cold.

    Pooling is always SUM: the tiers add up, and a mean is divided once at the end by the length of the whole bag. Features are
    named by lookup (`feature@table`), so that no two tables of a tier share one.

    Args:
        configs: the stock tables.
        placement: where their rows live.
        hot: the hot tier (tables with hot rows, `num_embeddings` = hot rows) or the cold one (split and cold tables at full size).
    """
    kinds = (TableKind.HOT, TableKind.SPLIT) if hot else (TableKind.SPLIT, TableKind.COLD)
    tables = list(configs)
    return [
        replace(  # the rest, such as the initial values, stays the stock table's
            config,
            num_embeddings=placement.hot_rows(config.name) if hot else config.num_embeddings,
            feature_names=[f"{feature}@{config.name}" for feature in config.feature_names],
            pooling=PoolingType.SUM,
        )
        for kind in kinds
        for config in tables
        if placement.kind(config.name) is kind
    ]


@dataclass(frozen=True)
class TieredIds:
    """One batch's ids, by tier.

    Attributes:
        hot: slots in the hot tables, keys = hot and split lookups, or None where the placement has no hot row.
        cold: ids in the cold tables (their homes), keys = split and cold lookups, or None where no table has a cold row, and for a
            batch promised to be hot.
        misses: int64 [1]: ids that are not hot in a batch promised to be hot (0 when the promise was kept); 0 for other batches.
        divisor: float32 [B, sum of dims]: under each output column the length of its bag (at least 1) for MEAN lookups and 1 for
            SUM; None where every lookup is SUM.
    """

    hot: KeyedJaggedTensor | None
    cold: KeyedJaggedTensor | None
    misses: torch.Tensor
    divisor: torch.Tensor | None


class TierSplit(nn.Module):
    """Splits a KeyedJaggedTensor by tier, on whatever device it lies, in a fixed number of tensor operations.

    The index of hot rows is one sorted tensor of int64 keys over all split tables (8 bytes a hot row; all-hot tables need none: their
    slots are their ids), searched by bisection: smaller than a hash table, and the same on every device.

    Args:
        configs: the stock tables of one EmbeddingBagCollection.
        placement: where their rows live.
        device: where the index lies; ids must be on the same device.
    """

    hot_keys: torch.Tensor
    key_base: torch.Tensor
    slot_base: torch.Tensor
    slot_count: torch.Tensor
    mean: torch.Tensor
    lookup_of_column: torch.Tensor

    def __init__(self, configs: Sequence[EmbeddingBagConfig], placement: RowPlacement, device: torch.device) -> None:
        super().__init__()
        self.lookups = lookups_by_tier(configs, placement)
        by_kind = {kind: [lookup for lookup in self.lookups if lookup.kind is kind] for kind in TableKind}
        self._sizes = [len(by_kind[kind]) for kind in (TableKind.HOT, TableKind.SPLIT, TableKind.COLD)]
        self._hot_lookup_keys = [lookup.key for kind in (TableKind.HOT, TableKind.SPLIT) for lookup in by_kind[kind]]
        self._cold_lookup_keys = [lookup.key for kind in (TableKind.SPLIT, TableKind.COLD) for lookup in by_kind[kind]]
        self._mean = [lookup.pooling is PoolingType.MEAN for lookup in self.lookups]
        self._order: tuple[list[str], list[int], torch.Tensor] | None = None

        split_tables = [config for config in configs if placement.kind(config.name) is TableKind.SPLIT]
        rows = torch.tensor([0, *(config.num_embeddings for config in split_tables)]).cumsum(0)
        slots = torch.tensor([0, *(placement.hot_rows(config.name) for config in split_tables)]).cumsum(0)
        hot_ids = [torch.as_tensor(placement.hot_ids[config.name]) + rows[i] for i, config in enumerate(split_tables)]
        position = {config.name: i for i, config in enumerate(split_tables)}
        index = torch.tensor([position[lookup.table] for lookup in by_kind[TableKind.SPLIT]], dtype=torch.int64)
        buffers = {
            "hot_keys": torch.cat(hot_ids) if hot_ids else torch.empty(0, dtype=torch.int64),
            "key_base": rows[index],
            "slot_base": slots[index],
            "slot_count": slots[index + 1] - slots[index],
            "mean": torch.tensor(self._mean),
            "lookup_of_column": torch.arange(len(self.lookups)).repeat_interleave(torch.tensor([x.dim for x in self.lookups])),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(device), persistent=False)

    @property
    def index_bytes(self) -> int:
        """Bytes of fast memory the index itself takes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def forward(self, features: KeyedJaggedTensor, *, promised_hot: bool = False) -> TieredIds:
        """Splits one batch.

        Args:
            features: raw ids [F features, B samples], any integer dtype, weights kept; features that no table uses are ignored.
            promised_hot: the batch is promised to be hot; the promise is counted against (`misses`), not trusted.

        Raises:
            DataError: a feature of a table is missing, or the batch has a variable stride.
        """
        if features.variable_stride_per_key():
            raise DataError(
                "received a KeyedJaggedTensor with a batch size per feature (variable stride), which hot/cold tables do not support; "
                "pass the same number of bags for every feature, or leave these tables to stock sharding"
            )
        order, order_tensor = self._permutation(features)
        hot_only, split, cold_only = features.permute(order, order_tensor).split(self._sizes)
        divisor = self._divisor(hot_only, split, cold_only) if any(self._mean) else None
        slots, is_hot = self._find(split)
        if promised_hot:
            misses = (~is_hot).sum().reshape(1) + cold_only.values().numel()
            return TieredIds(_concat(self._hot_lookup_keys, hot_only, _replace(split, slots)), None, misses, divisor)
        split_hot, split_cold = _partition(split, slots, is_hot)
        return TieredIds(
            hot=_concat(self._hot_lookup_keys, hot_only, split_hot),
            cold=_concat(self._cold_lookup_keys, split_cold, cold_only),
            misses=torch.zeros(1, dtype=torch.int64, device=features.device()),
            divisor=divisor,
        )

    def _permutation(self, features: KeyedJaggedTensor) -> tuple[list[int], torch.Tensor]:
        """The permutation from the batch's features to the lookups; computed once for a given order of keys."""
        keys = features.keys()
        if self._order is None or self._order[0] != keys or self._order[2].device != features.device():
            missing = sorted({lookup.feature for lookup in self.lookups} - set(keys))
            if missing:
                raise DataError(f"the batch lacks the features {missing}; it has {keys}; feed every feature of the tables")
            position = {key: i for i, key in enumerate(keys)}
            order = [position[lookup.feature] for lookup in self.lookups]
            self._order = (list(keys), order, torch.tensor(order, dtype=torch.int32, device=features.device()))
        return self._order[1], self._order[2]

    def _find(self, split: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot of each id of the split lookups (0 where it is not hot), and whether it is hot."""
        values = split.values()
        if self._sizes[1] == 0:
            return values, torch.ones_like(values, dtype=torch.bool)
        counts = torch.tensor(split.length_per_key(), device=values.device)
        lookup = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts, output_size=values.numel())
        keys = values + self.key_base[lookup]
        found = torch.searchsorted(self.hot_keys, keys)
        slots = found - self.slot_base[lookup]
        # The bounds keep an id beyond its table's rows from matching the next table's key; the cold tier then treats it as stock does.
        in_table = (slots >= 0) & (slots < self.slot_count[lookup])
        is_hot = in_table & (self.hot_keys[found.clamp(max=self.hot_keys.numel() - 1)] == keys)
        return torch.where(is_hot, slots, 0).to(values.dtype), is_hot

    def _divisor(self, *parts: KeyedJaggedTensor) -> torch.Tensor:
        lengths = torch.cat([part.lengths() for part in parts]).view(len(self.lookups), -1).to(torch.float32).clamp(min=1)
        divisor = torch.where(self.mean.unsqueeze(1), lengths, torch.ones_like(lengths))
        return divisor.index_select(0, self.lookup_of_column).t()


def _partition(split: KeyedJaggedTensor, slots: torch.Tensor, is_hot: torch.Tensor) -> tuple[KeyedJaggedTensor, KeyedJaggedTensor]:
    """Parts one KeyedJaggedTensor by a mask over its values: the hot part carries slots, the cold part the ids."""
    hot_before = torch.ops.fbgemm.asynchronous_complete_cumsum(is_hot.to(torch.int64))
    offsets = split.offsets().to(torch.int64)
    lengths = split.lengths()
    hot_lengths = (hot_before[offsets[1:]] - hot_before[offsets[:-1]]).to(lengths.dtype)
    weights = split.weights_or_none()
    parts = [
        KeyedJaggedTensor(
            keys=split.keys(),
            values=values[mask],
            lengths=part_lengths,
            weights=None if weights is None else weights[mask],
            stride=split.stride(),
        )
        for values, mask, part_lengths in ((slots, is_hot, hot_lengths), (split.values(), ~is_hot, lengths - hot_lengths))
    ]
    return parts[0], parts[1]


def _replace(kjt: KeyedJaggedTensor, values: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(kjt.keys(), values, weights=kjt.weights_or_none(), lengths=kjt.lengths(), stride=kjt.stride())


def _concat(keys: list[str], first: KeyedJaggedTensor, second: KeyedJaggedTensor) -> KeyedJaggedTensor | None:
    """Joins the features of two KeyedJaggedTensors of the same samples under new keys; None where there is no key."""
    if not keys:
        return None
    weights = first.weights_or_none()
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([first.values(), second.values()]),
        lengths=torch.cat([first.lengths(), second.lengths()]),
        weights=None if weights is None else torch.cat([weights, second.weights()]),
        stride=first.stride(),
    )
