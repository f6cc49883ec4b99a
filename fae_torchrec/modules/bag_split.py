"""BagSplit: the split of a pooled collection, hot bags in the order of the kernels and cold bags packed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.modules.tier_split import AheadIds, HotBags, StagedRows, TieredIds, TierSplit, hot_alone


class _BagOrder:
    """The order of the bags of a batch: by group, then sample, then lookup, where they come lookup by lookup.

    Args:
        widths: lookups of each group.
        samples: of the batch.
        dtype: of lengths.
        device: of everything.

    Attributes:
        bags: int32 [bags]: which bag of the batch comes next.
        ones: [bags], the lengths of a batch with one id in every bag.
        one_each: int64 [bags + 1], its offsets.
        first: first bag of every group, and the number of bags.
    """

    def __init__(self, widths: list[int], samples: int, dtype: torch.dtype, device: torch.device) -> None:
        self._widths, self._samples = widths, samples
        bags = samples * sum(widths)
        self.bags = self.turned(torch.arange(bags, dtype=torch.int32, device=device))
        self.ones = torch.ones(bags, dtype=dtype, device=device)
        self.one_each = torch.arange(bags + 1, device=device)
        self.first = [samples * width for width in accumulate(widths, initial=0)]

    def turned(self, numbers: torch.Tensor) -> torch.Tensor:
        """One number a bag, brought into this order."""
        parts = numbers.view(sum(self._widths), self._samples).split_with_sizes(self._widths)
        return parts[0].t().reshape(-1) if len(parts) == 1 else torch.cat([part.t().reshape(-1) for part in parts])


@dataclass
class _Found:
    """A batch's ids, lookup by lookup, on their way to their tiers.

    Attributes:
        samples: of the batch.
        sizes: ids before each group, and all; empty with one group.
        values: int64 [ids], within the bounds of their tables.
        lengths: int [lookups x samples].
        weights: [ids] or None.
        offsets: int64 [lookups x samples + 1].
        slots: int64 [ids], -1 where cold.
        one_each: whether every bag has one id; None where only the device knows.
    """

    samples: int
    sizes: list[int]
    values: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor | None
    offsets: torch.Tensor
    slots: torch.Tensor
    one_each: bool | None


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

        Host synchronisations on CUDA: one where cold ids are looked for, a second one if as many ids as bags turn out not to be one a
        bag; none for a batch promised to be hot.

        Args:
            features: raw ids [F features, B samples], any integer dtype, weights kept; features that no table uses are ignored.
            promised_hot: the batch is promised to be hot; the promise is counted against (`misses`), not trusted.

        Raises:
            DataError: a feature of a table is missing, or the batch has a variable stride.
        """
        found = self._found(features)
        slots, samples = found.slots, found.samples
        misses = (slots < 0).sum().reshape(1) if promised_hot else torch.zeros(1, dtype=torch.int64, device=slots.device)
        cold = cold_at = None
        if not promised_hot and self.cold_lookups:
            found.one_each, counts = self._count_one_each(slots, found.lengths, found.one_each, samples)
            if found.one_each:
                cold, cold_at = self._pack_one_each(found.values, found.weights, slots, samples, counts)
            else:
                cold, cold_at = self._pack_bags(found.values, found.offsets, found.weights, slots, samples)
        return self._arranged(found, cold, cold_at, misses)

    def _found(self, features: KeyedJaggedTensor) -> _Found:
        """A batch's ids in the order of the lookups, and their slots."""
        values, lengths, weights = self._in_order(features)
        samples, sizes = features.stride(), self._sizes(features)
        order = self._order(samples, lengths.dtype, lengths.device)
        one_each = self._one_each(features, values, lengths, order)
        offsets = order.one_each if one_each else torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.to(torch.int64))
        return _Found(samples, sizes, values, lengths, weights, offsets, self._find(values, offsets), one_each)

    def _arranged(self, found: _Found, cold: KeyedJaggedTensor | None, cold_at: torch.Tensor | None, misses: torch.Tensor) -> TieredIds:
        """The hot bags as the kernels take them, with what was found out about the cold ones."""
        slots, offsets, weights, lengths = found.slots, found.offsets, found.weights, found.lengths
        order = self._order(found.samples, lengths.dtype, lengths.device)
        if not self.by_group:
            hot = [hot_alone(slots, offsets, weights)]
        elif found.one_each:
            turned = None if weights is None else order.turned(weights)
            hot = self._by_groups(order.turned(slots), order.one_each, turned, order.first, order.first)
        else:
            lengths_then, slots, weights = torch.ops.fbgemm.permute_1D_sparse_data(order.bags, lengths, slots, weights, slots.numel())
            offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths_then.to(torch.int64))
            hot = self._by_groups(slots, offsets, weights, order.first, found.sizes)
        whole = lengths.view(len(self.lookups), found.samples).t() if self._any_mean else None
        return TieredIds(hot, cold, cold_at, misses, whole, one_each=bool(found.one_each) and self.by_group)

    def ahead(self, features: KeyedJaggedTensor, *, promised_hot: bool = False, half: int = 0) -> AheadIds:
        """Splits one batch on the host, to be sent to the device before its step.

        Args:
            features: as `forward`, on the CPU.
            promised_hot: as `forward`.
            half: for `StagedSplit`.

        Raises:
            DataError: as `forward`.
        """
        # Not by `self(...)`: TorchRec's pipelines trace the model, and torch.fx then has nn.Module.__call__ patched for all threads.
        ids = self.forward(features, promised_hot=promised_hot)
        if ids.cold is not None:
            ids.cold.offsets()  # kept there: nothing is left to compute on the device
        return self._sent(ids, features.stride())

    @staticmethod
    def _sent(ids: TieredIds, samples: int, staged: StagedRows | None = None) -> AheadIds:
        """Ids ready to be sent: without what the device has."""
        if ids.one_each:
            none = torch.empty(0, dtype=torch.int64)
            ids.hot = [HotBags(bags.slots, none, bags.weights) for bags in ids.hot]
        return AheadIds(ids, samples, staged)

    def arrived(self, ahead: AheadIds) -> TieredIds:
        """What `forward` gives, of ids that were split by a BagSplit of the same tables on the host."""
        ids = ahead.ids
        if not ids.one_each:
            return ids
        starts = self._order(ahead.samples, torch.int32, ids.hot[0].slots.device).one_each
        return replace(ids, hot=[HotBags(bags.slots, starts[: bags.slots.numel() + 1], bags.weights) for bags in ids.hot])

    def _order(self, samples: int, dtype: torch.dtype, device: torch.device) -> _BagOrder:
        """The order of a batch's bags, made once for a batch size."""
        key = samples, dtype, device
        order = self._orders.get(key)
        if order is None:  # several threads may be here
            if len(self._orders) > 8:  # odd last batches
                self._orders.clear()
            order = self._orders[key] = _BagOrder([len(group.lookups) for group in self.groups], samples, dtype, device)
        return order

    def _sizes(self, features: KeyedJaggedTensor) -> list[int]:
        """Ids before each group, and all: as many as `first_bags` of `_by_groups`. The host knows them, or asks the device."""
        if len(self.groups) == 1:
            return []
        of = dict(zip(features.keys(), features.length_per_key(), strict=True))
        return list(accumulate((sum(of[lookup.feature] for lookup in group.lookups) for group in self.groups), initial=0))

    def _one_each(self, features: KeyedJaggedTensor, values: torch.Tensor, lengths: torch.Tensor, order: _BagOrder) -> bool | None:
        """Whether every bag has one id, by which most of the work falls away; None where only the device knows."""
        if values.numel() != lengths.numel():
            return False
        if isinstance(features, HotKeyedJaggedTensor) and features.one_each:
            return True
        return torch.equal(lengths, order.ones) if lengths.device.type == "cpu" else None

    def _count_one_each(self, slots: torch.Tensor, lengths: torch.Tensor, one_each: bool | None, samples: int) -> tuple[bool, list[int]]:
        """Whether every bag has one id and, if so, the cold ids of each cold lookup: all that the host asks, at once."""
        if one_each is False:
            return False, []
        counts = (slots.view(len(self.lookups), samples).index_select(0, self.cold_rows) < 0).sum(1)
        if one_each:
            return True, counts.tolist()
        many, *counted = torch.cat([(lengths != 1).sum().view(1), counts]).tolist()
        return not many, counted

    def _pack_one_each(
        self, values: torch.Tensor, weights: torch.Tensor | None, slots: torch.Tensor, samples: int, counts: list[int]
    ) -> tuple[KeyedJaggedTensor, torch.Tensor]:
        """`_pack_bags` where every bag has one id: only lookups that may be cold are looked at, and an id's place is its bag's."""
        of_cold = [
            None if x is None else x.view(len(self.lookups), samples).index_select(0, self.cold_rows).view(-1)
            for x in (slots, values, weights)
        ]
        assert of_cold[0] is not None and of_cold[1] is not None
        bags = torch.nonzero_static(of_cold[0] < 0, size=sum(counts)).squeeze(1)
        ids = of_cold[1].index_select(0, bags), None if of_cold[2] is None else of_cold[2].index_select(0, bags)
        return self._packed(bags, torch.ones_like(bags, dtype=torch.int32), counts, ids, counts, samples)

    def _pack_bags(
        self, values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, slots: torch.Tensor, samples: int
    ) -> tuple[KeyedJaggedTensor, torch.Tensor]:
        """The cold ids in packed bags, and whose sample each bag is."""
        is_cold = slots < 0
        before = torch.ops.fbgemm.asynchronous_complete_cumsum(is_cold.to(torch.int64)).index_select(0, offsets)  # cold ids before each bag
        of_bag = before.diff().view(len(self.lookups), samples).index_select(0, self.cold_rows)
        bag_counts, counts = torch.stack([(of_bag > 0).sum(1), of_bag.sum(1)]).tolist()
        at = torch.nonzero_static(is_cold, size=sum(counts)).squeeze(1)
        sizes = of_bag.view(-1)
        bags = torch.nonzero_static(sizes, size=sum(bag_counts)).squeeze(1)
        ids = values.index_select(0, at), None if weights is None else weights.index_select(0, at)
        return self._packed(bags, sizes.index_select(0, bags).to(torch.int32), bag_counts, ids, counts, samples)

    def _packed(
        self,
        bags: torch.Tensor,
        sizes: torch.Tensor,
        bag_counts: list[int],
        ids: tuple[torch.Tensor, torch.Tensor | None],
        counts: list[int],
        samples: int,
    ) -> tuple[KeyedJaggedTensor, torch.Tensor]:
        """Moves the bags that hold a cold id to the front of their lookup.

        Args:
            bags: int64 [bags], ascending: cold lookup x samples + sample.
            sizes: int32 [bags], cold ids of each.
            bag_counts: of these bags, those of each cold lookup.
            ids: the cold ids and their weights, lookup by lookup.
            counts: cold ids of each cold lookup.
            samples: of the batch.
        """
        width, samples, device = max(1, *bag_counts), max(samples, 1), bags.device
        lookup = torch.div(bags, samples, rounding_mode="floor")
        # Bag i of a lookup goes to place i of its `width`: by the lookup, as far as that is from its place among all bags that hold one.
        first = torch.searchsorted(bags, self.lookup_numbers[: len(bag_counts)] * samples)
        shift = torch.add(first, self.lookup_numbers[: len(bag_counts)], alpha=-width).neg_()
        place = shift.index_select(0, lookup).add_(torch.arange(bags.numel(), device=device))
        lengths = torch.zeros(len(bag_counts) * width, dtype=torch.int32, device=device).index_copy_(0, place, sizes)
        # The empty bags are spread over the samples, so that no sample is added to by many.
        at = torch.arange(width, device=device).repeat(len(bag_counts)).index_copy_(0, place, bags.remainder(samples))
        keys = [lookup.key for lookup in self.cold_lookups]
        packed = KeyedJaggedTensor(keys, *ids, lengths=lengths, stride=width, length_per_key=counts)
        return packed, at.view(len(bag_counts), width)
