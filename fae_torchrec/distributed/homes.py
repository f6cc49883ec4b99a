"""Homes of hot rows: the places in the stock-sharded tables that hot rows are read from and written back to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding, BatchedFusedEmbeddingBag
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingType, ShardMetadata

from fae_torchrec.distributed.process_group import sum_of_disjoint


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

    The home of a split table's row is in the cold tier. An all-hot table has no cold rows: its home is the replica of one owner rank.

    Args:
        hot: lists the hot rows that lie on this rank.
        cold: lookups of the cold tier; a home lies on one rank.
        hot_ids: home of each slot by table, int64 [hot rows]; only of split tables.
        owned: all-hot tables whose home is this rank's replica.
        group: the ranks of the cold tier.
    """

    def __init__(
        self,
        hot: Callable[[], Iterable[LocalTable]],
        cold: Iterable[nn.Module],
        hot_ids: Mapping[str, torch.Tensor],
        owned: Iterable[str],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._hot = hot
        self._cold: list[Any] = list(cold)
        self._hot_ids = hot_ids
        self._owned = set(owned)
        self._group = group
        self._current = True

    def hot_rows_change(self) -> None:
        """Tells that the hot rows are about to be updated, so that their homes will be behind."""
        self._current = False

    @torch.no_grad()
    def write_back(self) -> None:
        """Writes every hot row to its home. No collective where the hot tier is replicated: a rank writes the homes that lie with it.

        Does nothing where no hot row has changed since homes and hot rows were last the same: the homes may since have been loaded in
        place (torch.distributed.checkpoint loads into the tensors that `state_dict` gave), and must not be overwritten.
        """
        self._settle()
        if self._current:
            return
        hot = {table.table: table.tensors() for table in self._hot()}
        for shard in local_tables(self._cold):
            if shard.table not in self._hot_ids:
                continue
            slots, rows = self._rows_here(shard)
            for name, home in shard.tensors().items():
                home[rows] = _columns(hot[shard.table][name], shard, home)[slots].to(home.device)
        self._current = True

    @torch.no_grad()
    def promote(self) -> None:
        """Reads every hot row from its home, for example after a checkpoint was loaded. Collective: all ranks take part."""
        shards: dict[str, list[LocalTable]] = {}
        self._settle()
        for shard in local_tables(self._cold):
            shards.setdefault(shard.table, []).append(shard)
        for table in self._hot():
            for name, hot in table.tensors().items():
                if table.table in self._hot_ids:
                    rows_of_all = torch.zeros_like(hot)
                    for shard in shards.get(table.table, []):
                        home = shard.tensors()[name]
                        slots, rows = self._rows_here(shard)
                        _columns(rows_of_all, shard, home)[slots] = home[rows].to(hot.device)
                elif table.table in self._owned:
                    rows_of_all = hot.clone()
                else:
                    rows_of_all = torch.zeros_like(hot)
                sum_of_disjoint(rows_of_all, self._group)
                hot.copy_(rows_of_all)
        self._current = True

    def _rows_here(self, shard: LocalTable) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots whose home lies in this shard, and the local row of each."""
        ids = self._hot_ids[shard.table]
        rows = ids - shard.row_offset
        slots = ((rows >= 0) & (rows < shard.weights.shape[0])).nonzero().squeeze(1)
        return slots, rows[slots].to(shard.weights.device)

    def _settle(self) -> None:
        """Brings cached rows of the cold tier home first, and forgets the cache: its rows may be about to change (UVM caching)."""
        for lookup in self._cold:
            lookup.flush()
            lookup.purge()


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
