"""The replicated hot tier (FAE's Embedding Replicator): every rank holds all hot rows in a stock fused kernel and applies the same update.

With one rank it is the local fused kernel. With more, only rows touched in the global batch travel: the input dist exchanges slots and
agrees on their union; forward looks the union up once and pools it locally; backward sums the union's compact gradient over the ranks,
and every rank's fused kernel applies the same update to the same rows, so the replicas stay bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.tw_sequence_sharding import TwSequenceEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.types import (
    Awaitable,
    EnumerableShardingSpec,
    NoWait,
    ParameterSharding,
    ShardingEnv,
    ShardingType,
    ShardMetadata,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Multistreamable

from fae_torchrec.core.errors import HotBatchError
from fae_torchrec.distributed.distinct_slots import distinct_slots, positions_among
from fae_torchrec.distributed.process_group import all_gather_single
from fae_torchrec.modules.pooling import block_permutation


@dataclass
class HotContext(Multistreamable):
    """What the input dist of one batch leaves for its lookup.

    Attributes:
        bags: with several ranks, the batch's own bags as positions in the union, keys = lookups; None with one rank.
    """

    bags: KeyedJaggedTensor | None = None

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        if self.bags is not None:
            self.bags.record_stream(stream)


class ReplicatedHotTier:
    """The hot rows of one collection, replicated on every rank.

    Args:
        tables: the hot tables as an unsharded collection on the meta device, one feature per lookup, SUM pooling; its parameters carry
            the marks of `apply_optimizer_in_backward`.
        fused_params: the sharder's fused parameters.
        env: the ranks.
        device: where the rows lie.

    Attributes:
        lookups: the stock grouped lookups that hold the rows.
    """

    def __init__(self, tables: EmbeddingBagCollection, fused_params: dict[str, Any] | None, env: ShardingEnv, device: torch.device) -> None:
        self.group = env.process_group if env.world_size > 1 else None
        configs = tables.embedding_bag_configs()
        plan = {config.name: _whole_table(config.num_embeddings, config.embedding_dim, env.rank, device) for config in configs}
        if self.group is not None:
            # Stochastic rounding (half precision on CUDA) draws on each rank's own random numbers: the replicas would drift apart.
            fused_params = {**(fused_params or {}), "stochastic_rounding": False}
        infos = ShardedEmbeddingBagCollection.create_grouped_sharding_infos(tables, plan, "embedding_bags.", fused_params)[
            ShardingType.TABLE_WISE.value
        ]
        local = ShardingEnv.from_local(world_size=1, rank=0)  # every rank looks its own rows up: no stock collective
        if self.group is None:
            sharding = TwPooledEmbeddingSharding(infos, local, device)
            self.lookups: list[GroupedPooledEmbeddingsLookup | GroupedEmbeddingsLookup] = [sharding.create_lookup()]
            self._keep_order(configs, sharding.feature_names(), device)
            return
        keys = {config.name: config.feature_names for config in configs}
        for info in infos:  # the union has one lookup per table, whatever its features
            info.embedding_config.feature_names = [info.embedding_config.name]
            info.embedding_config.embedding_names = [info.embedding_config.name]
        # An unpooled fused kernel holds tables of one dim only.
        dims = list(dict.fromkeys(info.embedding_config.embedding_dim for info in infos))
        shardings = [
            TwSequenceEmbeddingSharding([info for info in infos if info.embedding_config.embedding_dim == dim], local, device)
            for dim in dims
        ]
        self.lookups = [sharding.create_lookup() for sharding in shardings]
        tables_by_dim = [sharding.embedding_tables() for sharding in shardings]
        ordered = [table for group in tables_by_dim for table in group]
        self.table_names = [table.name for table in ordered]
        self._keep_order(configs, [key for table in ordered for key in keys[table.name]], device)
        self._dims = dims
        self._tables_per_dim = [len(group) for group in tables_by_dim]
        self._lookups_per_dim = [sum(len(keys[table.name]) for table in group) for group in tables_by_dim]
        # All slots in one sequence, in the kernels' order of tables, so that the union is one sorted tensor.
        first_slot = torch.tensor([0, *(table.num_embeddings for table in ordered)]).cumsum(0)
        table_of_lookup = torch.tensor([i for i, table in enumerate(ordered) for _ in keys[table.name]])
        self.num_slots = int(first_slot[-1])
        self.first_slot = first_slot.to(device)
        self._first_slot_of_lookup = first_slot[table_of_lookup].to(device)
        self._rows_of_lookup = first_slot.diff()[table_of_lookup].to(device)
        kernels = (kernel for kernel in self.lookups[0].modules() if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen))
        self._bounds_check_mode: int = next(kernels).bounds_check_mode_int
        self._out_of_bounds = torch.zeros(1, dtype=torch.int64, device=device)

    def _keep_order(self, configs: Sequence[EmbeddingBagConfig], kernel_keys: list[str], device: torch.device) -> None:
        """Remembers how to bring bags into the kernels' order of lookups (TorchRec groups tables), and columns back."""
        dims = {key: config.embedding_dim for config in configs for key in config.feature_names}
        keys = list(dims)
        self._to_kernel_order = None if keys == kernel_keys else [keys.index(key) for key in kernel_keys]
        self._in_order = block_permutation(kernel_keys, keys, dims, device)

    def input_dist(
        self, ctx: HotContext, slots: KeyedJaggedTensor, misses: torch.Tensor, *, promised_hot: bool
    ) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        """Starts the exchange of slots; on every rank at every step, also on one whose batch has no hot id.

        Args:
            ctx: filled for `forward`.
            slots: this rank's hot ids as slots, keys = the features of `tables` in order.
            misses: int64 [1], ids of a batch promised to be hot that are not.
            promised_hot: the kind of this rank's batch; the ranks must agree.

        Returns:
            First wait: the counts, checked on every rank alike, so that a broken promise or a disagreement raises on all ranks
            before any further collective. Second wait: what the lookup takes.
        """
        if self._to_kernel_order is not None:
            slots = slots.permute(self._to_kernel_order)
        if self.group is None:
            if promised_hot:
                _check_promise(misses.tolist(), [True])
            return NoWait(NoWait(slots))
        values, counts = self._in_bounds(slots), torch.tensor(slots.length_per_key(), device=slots.device())
        lookup = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=values.numel())
        mine = values + self._first_slot_of_lookup[lookup]
        return _CountsAwaitable(self, ctx, slots, mine, misses, promised_hot)

    def _in_bounds(self, slots: KeyedJaggedTensor) -> torch.Tensor:
        """The slots as int64, an id beyond an all-hot table treated as the stock kernel does (by default: a warning, and row 0).

        Before tables are laid in one sequence: there such an id would be another table's row.
        """
        values: torch.Tensor = slots.values().to(torch.int64, copy=True)
        if self._bounds_check_mode != BoundsCheckMode.NONE.value:
            torch.ops.fbgemm.bounds_check_indices(
                self._rows_of_lookup, values, slots.offsets().to(torch.int64), self._bounds_check_mode, self._out_of_bounds
            )
        return values.clamp_(min=0)  # FBGEMM lets -1 pass, a pruned row to its inference kernels

    def forward(self, ctx: HotContext, rows: KeyedJaggedTensor) -> torch.Tensor:
        """Pools this rank's bags.

        Args:
            ctx: what `input_dist` filled.
            rows: what `input_dist` returned.

        Returns:
            float32 [B, columns of the lookups in order] sums; its gradient updates the hot rows, averaged over ranks as stock does.
        """
        pooled: torch.Tensor = self.lookups[0](rows) if ctx.bags is None else self._pool_union(ctx.bags, rows)
        if self._in_order is not None:
            pooled = self._in_order(pooled)
        return pooled

    def _pool_union(self, all_bags: KeyedJaggedTensor, rows: KeyedJaggedTensor) -> torch.Tensor:
        """Looks the union up, once, and pools this rank's bags over it, dim by dim."""
        assert self.group is not None
        blocks, first_row = [], 0
        parts = zip(self.lookups, self._dims, rows.split(self._tables_per_dim), all_bags.split(self._lookups_per_dim), strict=True)
        for lookup, dim, rows_of_dim, bags in parts:
            union = _SumGradient.apply(lookup(rows_of_dim), self.group).view(-1, dim)  # type: ignore[no-untyped-call]
            offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(bags.lengths().to(torch.int64))
            sums = _pool_rows(union, bags.values() - first_row, offsets, bags.weights_or_none())
            blocks.append(sums.view(len(bags.keys()), bags.stride(), dim).transpose(0, 1).flatten(1))
            first_row += union.shape[0]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


class _CountsAwaitable(Awaitable[Awaitable[KeyedJaggedTensor]]):
    """Waits for every rank's counts, then starts the exchange of the slots themselves."""

    def __init__(
        self, tier: ReplicatedHotTier, ctx: HotContext, slots: KeyedJaggedTensor, mine: torch.Tensor, misses: torch.Tensor, hot: bool
    ) -> None:
        super().__init__()
        self._tier, self._ctx, self._slots, self._mine = tier, ctx, slots, mine
        self._unique = distinct_slots(mine, tier.num_slots)
        kind = torch.full((1,), int(hot), dtype=torch.int64, device=mine.device)
        counts = torch.cat([torch.full_like(kind, self._unique.numel()), misses, kind])
        self._counts = counts.new_empty(dist.get_world_size(tier.group) * counts.numel())
        self._sent = counts  # kept until the collective has read it
        self._work = all_gather_single(self._counts, counts, group=tier.group, async_op=True)

    def _wait_impl(self) -> Awaitable[KeyedJaggedTensor]:
        self._work.wait()
        counts, misses, kinds = self._counts.view(-1, 3).t().tolist()
        _check_promise(misses, [bool(kind) for kind in kinds])
        return _UnionAwaitable(self._tier, self._ctx, self._slots, self._mine, self._unique, counts)


class _UnionAwaitable(Awaitable[KeyedJaggedTensor]):
    """Waits for every rank's slots and indexes this rank's bags into their union."""

    def __init__(
        self,
        tier: ReplicatedHotTier,
        ctx: HotContext,
        slots: KeyedJaggedTensor,
        mine: torch.Tensor,
        unique: torch.Tensor,
        counts: list[int],
    ) -> None:
        super().__init__()
        self._tier, self._ctx, self._slots, self._mine, self._per_rank = tier, ctx, slots, mine, counts
        longest = max(counts)
        # Half the bytes; a hot tier of 2**31 rows would fit no device.
        self._sent = torch.nn.functional.pad(unique.to(torch.int32), (0, longest - unique.numel()))
        self._slots_of_all = self._sent.new_empty(len(counts) * longest)
        self._work = all_gather_single(self._slots_of_all, self._sent, group=tier.group, async_op=True)

    def _wait_impl(self) -> KeyedJaggedTensor:
        self._work.wait()
        per_rank = self._slots_of_all.view(len(self._per_rank), -1)
        of_all = torch.cat([slots[:count] for slots, count in zip(per_rank, self._per_rank, strict=True)])
        union = distinct_slots(of_all.to(torch.int64), self._tier.num_slots)
        slots = self._slots
        self._ctx.bags = KeyedJaggedTensor(
            keys=slots.keys(),
            values=positions_among(union, self._mine, self._tier.num_slots),
            lengths=slots.lengths(),
            weights=slots.weights_or_none(),
            stride=slots.stride(),
        )
        first = self._tier.first_slot
        bounds = torch.searchsorted(union, first)
        counts = bounds.diff()
        rows = union - torch.repeat_interleave(first[:-1], counts, output_size=union.numel())
        return KeyedJaggedTensor(keys=self._tier.table_names, values=rows, lengths=counts.to(slots.lengths().dtype), stride=1)


class _SumGradient(torch.autograd.Function):
    """Identity forward; backward sums the gradient over ranks and divides it by their number where stock TorchRec does."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()
        if grad.numel():  # the union is the same on every rank, so they skip together
            dist.all_reduce(grad, group=ctx.group)
            if get_gradient_division():
                grad.div_(ctx.group.size())
        return grad, None


def _pool_rows(rows: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if not rows.shape[0]:  # embedding_bag refuses an empty table; no rank has a hot id in this batch
        return rows.new_zeros(offsets.numel() - 1, rows.shape[1])
    sums: torch.Tensor = torch.nn.functional.embedding_bag(
        index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
    return sums


def _check_promise(misses: list[int], kinds: list[bool]) -> None:
    if any(kind != kinds[0] for kind in kinds):
        hot = [rank for rank, kind in enumerate(kinds) if kind]
        raise HotBatchError(
            f"the ranks disagree about this step: the batches of ranks {hot} are promised to be hot, the others are not; every rank "
            "must take the same kind of batch at every step: feed all ranks from a HotColdDataLoader with the same placement and `agree`"
        )
    if any(misses):
        counted = {rank: count for rank, count in enumerate(misses) if count}
        raise HotBatchError(
            f"a batch promised to be hot holds cold ids (ids per rank: {counted}); the loader and the model must use the same "
            "placement, or the batch must be passed as a plain KeyedJaggedTensor, which is always right"
        )


def _whole_table(rows: int, dim: int, rank: int, device: torch.device) -> ParameterSharding:
    """Stock words for "this rank holds the whole table in a fused kernel"."""
    shard = ShardMetadata(shard_offsets=[0, 0], shard_sizes=[rows, dim], placement=f"rank:{rank}/{device}")
    return ParameterSharding(
        sharding_type=ShardingType.TABLE_WISE.value,
        compute_kernel=EmbeddingComputeKernel.FUSED.value,
        ranks=[0],
        sharding_spec=EnumerableShardingSpec([shard]),
    )
