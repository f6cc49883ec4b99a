"""TierSplit finds the slot of every id of a batch, and lays ids out as bags of the hot kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

    def moved(self, move: Callable[[Any], Any]) -> HotBags:
        """The same somewhere else."""
        return HotBags(move(self.slots), move(self.offsets), None if self.weights is None else move(self.weights))

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
        units: int64, where each unit of the cold tier's output is added (`TierJoin.units`); None until somebody has found out.
        one_each: whether every bag is known to have one id.
    """

    hot: list[HotBags]
    cold: KeyedJaggedTensor | None
    cold_at: torch.Tensor | None
    misses: torch.Tensor
    lengths: torch.Tensor | None
    units: torch.Tensor | None = None
    one_each: bool = False

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for part in (*self.hot, self.cold, self.cold_at, self.lengths, self.units):
            if part is not None:
                part.record_stream(stream)
        if self.misses.device.type != "cpu":  # of ids split ahead they stay on the host
            self.misses.record_stream(stream)


@dataclass
class StagedRows(Multistreamable):
    """The cold rows of one batch that are brought beside the hot ones for its step (`Staging`).

    Attributes:
        rows: by group, int64 [distinct cold rows], ascending: where they are at home, as rows of the group's homes. Row i has the i-th
            slot of the half.
        half: which half of the staging area, 0 or 1.
    """

    rows: list[torch.Tensor]
    half: int

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for rows in self.rows:
            rows.record_stream(stream)


@dataclass
class AheadIds(Multistreamable):
    """One batch's ids by tier on their way from the host, where they were split; what `BagSplit.arrived` makes TieredIds of again.

    Attributes:
        ids: by tier. Offsets of bags with one id each do not travel: the device has them.
        samples: of the batch.
        staged: the cold rows, if they are to lie beside the hot ones: then all ids are in `ids.hot`.
    """

    ids: TieredIds
    samples: int
    staged: StagedRows | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> AheadIds:
        """A copy on a device; `misses` stay on the host, which asks."""
        return self._moved(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AheadIds:
        """A copy in pinned memory."""
        return self._moved(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        self.ids.record_stream(stream)
        if self.staged is not None:
            self.staged.record_stream(stream)

    def _moved(self, move: Callable[[Any], Any]) -> AheadIds:
        ids, staged = self.ids, self.staged
        cold, cold_at, lengths, units = (None if part is None else move(part) for part in (ids.cold, ids.cold_at, ids.lengths, ids.units))
        hot = [bags.moved(move) for bags in ids.hot]
        return AheadIds(
            replace(ids, hot=hot, cold=cold, cold_at=cold_at, lengths=lengths, units=units),
            self.samples,
            None if staged is None else StagedRows([move(rows) for rows in staged.rows], staged.half),
        )


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
        self.by_group = by_group
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
        slots: torch.Tensor = self.index.forward(rows)  # not by a call: see BagSplit.ahead
        return slots.to(torch.int64)

    def _by_groups(
        self, slots: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, first_bags: list[int], cuts: list[int]
    ) -> list[HotBags]:
        """Cuts ids and their bag offsets into groups, slots (-1 where cold) made rows of the groups' merged tables, in place.

        Group g's bags are first_bags[g]..first_bags[g + 1], its ids cuts[g]..cuts[g + 1].
        """
        if len(self.groups) == 1:
            return [HotBags(slots.add_(1), offsets, weights)]
        return [
            HotBags(
                (slots[cuts[g] : cuts[g + 1]] - (first - 1)).clamp_(min=0),
                offsets[first_bags[g] : first_bags[g + 1] + 1] - cuts[g],
                None if weights is None else weights[cuts[g] : cuts[g + 1]],
            )
            for g, first in enumerate(self.first_slots)
        ]


def hot_alone(slots: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None) -> HotBags:
    """The hot ids without the cold ones, in the same bags, for a tier that has no row for these. One host synchronisation on CUDA.

    (FBGEMM's `masked_select_jagged_1d` has no CUDA kernel in 1.6.)
    """
    is_hot = slots >= 0
    hot = is_hot.nonzero().squeeze(1)
    hot_offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(is_hot.to(torch.int64)).index_select(0, offsets)
    return HotBags(slots.index_select(0, hot), hot_offsets, None if weights is None else weights.index_select(0, hot))
