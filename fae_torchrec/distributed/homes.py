"""Homes of hot rows: the places in the stock-sharded tables that hot rows are read from and written back to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding, BatchedFusedEmbeddingBag
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingType, ShardMetadata

from fae_torchrec.distributed.process_group import sum_of_disjoint

PART_BYTES = 64 * 2**20
"""How much of a table travels at a time between hot rows and homes."""


@dataclass(frozen=True)
class LocalTable:
    """This rank's shard of one table in a fused kernel; the tensors are views, so writing to them changes the kernel.

    Attributes:
        table: table name.
        row_offset: first row of the table that lies here.
        col_offset: first column of the table that lies here.
        weights: [local rows, local columns].
        state: optimizer state by FBGEMM's name; [local rows] (row-wise), [local rows, local columns], or one value for the whole kernel.
        kernel: the stock kernel that holds it.
    """

    table: str
    row_offset: int
    col_offset: int
    weights: torch.Tensor
    state: Mapping[str, torch.Tensor]
    kernel: BatchedFusedEmbedding | BatchedFusedEmbeddingBag

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and per-row optimizer state by name."""
        return {"weight": self.weights, **{name: state for name, state in self.state.items() if self._by_row(state)}}

    def rows_of(self, table: str, first: int, rows: int) -> LocalTable:
        """The part of a merged table that is one table: its rows `first`..`first + rows - 1`."""
        part = slice(first, first + rows)
        state = {name: state[part] if self._by_row(state) else state for name, state in self.state.items()}
        return LocalTable(table, 0, 0, self.weights[part], state, self.kernel)

    def _by_row(self, state: torch.Tensor) -> bool:
        rows = self.weights.shape[0]
        return state.shape[:1] == (rows,) and (rows > 1 or state.dtype.is_floating_point)  # a step count is an integer


def local_tables(lookups: Iterable[nn.Module]) -> Iterator[LocalTable]:
    """Lists the tables that lie in the fused kernels of some lookups of a sharded module.

    Args:
        lookups: grouped lookups, as in `ShardedEmbeddingBagCollection._lookups`.
    """
    for lookup in lookups:
        for kernel in lookup.modules():
            if not isinstance(kernel, (BatchedFusedEmbedding, BatchedFusedEmbeddingBag)):
                continue
            states = kernel.emb_module.get_optimizer_state()  # empty for SGD
            for table, weights, state in zip_longest(kernel.config.embedding_tables, kernel.split_embedding_weights(), states):
                offsets = table.local_metadata.shard_offsets
                yield LocalTable(table.name, offsets[0], offsets[1], weights.detach(), state or {}, kernel)


class Homes:
    """Moves hot rows between the hot tier and their homes: weights and optimizer state, only hot rows, never a whole table.

    The home of a split table's row is in the cold tier. An all-hot table has no cold rows: where the hot tier is replicated, its home is
    the replica of one owner rank; where it is sharded, its hot rows are their own home and never move.

    Args:
        hot: lists the hot rows that lie on this rank.
        cold: lookups of the cold tier; a home lies on one rank.
        hot_ids: home of each slot by table, int64 [hot rows], on the device that the ranks communicate on; only of split tables.
        owned: all-hot tables whose home is this rank's replica.
        group: the ranks of both tiers.
        settle: brings what caches of the cold tier hold home and empties them; called before homes are read or written.
        replicated: whether every rank holds every hot row. If not, constructing is a collective.
    """

    def __init__(
        self,
        hot: Callable[[], Iterable[LocalTable]],
        cold: Iterable[nn.Module],
        hot_ids: Mapping[str, torch.Tensor],
        owned: Iterable[str],
        group: dist.ProcessGroup | None,
        settle: Callable[[], None] = lambda: None,
        *,
        replicated: bool = True,
    ) -> None:
        self._hot = hot
        self._cold: list[Any] = list(cold)
        self._hot_ids = hot_ids
        self._owned = set(owned)
        self._group = group
        self._settle = settle
        self._replicated = replicated
        self._current = True
        self._layout = self._new_layout()

    def hot_rows_change(self) -> None:
        """Tells that the hot rows are about to be updated, so that their homes will be behind; on every rank at the same steps."""
        self._current = False

    @torch.no_grad()
    def write_back(self) -> None:
        """Writes every hot row to its home.

        Where the hot tier is replicated, a rank writes the homes that lie with it and no collective is needed. Where it is sharded, this
        is a collective and all ranks take part: the hot rows travel to the ranks of their homes, a bounded part of a table at a time.

        Does nothing where no hot row has changed since homes and hot rows were last the same: the homes may since have been loaded in
        place (torch.distributed.checkpoint loads into the tensors that `state_dict` gave), and must not be overwritten.
        """
        self._settle()
        if self._current:
            return
        hot, homes = _by_table(self._hot()), _by_table(local_tables(self._cold))
        for table, name, part in self._parts(self._hot_ids):
            rows = self._hot_rows(hot.get(table, []), table, name, part)
            for shard in homes.get(table, []):
                home = shard.tensors()[name]
                slots, at = self._homes_in(shard, part)
                home[at] = _columns(rows, shard, home)[slots].to(home.device)
        self._current = True

    @torch.no_grad()
    def promote(self) -> None:
        """Reads every hot row from its home, for example after a checkpoint was loaded. Collective: all ranks take part."""
        self._settle()
        hot, homes = _by_table(self._hot()), _by_table(local_tables(self._cold))
        for table, name, part in self._parts(self._layout):
            rows = self._layout[table][name].zeros(part)
            for shard in homes.get(table, []):
                home = shard.tensors()[name]
                slots, at = self._homes_in(shard, part)
                _columns(rows, shard, home)[slots] = home[at].to(rows.device)
            if table in self._owned:
                rows.copy_(hot[table][0].tensors()[name][part])
            sum_of_disjoint(rows, self._group)
            for shard in hot.get(table, []):
                here, there = _overlap(shard, part)
                shard.tensors()[name][here] = rows[there]
        self._current = True

    def _new_layout(self) -> dict[str, dict[str, _Layout]]:
        """The tensors that move, by table and name: the same on every rank, though a rank may hold no hot row of a table."""
        mine: dict[str, dict[str, _Layout]] = {}
        for shard in self._hot():
            if self._replicated or shard.table in self._hot_ids:
                rows = self._hot_ids[shard.table].numel() if shard.table in self._hot_ids else shard.weights.shape[0]
                mine[shard.table] = {name: _Layout.of(tensor, rows) for name, tensor in shard.tensors().items()}
        if self._replicated or self._group is None:
            return mine
        of_all: list[dict[str, dict[str, _Layout]]] = [{}] * self._group.size()
        dist.all_gather_object(of_all, mine, group=self._group)
        known = {table: layout for of_rank in of_all for table, layout in of_rank.items()}
        return {
            table: {name: replace(layout, device=ids.device) for name, layout in known[table].items()}
            for table, ids in self._hot_ids.items()
        }

    def _parts(self, tables: Iterable[str]) -> Iterator[tuple[str, str, slice]]:
        """Table, tensor and slots of every piece that moves at a time; the same on every rank."""
        for table in tables:
            for name, layout in self._layout[table].items():
                for first in range(0, layout.rows, layout.rows_at_a_time):
                    yield table, name, slice(first, min(first + layout.rows_at_a_time, layout.rows))

    def _hot_rows(self, shards: list[LocalTable], table: str, name: str, part: slice) -> torch.Tensor:
        """The hot rows of some slots, from whichever rank holds them."""
        if self._replicated:
            return shards[0].tensors()[name][part]
        rows = self._layout[table][name].zeros(part)
        for shard in shards:
            here, there = _overlap(shard, part)
            rows[there] = shard.tensors()[name][here]
        sum_of_disjoint(rows, self._group)
        return rows

    def _homes_in(self, shard: LocalTable, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of some slots, counted from the first of them, have their home in this shard, and the local row of each."""
        rows = self._hot_ids[shard.table][part] - shard.row_offset
        slots = ((rows >= 0) & (rows < shard.weights.shape[0])).nonzero().squeeze(1)
        return slots, rows[slots].to(shard.weights.device)


@dataclass(frozen=True)
class _Layout:
    """One tensor of a table's hot rows, whole.

    Attributes:
        rows: hot rows.
        row: shape of a row; () for row-wise optimizer state.
        dtype: of the elements.
        device: where hot rows lie.
    """

    rows: int
    row: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor, rows: int) -> _Layout:
        return _Layout(rows, tuple(tensor.shape[1:]), tensor.dtype, tensor.device)

    @property
    def rows_at_a_time(self) -> int:
        """As many as are moved together, so that no device has to hold the hot rows of a table that are spread over many."""
        return max(1, PART_BYTES // (math.prod(self.row) * self.dtype.itemsize))

    def zeros(self, part: slice) -> torch.Tensor:
        """Room for some of the rows."""
        return torch.zeros((part.stop - part.start, *self.row), dtype=self.dtype, device=self.device)


def whole_table(rows: int, dim: int, rank: int, device: torch.device, ranks: list[int] | None = None) -> ParameterSharding:
    """Stock words for "this rank holds the whole table in a fused kernel".

    Args:
        rows: of the table.
        dim: columns of the table.
        rank: who holds it.
        device: where.
        ranks: who shards it, if not that rank: [0] in an environment of this rank alone.
    """
    shard = ShardMetadata(shard_offsets=[0, 0], shard_sizes=[rows, dim], placement=f"rank:{rank}/{device}")
    return ParameterSharding(
        sharding_type=ShardingType.TABLE_WISE.value,
        compute_kernel=EmbeddingComputeKernel.FUSED.value,
        ranks=[rank] if ranks is None else ranks,
        sharding_spec=EnumerableShardingSpec([shard]),
    )


def _columns(hot: torch.Tensor, shard: LocalTable, home: torch.Tensor) -> torch.Tensor:
    """The columns of a hot tensor that lie in this shard; row-wise state has none."""
    return hot if home.dim() == 1 else hot[:, shard.col_offset : shard.col_offset + home.shape[1]]


def _by_table(shards: Iterable[LocalTable]) -> dict[str, list[LocalTable]]:
    tables: dict[str, list[LocalTable]] = {}
    for shard in shards:
        tables.setdefault(shard.table, []).append(shard)
    return tables


def _overlap(shard: LocalTable, part: slice) -> tuple[slice, slice]:
    """The slots of a part that lie in a shard of hot rows: counted from the shard's first row, and from the part's first slot."""
    first = max(shard.row_offset, part.start)
    end = max(first, min(shard.row_offset + shard.weights.shape[0], part.stop))
    return slice(first - shard.row_offset, end - shard.row_offset), slice(first - part.start, end - part.start)
