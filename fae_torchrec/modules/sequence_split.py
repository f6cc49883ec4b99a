"""SequenceSplit lays the ids of an unpooled collection out by tier; `join_rows` puts the tiers' rows together again, id by id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from fae_torchrec.modules.lookups import Lookup
from fae_torchrec.modules.pooling import add_units
from fae_torchrec.modules.tier_split import TieredIds, TierSplit, hot_alone


@dataclass
class SequenceIds(TieredIds):
    """One batch's ids by tier, in the order of the lookups; every row of the output is an id's.

    Every id is a bag of `hot`, of one slot where the id is hot and of none where it is cold. `cold_at` int64 [cold ids] is where each cold
    id stands among all ids. `lengths` int [lookups, samples] are those of the batch.

    Attributes:
        length_per_lookup: ids of each lookup.
    """

    length_per_lookup: list[int] = field(default_factory=list)

    def by_lookup(self, rows: torch.Tensor, lookups: Sequence[Lookup]) -> dict[str, JaggedTensor]:
        """Cuts the joined rows [ids, dim] into one JaggedTensor per lookup, by its key."""
        assert self.lengths is not None
        parts = zip(lookups, rows.split_with_sizes(self.length_per_lookup), self.lengths.unbind(0), strict=True)
        return {lookup.key: JaggedTensor(values, lengths=lengths) for lookup, values, lengths in parts}


class SequenceSplit(TierSplit):
    """The split of an unpooled collection. Arguments: `TierSplit`."""

    def forward(self, features: KeyedJaggedTensor, *, promised_hot: bool = False) -> SequenceIds:
        """Splits one batch. Host synchronisations on CUDA: one where cold ids are looked for, none for a batch promised to be hot.

        Args:
            features: raw ids [F features, B samples], any integer dtype; weights, and features that no table uses, are ignored.
            promised_hot: the batch is promised to be hot; the promise is counted against (`misses`), not trusted.

        Raises:
            DataError: a feature of a table is missing, or the batch has a variable stride.
        """
        values, lengths, _ = self._in_order(features)
        lengths = lengths.view(len(self.lookups), features.stride())
        ids_of = dict(zip(features.keys(), features.length_per_key(), strict=True))
        counts = [ids_of[lookup.feature] for lookup in self.lookups]
        ends = list(accumulate(counts, initial=0))
        first_bags = [ends[lookup] for lookup in accumulate((len(group.lookups) for group in self.groups), initial=0)]
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.view(-1).to(torch.int64))
        slots = self._find(values, offsets)
        is_cold = slots < 0
        misses = is_cold.sum().reshape(1) if promised_hot else torch.zeros(1, dtype=torch.int64, device=values.device)
        cold = cold_at = None
        if not promised_hot and self.cold_lookups:
            cold_before = torch.ops.fbgemm.asynchronous_complete_cumsum(is_cold.to(torch.int64))
            cold_lengths = cold_before.index_select(0, offsets).diff().view(lengths.shape).index_select(0, self.cold_rows)
            cold_counts = cold_lengths.sum(1).tolist()
            cold_at = torch.nonzero_static(is_cold, size=sum(cold_counts)).squeeze(1)
            cold = KeyedJaggedTensor(
                [lookup.key for lookup in self.cold_lookups],
                values.index_select(0, cold_at),
                lengths=cold_lengths.view(-1).to(torch.int32),
                stride=features.stride(),
                length_per_key=cold_counts,
            )
        one_each = torch.arange(slots.numel() + 1, device=slots.device)
        alone = not self.by_group
        bags = [hot_alone(slots, one_each, None)] if alone else self._by_groups(slots, one_each, None, first_bags, first_bags)
        return SequenceIds(bags, cold, cold_at, misses, lengths, length_per_lookup=counts)


def join_rows(hot: torch.Tensor, cold: Mapping[str, JaggedTensor] | None, ids: SequenceIds) -> torch.Tensor:
    """Puts the cold ids' rows where the hot tier left zeros.

    Args:
        hot: contiguous [ids, dim], rows of the hot ids; changed in place.
        cold: the cold tier's output by lookup, None where it was not asked.
        ids: of the batch.

    Returns:
        [ids, dim].
    """
    if cold is None or ids.cold is None or ids.cold_at is None:
        return hot
    rows = torch.cat([cold[key].values() for key in ids.cold.keys()]).to(hot.device)  # noqa: SIM118 (a KeyedJaggedTensor)
    return add_units(hot, rows, ids.cold_at, hot.shape[1])
