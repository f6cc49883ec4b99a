"""BagSplit: the split of a pooled collection, hot bags in the order of the kernels and cold bags packed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.modules.tier_split import TieredIds, TierSplit, hot_alone


class _BagOrder:
    """The order of the bags of a batch: by group, then sample, then lookup, where they come lookup by lookup.

    Args:
        widths: lookups of each group.
        samples: of the batch.
        lengths: of its bags, for their dtype and device.

    Attributes:
        bags: int32 [bags]: which bag of the batch comes next.
        ones: [bags], the lengths of a batch with one id in every bag.
        one_each: int64 [bags + 1], its offsets.
        first: first bag of every group, and the number of bags.
    """

    def __init__(self, widths: list[int], samples: int, lengths: torch.Tensor) -> None:
        self._widths, self._samples = widths, samples
        self.bags = self.turned(torch.arange(lengths.numel(), dtype=torch.int32, device=lengths.device))
        self.ones = torch.ones_like(lengths)
        self.one_each = torch.arange(lengths.numel() + 1, device=lengths.device)
        self.first = [samples * width for width in accumulate(widths, initial=0)]

    def turned(self, numbers: torch.Tensor) -> torch.Tensor:
        """One number a bag, brought into this order."""
        parts = numbers.view(sum(self._widths), self._samples).split_with_sizes(self._widths)
        return parts[0].t().reshape(-1) if len(parts) == 1 else torch.cat([part.t().reshape(-1) for part in parts])


class BagSplit(TierSplit):
    """The split of a pooled collection.

    Hot bags: by group, then sample, then lookup, so that a kernel's output [bags, dim] is [samples, columns of the group]. Cold bags are
    *packed*: bag j of a lookup in `cold` is its j-th bag that holds a cold id, and `cold_at` int64 [cold lookups, bags] says which sample's
    it is (the rest of a lookup's bags are empty). So the cold tier computes and exchanges as many bags as the lookup with the most, instead
    of one per sample.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._any_mean = any(lookup.mean for lookup in self.lookups)
        self._orders: dict[tuple[int, torch.dtype, torch.device], _BagOrder] = {}

    def forward(self, features: KeyedJaggedTensor, *, promised_hot: bool = False) -> TieredIds:
        """Splits one batch.

        Host synchronisations on CUDA: two where cold ids are looked for, one where there are several groups, and one where there are as
        many ids as bags, to see whether every bag has one: then most of the work falls away.

        Args:
            features: raw ids [F features, B samples], any integer dtype, weights kept; features that no table uses are ignored.
            promised_hot: the batch is promised to be hot; the promise is counted against (`misses`), not trusted.

        Raises:
            DataError: a feature of a table is missing, or the batch has a variable stride.
        """
        values, lengths, weights = self._in_order(features)
        order = self._order(features.stride(), lengths)
        one_each = values.numel() == lengths.numel() and torch.equal(lengths, order.ones)
        offsets = order.one_each if one_each else torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.to(torch.int64))
        slots = self._find(values, offsets)
        misses = (slots < 0).sum().reshape(1) if promised_hot else torch.zeros(1, dtype=torch.int64, device=values.device)
        cold = cold_at = None
        if not promised_hot and self.cold_lookups:
            pack = self._pack_one_each if one_each else self._pack_bags
            cold, cold_at = pack(values, offsets, weights, slots, features.stride())
        if not self._by_group:
            hot = [hot_alone(slots, lengths, weights)]
        elif one_each:
            hot = self._by_groups(order.turned(slots), offsets, None if weights is None else order.turned(weights), order.first)
        else:
            lengths_then, slots, weights = torch.ops.fbgemm.permute_1D_sparse_data(order.bags, lengths, slots, weights, slots.numel())
            offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths_then.to(torch.int64))
            hot = self._by_groups(slots, offsets, weights, order.first)
        whole = lengths.view(len(self.lookups), features.stride()).t() if self._any_mean else None
        return TieredIds(hot, cold, cold_at, misses, whole)

    def _order(self, samples: int, lengths: torch.Tensor) -> _BagOrder:
        """The order of a batch's bags, made once for a batch size."""
        key = samples, lengths.dtype, lengths.device
        if key not in self._orders:
            if len(self._orders) > 8:  # odd last batches
                self._orders.clear()
            self._orders[key] = _BagOrder([len(group.lookups) for group in self.groups], samples, lengths)
        return self._orders[key]

    def _pack_one_each(
        self, values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, slots: torch.Tensor, samples: int
    ) -> tuple[KeyedJaggedTensor, torch.Tensor]:
        """`_pack_bags` where every bag has one id: only lookups that may be cold are looked at, and an id's place is its bag's."""
        of_cold = [
            None if x is None else x.view(len(self.lookups), samples).index_select(0, self.cold_rows).view(-1)
            for x in (slots, values, weights)
        ]
        assert of_cold[0] is not None and of_cold[1] is not None
        bags = (of_cold[0] < 0).nonzero().squeeze(1)
        before = torch.searchsorted(bags, self.lookup_numbers[: len(self.cold_lookups) + 1] * samples).tolist()
        counts = [last - first for first, last in pairwise(before)]
        ids = of_cold[1].index_select(0, bags), None if of_cold[2] is None else of_cold[2].index_select(0, bags)
        return self._packed(bags, torch.ones_like(bags, dtype=torch.int32), range(len(counts)), before, ids, counts, samples)

    def _pack_bags(
        self, values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, slots: torch.Tensor, samples: int
    ) -> tuple[KeyedJaggedTensor, torch.Tensor]:
        """The cold ids in packed bags, and whose sample each bag is. Everything but the search for cold ids is as large as they are few."""
        at = (slots < 0).nonzero().squeeze(1)
        of_bag = torch.searchsorted(offsets[1:], at, right=True)
        bags, sizes = torch.unique_consecutive(of_bag, return_counts=True)
        # Per lookup, the bags that hold a cold id and the cold ids, as counts of those before it.
        first_bags = self.lookup_numbers * samples
        bags_before, ids_before = torch.stack([torch.searchsorted(x, first_bags) for x in (bags, of_bag)]).tolist()
        counts = [ids_before[i + 1] - ids_before[i] for i in self._cold]
        ids = values.index_select(0, at), None if weights is None else weights.index_select(0, at)
        return self._packed(bags, sizes.to(torch.int32), self._cold, bags_before, ids, counts, samples)

    def _packed(
        self,
        bags: torch.Tensor,
        sizes: torch.Tensor,
        lookups: Sequence[int],
        before: list[int],
        ids: tuple[torch.Tensor, torch.Tensor | None],
        counts: list[int],
        samples: int,
    ) -> tuple[KeyedJaggedTensor, torch.Tensor]:
        """Moves the bags that hold a cold id to the front of their lookup.

        Args:
            bags: int64 [bags], ascending: lookup x samples + sample.
            sizes: int32 [bags], cold ids of each.
            lookups: the cold lookups, as `bags` numbers them.
            before: of these bags, those before each lookup, and all.
            ids: the cold ids and their weights, lookup by lookup.
            counts: cold ids of each cold lookup.
            samples: of the batch.
        """
        width, device = max(1, *(before[i + 1] - before[i] for i in lookups)), bags.device
        # Bag i of a lookup's goes to place i of its `width`: by the lookup, as far as that is from its place among all bags that hold one.
        shift = [0] * (len(before) - 1)
        for number, i in enumerate(lookups):
            shift[i] = number * width - before[i]
        lookup = torch.div(bags, max(samples, 1), rounding_mode="floor")
        place = torch.tensor(shift, device=device).index_select(0, lookup).add_(torch.arange(bags.numel(), device=device))
        lengths = torch.zeros(len(lookups) * width, dtype=torch.int32, device=device).index_copy_(0, place, sizes)
        # The empty bags are spread over the samples, so that no sample is added to by many.
        at = torch.arange(width, device=device).repeat(len(lookups)).index_copy_(0, place, bags.remainder(max(samples, 1)))
        keys = [lookup.key for lookup in self.cold_lookups]
        packed = KeyedJaggedTensor(keys, *ids, lengths=lengths, stride=width, length_per_key=counts)
        return packed, at.view(len(lookups), width)
