"""TierSplit finds the slot of every id of a batch; BagSplit lays the hot ids out as bags of the hot kernels and packs the cold ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Multistreamable

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind
from fae_torchrec.modules.lookups import HotGroup, Lookup, TableConfig
from fae_torchrec.modules.slot_index import COMPACT_ABOVE_ROWS, DenseSlotIndex, new_slot_index


@dataclass
class HotBags(Multistreamable):
    """One group's hot ids of one batch, as its kernel takes them (or all groups' ids: `by_group` of TierSplit).

    Attributes:
        offsets: int64 [bags + 1].
        weights: float32 [hot ids] or None.
    """

    slots: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor | None

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for tensor in (self.slots, self.offsets, self.weights):
            if tensor is not None:
                tensor.record_stream(stream)


@dataclass
class TieredIds(Multistreamable):
    """One batch's ids, by tier.

    Attributes:
        hot: the hot ids, by group.
        cold: the cold ids at their homes, keys = lookups of split and all-cold tables; None where no table has a cold row, and for a
            batch promised to be hot.
        cold_at: where the cold tier's output belongs (see the subclass that made it); None where `cold` is.
        misses: int64 [1]: ids that are not hot in a batch promised to be hot (0 when the promise was kept); 0 for other batches.
        lengths: int [samples, lookups], ids of each bag in both tiers, where means are to be divided by it; else None.
    """

    hot: list[HotBags]
    cold: KeyedJaggedTensor | None
    cold_at: torch.Tensor | None
    misses: torch.Tensor
    lengths: torch.Tensor | None

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for part in (*self.hot, self.cold, self.cold_at, self.misses, self.lengths):
            if part is not None:
                part.record_stream(stream)


class TierSplit(nn.Module):
    """What pooled and unpooled collections share: the id -> slot index over all their tables, on the device of the ids.

    Args:
        groups: the collection's hot groups.
        configs: its stock tables.
        placement: where their rows live.
        device: where the index lies; ids must be on the same device.
        bounds_check_mode: what is done about an id that its table does not have, as stock kernels do it: WARNING takes row 0.
        compact_above_rows: see `new_slot_index`.
        by_group: whether the hot ids come by group, as kernels of merged tables take them. If not, they come as a single HotBags, lookup
            by lookup, its slots numbered over all groups, as a sharded hot tier takes them.

    Attributes:
        lookups: every lookup, in the order of the output.
        cold_lookups: those of split and all-cold tables, in the same order.
    """

    row_base: torch.Tensor
    rows: torch.Tensor
    cold_rows: torch.Tensor
    lookup_numbers: torch.Tensor

    def __init__(
        self,
        groups: Sequence[HotGroup],
        configs: Sequence[TableConfig],
        placement: RowPlacement,
        device: torch.device,
        bounds_check_mode: BoundsCheckMode = BoundsCheckMode.WARNING,
        compact_above_rows: int = COMPACT_ABOVE_ROWS,
        by_group: bool = True,
    ) -> None:
        super().__init__()
        self.groups = list(groups)
        self._by_group = by_group
        self.lookups: list[Lookup] = [lookup for group in groups for lookup in group.lookups]
        self.cold_lookups = [lookup for lookup in self.lookups if lookup.kind is not TableKind.HOT]
        rows = {config.name: config.num_embeddings for config in configs if config.name in placement.tables.names}
        # Hot tables group by group, so that slots of a group are consecutive; all-cold tables last.
        tables = [name for group in groups for name, _ in group.tables]
        tables += [name for name in rows if name not in tables]
        hot_ids = [torch.as_tensor(placement.hot_ids[name]) for name in tables]
        self.index = new_slot_index([rows[name] for name in tables], hot_ids, device, compact_above_rows=compact_above_rows)
        first_row = dict(zip(tables, torch.tensor([0, *(rows[name] for name in tables)]).cumsum(0).tolist(), strict=False))
        self.first_slots = torch.tensor([0, *(group.num_slots for group in groups)]).cumsum(0).tolist()[:-1]
        self._bounds_check_mode = bounds_check_mode
        self._sources_of: tuple[list[str], list[int]] = ([], [])  # of the latest keys
        self._permutation: tuple[list[int], torch.Tensor] = ([], torch.empty(0))
        cold = self._cold = [i for i, lookup in enumerate(self.lookups) if lookup.kind is not TableKind.HOT]
        buffers = {
            "row_base": torch.tensor([first_row[lookup.table] for lookup in self.lookups]),
            "rows": torch.tensor([rows[lookup.table] for lookup in self.lookups]),
            "cold_rows": torch.tensor(cold, dtype=torch.int64),
            "lookup_numbers": torch.arange(len(self.lookups) + 1),
            "out_of_bounds": torch.zeros(1, dtype=torch.int64),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(device), persistent=False)
        # One FBGEMM operation instead of several where it applies: to a plain array, of tables in the order of the lookups.
        plain = isinstance(self.index, DenseSlotIndex) and tables == [lookup.table for lookup in self.lookups]
        starts = torch.tensor([0, *(rows[name] for name in tables)]).cumsum(0).to(device)
        self.register_buffer("_table_starts", starts if plain else None, persistent=False)

    @property
    def index_bytes(self) -> int:
        """Bytes of fast memory the id -> slot index takes."""
        index: int = self.index.index_bytes
        return index

    def _in_order(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A batch's ids (int64, a copy), lengths and weights, lookup by lookup.

        Raises:
            DataError: a feature is missing, or the batch has a variable stride.
        """
        sources = self._sources(features)
        if sources == list(range(len(features.keys()))):
            return features.values().to(torch.int64, copy=True), features.lengths(), features.weights_or_none()
        if sources != self._permutation[0] or features.device() != self._permutation[1].device:
            self._permutation = sources, torch.tensor(sources, dtype=torch.int32, device=features.device())
        batch = features.permute(*self._permutation)
        return batch.values().to(torch.int64), batch.lengths(), batch.weights_or_none()

    def _sources(self, features: KeyedJaggedTensor) -> list[int]:
        """The position of each lookup's feature in the batch."""
        if features.variable_stride_per_key():
            raise DataError(
                "received a KeyedJaggedTensor with a batch size per feature (variable stride), which hot/cold tables do not support; "
                "pass the same number of bags for every feature, or leave these tables to stock sharding (stock_tables)"
            )
        keys = features.keys()
        if keys != self._sources_of[0]:
            position = {key: i for i, key in enumerate(keys)}
            missing = sorted({lookup.feature for lookup in self.lookups} - position.keys())
            if missing:
                raise DataError(f"the batch lacks the features {missing}; it has {keys}; feed every feature of the tables")
            self._sources_of = list(keys), [position[lookup.feature] for lookup in self.lookups]
        return self._sources_of[1]

    def _find(self, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Brings ids into bounds, in place, and looks their slots up.

        Args:
            values: int64 [ids], lookup by lookup.
            offsets: int64 [lookups x samples + 1].

        Returns:
            int64 [ids], -1 where cold.
        """
        if not values.numel():
            return values
        if self._bounds_check_mode != BoundsCheckMode.NONE:
            torch.ops.fbgemm.bounds_check_indices(self.rows, values, offsets, self._bounds_check_mode.value, self.out_of_bounds)
        values.clamp_(min=0)  # FBGEMM lets -1 pass, a pruned row to its inference kernels
        if self._table_starts is not None:
            found: torch.Tensor = torch.ops.fbgemm.pruned_array_lookup(values, offsets, self.index.slots, self._table_starts)
            return found
        samples = (offsets.numel() - 1) // len(self.lookups)
        rows = torch.repeat_interleave(self.row_base, offsets[::samples].diff(), output_size=values.numel()).add_(values)
        slots: torch.Tensor = self.index(rows)
        return slots.to(torch.int64)

    def _by_groups(self, slots: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, first_bags: list[int]) -> list[HotBags]:
        """Cuts ids and their bag offsets into groups, slots (-1 where cold) made rows of the groups' merged tables, in place.

        Group g's bags are first_bags[g]..first_bags[g + 1].
        """
        if len(self.groups) == 1:
            return [HotBags(slots.add_(1), offsets, weights)]
        cuts = offsets[torch.tensor(first_bags, device=offsets.device)].tolist()
        return [
            HotBags(
                (slots[cuts[g] : cuts[g + 1]] - (first - 1)).clamp_(min=0),
                offsets[first_bags[g] : first_bags[g + 1] + 1] - cuts[g],
                None if weights is None else weights[cuts[g] : cuts[g + 1]],
            )
            for g, first in enumerate(self.first_slots)
        ]


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


def hot_alone(slots: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None) -> HotBags:
    """The hot ids without the cold ones, in the same bags, for a tier that has no row for these."""
    is_hot = slots >= 0
    hot, hot_lengths = torch.ops.fbgemm.masked_select_jagged_1d(slots, lengths, is_hot)
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(hot_lengths)
    return HotBags(hot, offsets, None if weights is None else weights[is_hot])
