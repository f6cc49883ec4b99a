"""Counts the bytes of training steps from their ids: over the links and in host memory, under three schemes, all ranks together.

stock       All tables in host memory: the host looks rows up, the GPUs get them (pooled where the table is), the host gets the gradients.
published   FAE as its authors published it: a hot batch is looked up on the GPUs alone, a cold batch as `stock` does, its hot rows too. So
            hot rows have two homes, and are copied from one to the other at every swap.
ours        A row has one owner. A hot batch leaves the cold tier alone, and of a cold batch only cold rows come from there.

What is read and written in host memory is counted alike for all: the forward reads the weights of every row that is looked up, the update
reads and writes every distinct row with its optimizer state. (`core.cost_model` counts so too.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import Kind
from fae_torchrec.core.tables import TableKind, TableSet
from fae_torchrec.distributed.compact_gradients import reduces

ColdTier = Literal["host", "uvm"]
_ID_BYTES = 8
_LENGTH_BYTES = 4
_SLOT_BYTES = 4
_COUNT_BYTES = 8
_GRADIENT_BYTES = 4  # of each weight: what a table gives and takes is fp32


@dataclass(frozen=True)
class Moved:
    """Bytes of a step or of many, all ranks together.

    Attributes:
        to_gpu: rows, pooled or not, from the host to GPUs.
        to_host: gradients, or updated rows, from GPUs to the host.
        sync_to_gpu: hot rows copied to GPUs at swaps.
        sync_to_host: hot rows copied back at swaps.
        between_gpus: sent by a GPU to another.
        ids: of rows, between host and GPUs in either direction.
        tier_read: read of rows that lie in host memory.
        tier_written: written to such rows.
    """

    to_gpu: float = 0
    to_host: float = 0
    sync_to_gpu: float = 0
    sync_to_host: float = 0
    between_gpus: float = 0
    ids: float = 0
    tier_read: float = 0
    tier_written: float = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Moved)))

    def times(self, factor: float) -> Moved:
        """All of it so many times."""
        return Moved(*(factor * getattr(self, f.name) for f in fields(Moved)))

    @property
    def pcie(self) -> float:
        """Rows, gradients and hot rows at swaps between host and GPUs, both directions; ids are not in it."""
        return self.to_gpu + self.to_host + self.sync_to_gpu + self.sync_to_host

    @property
    def links(self) -> float:
        """`pcie` and what GPUs send to each other."""
        return self.pcie + self.between_gpus

    @property
    def tier(self) -> float:
        """Read and written in host memory."""
        return self.tier_read + self.tier_written

    def to_json(self) -> dict[str, float]:
        """All fields, and their sums."""
        return {**vars(self), "pcie": self.pcie, "links": self.links, "links_and_ids": self.links + self.ids, "tier": self.tier}


@dataclass(frozen=True)
class StepCounts:
    """What one step looks up. Lookups and tables are in the order of the TableSet.

    Attributes:
        kind: of the batches.
        samples: int64 [ranks].
        ids: int64 [ranks, lookups], ids.
        cold_ids: int64 [ranks, lookups], those of cold rows.
        cold_bags: int64 [ranks, lookups], bags with a cold id.
        distinct: int64 [tables], rows that any rank looks up.
        distinct_cold: int64 [tables], cold ones of them.
        own_hot: int64 [ranks], hot rows that a rank looks up, all tables together.
        union_hot: hot rows that any rank looks up.
    """

    kind: Kind
    samples: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    cold_ids: npt.NDArray[np.int64]
    cold_bags: npt.NDArray[np.int64]
    distinct: npt.NDArray[np.int64]
    distinct_cold: npt.NDArray[np.int64]
    own_hot: npt.NDArray[np.int64]
    union_hot: int


class ByteCounter:
    """Counts steps of one placement.

    Args:
        placement: which rows are hot, of every table of the model; all tables are of one dimension, type and optimizer.

    Attributes:
        hot_weights: bytes of all hot rows' weights, which a swap copies: FAE as published trains by SGD, which has no state.
    """

    def __init__(self, placement: RowPlacement) -> None:
        tables: TableSet = placement.tables
        if len({(table.weight_bytes, table.row_bytes, table.pooled) for table in tables}) > 1:
            raise ValueError("the tables differ in dimension, type, optimizer or pooling; count tables that are alike")
        first = next(iter(tables))
        self._weights, self._row, self._pooled = first.weight_bytes, first.row_bytes, first.pooled
        self._given = _GRADIENT_BYTES * first.dim
        self.tables = tables
        self._table_of = np.array([tables.names.index(name) for name, _ in tables.lookups])
        self._may_be_cold = np.array([placement.kind(name) is not TableKind.HOT for name, _ in tables.lookups])
        self._first_row = np.cumsum([0, *(table.rows for table in tables)])
        self._hot = np.concatenate([placement.hot_mask(name) for name in tables.names])
        self.hot_weights = self._weights * int(self._hot.sum())

    def count(self, batches: Sequence[KeyedJaggedTensor], kind: Kind) -> StepCounts:
        """Looks at one step.

        Args:
            batches: by rank, raw ids on the CPU; a filler's has no id.
            kind: of all of them.
        """
        rows, of_ranks, own_hot = [], [], []
        for batch in batches:
            of_rank = self._rows_of(batch)
            distinct, (ids, cold_ids, cold_bags) = np.unique(of_rank[0]), self._by_lookup(*of_rank)
            rows.append(distinct)
            own_hot.append(int(self._hot[distinct].sum()))
            of_ranks.append((ids, cold_ids, cold_bags))
        union = rows[0] if len(rows) == 1 else np.unique(np.concatenate(rows))
        is_hot = self._hot[union]
        ids, cold_ids, cold_bags = (np.stack(of) for of in zip(*of_ranks, strict=True))
        return StepCounts(
            kind,
            np.array([batch.stride() if len(batch.values()) else 0 for batch in batches]),
            ids,
            cold_ids,
            cold_bags,
            self._by_table(union),
            self._by_table(union[~is_hot]),
            np.array(own_hot),
            int(is_hot.sum()),
        )

    def stock(self, step: StepCounts) -> Moved:
        """All tables in host memory."""
        given = self._given * float((step.samples.sum() * step.ids.shape[1]) if self._pooled else step.ids.sum())
        updated = self._row * float(step.distinct.sum())
        looked_up = self._weights * float(step.ids.sum())
        return Moved(to_gpu=given, to_host=given, tier_read=looked_up + updated, tier_written=updated)

    def published(self, step: StepCounts) -> Moved:
        """FAE as published, without its swaps (`swaps`); between GPUs the least that replicas can do: of a hot batch what ours exchange."""
        if step.kind != "hot":
            return self.stock(step)
        return Moved(ids=_ID_BYTES * float(step.ids.sum()), between_gpus=self.hot_exchange(step))

    def through_first_gpu(self, step: StepCounts) -> float:
        """Bytes between GPUs in the authors' code, beside `hot_copies`.

        The first GPU deals the rows of cold batches to the others and gets their gradients; of hot batches it gets a gradient, with its
        row's number, for each id that the others looked up.
        """
        if step.kind == "hot":
            return (self._given + _ID_BYTES) * float(step.ids[1:].sum())
        rows = step.samples[1:].sum() * step.ids.shape[1] if self._pooled else step.ids[1:].sum()
        return 2 * self._given * float(rows)

    def hot_copies(self, step: StepCounts) -> float:
        """Bytes of all hot rows' weights, touched or not, given to every GPU but the first in a hot step.

        The authors' code does that at every hot step (`replicate`). An all-reduce of all hot rows' gradients, as of a dense layer's, would
        send twice as much.
        """
        return (len(step.samples) - 1) * self.hot_weights if step.kind == "hot" else 0.0

    def swaps(self, kinds: Iterable[Kind], ranks: int) -> Moved:
        """What FAE as published copies at the swaps of an epoch: hot rows to the GPUs before a hot phase, back to the host after it.

        One copy leaves the host, and the first GPU gives it to the others. The last phase's rows are brought back too: at the epoch's end
        the host's tables are tested, and the next epoch begins with cold batches.

        Args:
            kinds: of the steps, in their order.
            ranks: GPUs.
        """
        to_gpu, to_host = (self.hot_weights * float(copies) for copies in swap_counts(kinds))
        return Moved(sync_to_gpu=to_gpu, sync_to_host=to_host, between_gpus=(ranks - 1) * to_gpu, tier_read=to_gpu, tier_written=to_host)

    def ours(self, step: StepCounts, tier: ColdTier, owners: Mapping[str, int] | None = None) -> Moved:
        """FAE as this package does it, hot rows replicated.

        `host`: the host looks the cold ids up, and the rows of packed bags cross. `uvm`: the distinct cold rows cross with their optimizer
        state, once in and once back (staged on one GPU; with several a cache in front of UVM may save some of it).

        Args:
            step: what it looks up.
            tier: where cold rows are looked up.
            owners: table -> rank whose part of the cold tier has it; None: spread evenly.
        """
        exchanged = self.hot_exchange(step)
        ids = _ID_BYTES * float(step.ids.sum())
        if step.kind == "hot" or not self._may_be_cold.any():
            return Moved(ids=ids, between_gpus=exchanged)
        updated = self._row * float(step.distinct_cold.sum())
        if tier == "uvm":
            exchanged += self.cold_exchange(step, owners)
            return Moved(to_gpu=updated, to_host=updated, tier_read=updated, tier_written=updated, ids=ids, between_gpus=exchanged)
        given = self._given * float(self._cold_rows_given(step).sum())
        cold_ids = float(step.cold_ids.sum())
        return Moved(
            to_gpu=given,
            to_host=given,
            between_gpus=exchanged,
            ids=ids + _ID_BYTES * cold_ids,
            tier_read=self._weights * cold_ids + updated,
            tier_written=updated,
        )

    def hot_exchange(self, step: StepCounts) -> float:
        """What replicas send each other (`distributed.touched_rows`, `.compact_gradients`): counts, slots, gradients of touched rows."""
        ranks = len(step.samples)
        if ranks == 1:
            return 0.0
        zero_row = step.cold_ids.sum(axis=1) > 0  # a cold id stays in its bag as the row of zeros
        own = step.own_hot + zero_row
        union, longest, dim = step.union_hot + bool(zero_row.any()), int(own.max()), self._given // _GRADIENT_BYTES
        gathered = ranks * (ranks - 1)
        sent = gathered * float(_COUNT_BYTES * 3 + _SLOT_BYTES * longest)
        if ranks > 2 and reduces([[count] for count in own.tolist()], [dim], [union]):
            return sent + 2 * (ranks - 1) * float(union * self._given)
        return sent + gathered * float(longest * self._given)

    def cold_exchange(self, step: StepCounts, owners: Mapping[str, int] | None = None) -> float:
        """What a cold tier that is sharded table-wise sends: ids and lengths of cold bags to the owners, rows back, gradients again.

        Before them each rank tells the others three sizes (TorchRec's KJTAllToAll).
        """
        ranks = len(step.samples)
        if ranks == 1:
            return 0.0
        bags, rows = self._cold_bags_given(step), self._cold_rows_given(step)
        at_others = np.full(rows.shape, (ranks - 1) / ranks)
        if owners is not None:
            owner = np.array([owners.get(name, 0) for name, _ in self.tables.lookups])
            at_others = (owner != np.arange(ranks)[:, None]).astype(np.float64)
        each = _ID_BYTES * step.cold_ids + _LENGTH_BYTES * bags + 2 * self._given * rows
        return float((each * at_others * self._may_be_cold).sum()) + ranks * (ranks - 1) * 3 * _COUNT_BYTES

    def _cold_bags_given(self, step: StepCounts) -> npt.NDArray[np.int64]:
        """Bags of each lookup that the cold tier is given, [ranks, lookups]: packed ones as many as of the lookup with the most."""
        if not self._pooled:
            return np.broadcast_to(step.samples[:, None], step.ids.shape) * self._may_be_cold
        widest = np.maximum(step.cold_bags[:, self._may_be_cold].max(axis=1), 1)
        packed: npt.NDArray[np.int64] = widest[:, None] * self._may_be_cold
        return packed

    def _cold_rows_given(self, step: StepCounts) -> npt.NDArray[np.int64]:
        """Rows of each lookup that the cold tier gives, [ranks, lookups]."""
        return self._cold_bags_given(step) if self._pooled else step.cold_ids

    def _rows_of(self, batch: KeyedJaggedTensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ids as rows of all tables one after the other, lookup by lookup, and the lengths [lookups, samples]."""
        features = batch.to_dict()
        ids, lengths = [], []
        for (_, feature), table in zip(self.tables.lookups, self._table_of, strict=True):
            ids.append(features[feature].values().numpy() + self._first_row[table])
            lengths.append(features[feature].lengths().numpy())
        return np.concatenate(ids), np.stack(lengths)

    def _by_lookup(self, rows: npt.NDArray[np.int64], lengths: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], ...]:
        """Ids, cold ids and bags with a cold id, each [lookups]."""
        before = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(~self._hot[rows], out=before[1:])
        ends = np.concatenate([[0], np.cumsum(lengths.reshape(-1), dtype=np.int64)])
        cold = np.diff(before[ends]).reshape(lengths.shape)  # cold ids of each bag
        return lengths.sum(axis=1, dtype=np.int64), cold.sum(axis=1), (cold > 0).sum(axis=1)

    def _by_table(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many of ascending rows are in each table."""
        return np.diff(np.searchsorted(rows, self._first_row))


def swap_counts(kinds: Iterable[Kind]) -> tuple[int, int]:
    """How often hot rows are copied to the GPUs and back to the host in an epoch of batches of these kinds."""
    to_gpu = to_host = 0
    before: Kind = "cold"
    for kind in kinds:
        to_gpu += kind == "hot" and before != "hot"
        to_host += kind != "hot" and before == "hot"
        before = kind
    return to_gpu, to_host + (before == "hot")
