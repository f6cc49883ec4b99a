"""TierSplit finds the slot of every id of a batch; BagSplit lays the hot ids out as bags of the hot kernels and packs the cold ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Multistreamable

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind
from fae_torchrec.modules.lookups import HotGroup, Lookup, TableConfig
from fae_torchrec.modules.slot_index import new_slot_index


@dataclass
class HotBags(Multistreamable):
    """One group's hot ids of one batch, as its kernel takes them.

    Attributes:
        slots: int64 [hot ids], slots within the group.
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

    Attributes:
        lookups: every lookup, in the order of the output.
        cold_lookups: those of split and all-cold tables, in the same order.
    """

    row_base: torch.Tensor
    rows: torch.Tensor

    def __init__(
        self,
        groups: Sequence[HotGroup],
        configs: Sequence[TableConfig],
        placement: RowPlacement,
        device: torch.device,
        bounds_check_mode: BoundsCheckMode = BoundsCheckMode.WARNING,
        compact_above_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.groups = list(groups)
        self.lookups: list[Lookup] = [lookup for group in groups for lookup in group.lookups]
        self.cold_lookups = [lookup for lookup in self.lookups if lookup.kind is not TableKind.HOT]
        rows = {config.name: config.num_embeddings for config in configs if config.name in placement.tables.names}
        # Hot tables group by group, so that slots of a group are consecutive; all-cold tables last.
        tables = [name for group in groups for name, _ in group.tables]
        tables += [name for name in rows if name not in tables]
        limit = {} if compact_above_rows is None else {"compact_above_rows": compact_above_rows}
        hot_ids = [torch.as_tensor(placement.hot_ids[name]) for name in tables]
        self.index = new_slot_index([rows[name] for name in tables], hot_ids, device, **limit)
        first_row = dict(zip(tables, torch.tensor([0, *(rows[name] for name in tables)]).cumsum(0).tolist(), strict=False))
        self.first_slots = torch.tensor([0, *(group.num_slots for group in groups)]).cumsum(0).tolist()[:-1]
        self._bounds_check_mode = bounds_check_mode
        buffers = {
            "row_base": torch.tensor([first_row[lookup.table] for lookup in self.lookups]),
            "rows": torch.tensor([rows[lookup.table] for lookup in self.lookups]),
            "out_of_bounds": torch.zeros(1, dtype=torch.int64),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(device), persistent=False)

    @property
    def index_bytes(self) -> int:
        """Bytes of fast memory the id -> slot index takes."""
        index: int = self.index.index_bytes
        return index

    def _sources(self, features: KeyedJaggedTensor) -> list[int]:
        """The position of each lookup's feature in the batch.

        Raises:
            DataError: a feature is missing, or the batch has a variable stride.
        """
        if features.variable_stride_per_key():
            raise DataError(
                "received a KeyedJaggedTensor with a batch size per feature (variable stride), which hot/cold tables do not support; "
                "pass the same number of bags for every feature, or leave these tables to stock sharding (stock_tables)"
            )
        position = {key: i for i, key in enumerate(features.keys())}
        missing = sorted({lookup.feature for lookup in self.lookups} - position.keys())
        if missing:
            raise DataError(f"the batch lacks the features {missing}; it has {features.keys()}; feed every feature of the tables")
        return [position[lookup.feature] for lookup in self.lookups]

    def _find(
        self, values: torch.Tensor, offsets: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, base: torch.Tensor
    ) -> torch.Tensor:
        """Brings ids into bounds, in place, and looks their slots up: int64, -1 where cold. `rows` and `base` are by bag."""
        if values.numel() and self._bounds_check_mode != BoundsCheckMode.NONE:
            torch.ops.fbgemm.bounds_check_indices(rows, values, offsets, self._bounds_check_mode.value, self.out_of_bounds)
        values.clamp_(min=0)  # FBGEMM lets -1 pass, a pruned row to its inference kernels
        first = torch.repeat_interleave(base, lengths, output_size=values.numel())
        slots: torch.Tensor = self.index(first.add_(values))
        return slots.to(torch.int64)

    def _group_bags(self, slots: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, first_bags: list[int]) -> list[HotBags]:
        """Cuts hot slots and their bag offsets into groups; group g's bags are first_bags[g]..first_bags[g+1]."""
        if len(self.groups) == 1:
            return [HotBags(slots, offsets, weights)]
        cuts = offsets[torch.tensor(first_bags, device=offsets.device)].tolist()
        return [
            HotBags(
                slots[cuts[g] : cuts[g + 1]] - first,
                offsets[first_bags[g] : first_bags[g + 1] + 1] - cuts[g],
                None if weights is None else weights[cuts[g] : cuts[g + 1]],
            )
            for g, first in enumerate(self.first_slots)
        ]


@dataclass(frozen=True)
class _BagOrder:
    """How the bags of a batch with these keys and this many samples are ordered, as tensors on the device.

    Bags stand by group, then sample, then lookup, so that a kernel's output [bags, dim] is [samples, columns of the group].

    Attributes:
        keys: keys of the batch.
        samples: its samples.
        source: int32 [bags]: the bag of the batch (feature-major).
        rows: int64 [bags]: rows of the table.
        base: int64 [bags]: the first row of the table in the index.
        cold: int32 [cold lookups x samples]: the bag of (cold lookup, sample).
        first: first bag of every group, and the number of bags.
    """

    keys: list[str]
    samples: int
    source: torch.Tensor
    rows: torch.Tensor
    base: torch.Tensor
    cold: torch.Tensor
    first: list[int]


class BagSplit(TierSplit):
    """The split of a pooled collection.

    Hot bags: those of the batch without their cold ids. Cold bags are *packed*: bag j of a lookup in `cold` is its j-th bag that holds
    a cold id, and `cold_at` int64 [cold lookups, bags] says which sample's it is (the rest of a lookup's bags are empty). So the cold
    tier computes and exchanges as many bags as the lookup with the most, instead of one per sample.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._orders: dict[tuple[int, torch.device], _BagOrder] = {}
        self._any_mean = any(lookup.mean for lookup in self.lookups)

    def forward(self, features: KeyedJaggedTensor, *, promised_hot: bool = False) -> TieredIds:
        """Splits one batch; one host synchronisation on CUDA, and one more where there are several groups.

        Args:
            features: raw ids [F features, B samples], any integer dtype, weights kept; features that no table uses are ignored.
            promised_hot: the batch is promised to be hot; the promise is counted against (`misses`), not trusted.

        Raises:
            DataError: a feature of a table is missing, or the batch has a variable stride.
        """
        order, total = self._order(features)
        lengths, values, weights = torch.ops.fbgemm.permute_1D_sparse_data(
            order.source, features.lengths(), features.values().to(torch.int64), features.weights_or_none(), total
        )
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.to(torch.int64))
        slots = self._find(values, offsets, lengths, order.rows, order.base)
        by_sample = self._by_sample(lengths, order) if self._any_mean else None
        if promised_hot or not self.cold_lookups:
            misses = (slots < 0).sum().reshape(1)
            return TieredIds(self._group_bags(slots, offsets, weights, order.first), None, None, misses, by_sample)
        is_hot = slots >= 0
        hot_offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(is_hot.to(torch.int64)).index_select(0, offsets)
        cold_lengths = lengths - hot_offsets.diff().to(lengths.dtype)
        by_lookup = cold_lengths.index_select(0, order.cold).view(len(self.cold_lookups), -1)
        counts = torch.cat([(by_lookup > 0).sum(1), by_lookup.sum(1)]).tolist()  # the one synchronisation: every size follows from it
        bags, ids = counts[: len(by_lookup)], counts[len(by_lookup) :]
        hot = torch.nonzero_static(is_hot, size=total - sum(ids)).squeeze(1)
        cold = torch.nonzero_static(is_hot.logical_not_(), size=sum(ids)).squeeze(1)
        hot_weights, cold_weights = (None if weights is None else weights.index_select(0, at) for at in (hot, cold))
        _, cold_ids, cold_weights = torch.ops.fbgemm.permute_1D_sparse_data(
            order.cold, cold_lengths, values.index_select(0, cold), cold_weights, sum(ids)
        )
        packed_lengths, cold_at = _pack(by_lookup, max(*bags, 1), sum(bags))
        packed = KeyedJaggedTensor(
            [lookup.key for lookup in self.cold_lookups],
            cold_ids,
            cold_weights,
            lengths=packed_lengths,
            stride=cold_at.shape[1],
            length_per_key=ids,
        )
        none = torch.zeros(1, dtype=torch.int64, device=values.device)
        bags_of_groups = self._group_bags(slots.index_select(0, hot), hot_offsets, hot_weights, order.first)
        return TieredIds(bags_of_groups, packed, cold_at, none, by_sample)

    def _by_sample(self, lengths: torch.Tensor, order: _BagOrder) -> torch.Tensor:
        """Lengths of bags as [samples, lookups]."""
        parts = lengths.split_with_sizes([order.samples * len(group.lookups) for group in self.groups])
        return torch.cat([part.view(order.samples, len(group.lookups)) for part, group in zip(parts, self.groups, strict=True)], dim=1)

    def _order(self, features: KeyedJaggedTensor) -> tuple[_BagOrder, int]:
        """The order of the bags, computed once for a batch size, and the number of ids in it."""
        keys, samples, device = features.keys(), features.stride(), features.device()
        order = self._orders.get((samples, device))
        if order is None or order.keys != keys:
            if len(self._orders) > 8:  # odd last batches
                self._orders.clear()
            order = self._orders[samples, device] = self._new_order(features)
        per_key = dict(zip(keys, features.length_per_key(), strict=True))
        return order, sum(per_key[lookup.feature] for lookup in self.lookups)

    def _new_order(self, features: KeyedJaggedTensor) -> _BagOrder:
        samples, device = features.stride(), features.device()
        sources = torch.tensor(self._sources(features), device=device)
        sample, lookup = torch.arange(samples, device=device), torch.arange(len(self.lookups), device=device)
        width = [len(group.lookups) for group in self.groups]
        lookups = torch.cat([part.repeat(samples) for part in lookup.split_with_sizes(width)])
        samples_of_bags = torch.cat([sample.repeat_interleave(count) for count in width])
        bag = torch.empty(len(self.lookups), samples, dtype=torch.int64, device=device)
        bag[lookups, samples_of_bags] = torch.arange(lookups.numel(), device=device)
        is_cold = torch.tensor([lookup.kind is not TableKind.HOT for lookup in self.lookups], device=device)
        return _BagOrder(
            keys=list(features.keys()),
            samples=samples,
            source=(sources[lookups] * samples + samples_of_bags).to(torch.int32),
            rows=self.rows[lookups],
            base=self.row_base[lookups],
            cold=bag[is_cold].view(-1).to(torch.int32),
            first=[samples * count for count in torch.tensor([0, *width]).cumsum(0).tolist()],
        )


def _pack(lengths: torch.Tensor, width: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the bags that are not empty to the front of their lookup.

    Args:
        lengths: int [lookups, samples].
        width: bags a lookup has afterwards, at least as many as are not empty in any.
        count: bags that are not empty.

    Returns:
        lengths int [lookups x width], and int64 [lookups, width], the sample of each bag (the empty ones spread over all samples, so that
        none is added to by many).
    """
    lookups, samples = lengths.shape
    full = lengths > 0
    bag = torch.nonzero_static(full.view(-1), size=count).squeeze(1)
    lookup = torch.div(bag, samples, rounding_mode="floor")
    to = (full.cumsum(1) - 1).view(-1).index_select(0, bag) + lookup * width
    packed = lengths.new_zeros(lookups * width)
    packed[to] = lengths.view(-1).index_select(0, bag)
    sample = torch.arange(width, device=lengths.device).repeat(lookups)
    sample[to] = bag - lookup * samples
    return packed, sample.view(lookups, width)
