"""The replicated hot tier (FAE's Embedding Replicator): every rank holds all hot rows in stock fused kernels and applies the same update.

A rank looks its own bags up in its own replica: forward needs no exchange. In backward each rank sums its gradient over the distinct slots
of its batch, the ranks exchange these compact gradients (only rows touched in the global batch travel), and every rank's kernel applies
the same fused update to the same rows in the same order, so the replicas stay bit-identical. With one rank the kernel is simply used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torch.profiler import record_function
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.types import Awaitable, NoWait, QuantizedCommCodec, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.streamable import Multistreamable

from fae_torchrec.distributed.compact_gradients import EXCHANGES_HOT_GRADIENTS, exchange_compact_gradients
from fae_torchrec.distributed.homes import LocalTable, local_tables, whole_table
from fae_torchrec.distributed.replica_check import check_replicas
from fae_torchrec.distributed.step_count import StepCount
from fae_torchrec.distributed.touched_rows import TouchedRows, check_promise, exchange_touched_rows
from fae_torchrec.modules.lookups import HotGroup
from fae_torchrec.modules.pooling import join_groups
from fae_torchrec.modules.tier_split import HotBags, TieredIds


@dataclass
class OwnRows(Multistreamable):
    """How one group's gradient of bags is summed over this rank's distinct slots.

    Attributes:
        bags: int64 [hot ids]: the bag of each id, ids sorted by slot.
        starts: int64 [distinct slots + 1]: where each slot's ids start.
        weights: float32 [hot ids] or None, in the same order.
    """

    bags: torch.Tensor
    starts: torch.Tensor
    weights: torch.Tensor | None

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for tensor in (self.bags, self.starts, self.weights):
            if tensor is not None:
                tensor.record_stream(stream)


@dataclass
class HotInput(Multistreamable):
    """What the input dist of one batch gives the hot tier's lookup.

    Attributes:
        bags: this rank's hot ids, by group.
        own: with several ranks, how gradients are summed, by group.
        touched: with several ranks, the distinct slots of all ranks.
    """

    bags: list[HotBags]
    own: list[OwnRows]
    touched: TouchedRows | None

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        parts: list[Multistreamable | None] = [*self.bags, *self.own, self.touched]
        for part in parts:
            if part is not None:
                part.record_stream(stream)


class ReplicatedHotTier:
    """The hot rows of one collection, replicated on every rank.

    Args:
        groups: tables that share a kernel.
        tables: one merged table per group that has slots, as an unsharded collection on the meta device, in the order of the groups; its
            parameters carry the marks of `apply_optimizer_in_backward`.
        pooled: whether groups are laid side by side as columns (a row per sample), or one after the other as rows.
        fused_params: the sharder's fused parameters.
        env: the ranks.
        device: where the rows lie.
        codec: TorchRec's quantized communication of gradients, or None.

    Attributes:
        lookups: the stock grouped lookups that hold the rows.
        step_count: set by the module: the iteration that both tiers share.
    """

    def __init__(
        self,
        groups: Sequence[HotGroup],
        tables: EmbeddingBagCollection,
        *,
        pooled: bool,
        fused_params: dict[str, Any] | None,
        env: ShardingEnv,
        device: torch.device,
        codec: QuantizedCommCodec | None = None,
    ) -> None:
        self.group = env.process_group if env.world_size > 1 else None
        self.step_count: StepCount | None = None
        self._groups = list(groups)
        self._pooled = pooled
        self._codec = codec
        self._device = device
        # TierSplit has brought the ids into bounds, table by table: in a merged table a wrong id would be another table's row.
        # Nothing is cached here: `prefetch_pipeline`, meant for the cold tier, would make the backward look for cache locations.
        own = {"bounds_check_mode": BoundsCheckMode.NONE, "gradient_clipping": False, "prefetch_pipeline": False}
        params = {**(fused_params or {}), **own}
        if self.group is not None:
            # Stochastic rounding (half precision on CUDA) draws on each rank's own random numbers: the replicas would drift apart.
            params["stochastic_rounding"] = False
        configs = tables.embedding_bag_configs()
        plan = {config.name: whole_table(config.num_embeddings, config.embedding_dim, env.rank, device, [0]) for config in configs}
        infos = ShardedEmbeddingBagCollection.create_grouped_sharding_infos(tables, plan, "embedding_bags.", params)[
            ShardingType.TABLE_WISE.value
        ]
        local = ShardingEnv.from_local(world_size=1, rank=0)  # every rank looks its own rows up: no stock collective
        self.lookups: list[nn.Module] = [TwPooledEmbeddingSharding([info], local, device).create_lookup() for info in infos]
        kernels = (
            module for lookup in self.lookups for module in lookup.modules() if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)
        )
        self.kernels = [next(kernels) if group.num_slots else None for group in groups]
        # The row that stands for cold ids; updates write to it too. `.data`: between another forward and its backward it is zero anyway.
        self._zeros = [table.weights.data[0] for table in local_tables(self.lookups)]
        self._anchor = torch.empty(0, device=device, requires_grad=True)  # what makes autograd call a lookup's backward

    def input_dist(self, ids: TieredIds, *, promised_hot: bool) -> Awaitable[Awaitable[HotInput]]:
        """Starts the exchange of slots; on every rank at every step, also on one whose batch has no hot id.

        Args:
            ids: this rank's ids.
            promised_hot: the kind of this rank's batch; the ranks must agree.

        Returns:
            First wait: the counts, checked on every rank alike, so that a broken promise or a disagreement raises on all ranks
            before any further collective. Second wait: what the lookup takes.
        """
        if self.group is None:
            return _OwnInputAwaitable(ids, promised_hot)
        slots, own = zip(*(_own_rows(bags) for bags in ids.hot), strict=True)
        exchange = exchange_touched_rows(
            list(slots), ids.misses, promised_hot=promised_hot, group=self.group, may_reduce=self._codec is None
        )
        return _InputAwaitable(exchange, ids.hot, list(own))

    def forward(self, rows: HotInput, step: int) -> Awaitable[torch.Tensor]:
        """Sums this rank's hot ids; the gradient of the result updates the hot rows, averaged over ranks as stock does.

        Args:
            rows: what `input_dist` gave.
            step: what `StepCount.advance` gave for this forward.

        Returns:
            Contiguous: pooled, [samples, columns of all groups] in some shape; else [bags of all groups, dim]. There is nothing to wait
            for here: sharded hot tiers have this interface too.
        """
        if self.group is None:
            return NoWait(self._join(self._look_up(rows.bags)))
        joined: torch.Tensor = _Replicated.apply(self._anchor, self, rows, step)  # type: ignore[no-untyped-call]
        return NoWait(joined)

    def tables(self) -> Iterator[LocalTable]:
        """Every table's hot rows and their optimizer state, as views of this rank's replica."""
        kernels = iter(local_tables(self.lookups))
        for group in self._groups:
            if group.num_slots:
                merged, first = next(kernels), 1  # after the row of zeros
                for name, rows in group.tables:
                    yield merged.rows_of(name, first, rows)
                    first += rows

    def spare_rows(self) -> Iterator[LocalTable | None]:
        """By group, the rows behind the hot ones and their optimizer state, as views; None where a group has no slots."""
        kernels = iter(local_tables(self.lookups))
        for group in self._groups:
            merged = next(kernels) if group.num_slots else None
            first = 1 + group.num_slots
            yield None if merged is None else merged.rows_of("", first, merged.weights.shape[0] - first)

    def check_replicas(self) -> None:
        """See `replica_check.check_replicas`."""
        check_replicas(self.tables(), self.group)

    def _look_up(self, bags: list[HotBags]) -> list[torch.Tensor]:
        for row in self._zeros:
            row.zero_()
        return [
            kernel(part.slots, part.offsets, part.weights)
            if kernel is not None
            else torch.zeros(part.offsets.numel() - 1, group.dim, device=self._device)
            for kernel, group, part in zip(self.kernels, self._groups, bags, strict=True)
        ]

    def _join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return join_groups(parts, self._groups) if self._pooled else torch.cat(parts)

    def _part(self, grad: torch.Tensor, bags: list[HotBags]) -> list[torch.Tensor]:
        """The inverse of `_join`, for gradients: [bags, dim] by group."""
        if len(bags) == 1:
            return [grad]
        if not self._pooled:
            return list(grad.split_with_sizes([part.offsets.numel() - 1 for part in bags]))
        columns = [group.dim * len(group.lookups) for group in self._groups]
        return [part.reshape(-1, group.dim) for part, group in zip(grad.split_with_sizes(columns, dim=1), self._groups, strict=True)]

    def update(self, rows: HotInput, step: int, grad: torch.Tensor) -> None:
        """Applies the gradient of all ranks' bags to this rank's replica. Collective: all ranks take part.

        Args:
            rows: what `forward` took.
            step: as `forward`.
            grad: this rank's gradient of what `forward` gave.
        """
        assert self.group is not None and rows.touched is not None
        scale = self.group.size() if get_gradient_division() else 1
        own = [_sum_by_slot(part, how) / scale for part, how in zip(self._part(grad.contiguous(), rows.bags), rows.own, strict=True)]
        with record_function(EXCHANGES_HOT_GRADIENTS):
            of_all = exchange_compact_gradients(own, rows.touched, self.group, self._codec)
        if self.step_count is not None:
            self.step_count.resume(step)  # the update belongs to the step of its forward
        for kernel, (slots, grads) in zip(self.kernels, of_all, strict=True):
            if kernel is not None and slots.numel():
                with torch.enable_grad():
                    looked_up = kernel(slots, torch.arange(slots.numel() + 1, device=slots.device))
                looked_up.backward(grads)


class _OwnInputAwaitable(Awaitable[Awaitable[HotInput]]):
    """A single rank's input. The promise is looked at when waited for: by then the device has counted, and nobody waits for it."""

    def __init__(self, ids: TieredIds, promised_hot: bool) -> None:
        super().__init__()
        self._ids, self._promised_hot = ids, promised_hot

    def _wait_impl(self) -> Awaitable[HotInput]:
        if self._promised_hot:
            check_promise(self._ids.misses.tolist(), [True])
        return NoWait(HotInput(self._ids.hot, [], None))


class _InputAwaitable(Awaitable[Awaitable[HotInput]]):
    """Passes both waits of the exchange on, and adds this rank's own part."""

    def __init__(self, exchange: Awaitable[Awaitable[TouchedRows]], bags: list[HotBags], own: list[OwnRows]) -> None:
        super().__init__()
        self._exchange, self._bags, self._own = exchange, bags, own

    def _wait_impl(self) -> Awaitable[HotInput]:
        return _RowsAwaitable(self._exchange.wait(), self._bags, self._own)


class _RowsAwaitable(Awaitable[HotInput]):
    def __init__(self, touched: Awaitable[TouchedRows], bags: list[HotBags], own: list[OwnRows]) -> None:
        super().__init__()
        self._touched, self._bags, self._own = touched, bags, own

    def _wait_impl(self) -> HotInput:
        return HotInput(self._bags, self._own, self._touched.wait())


class _Replicated(torch.autograd.Function):
    """Looks the replica up; backward updates it by the gradients of all ranks, as the fused kernels do in theirs."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tier: ReplicatedHotTier, rows: HotInput, step: int) -> torch.Tensor:
        ctx.tier, ctx.rows, ctx.step = tier, rows, step
        return tier._join(tier._look_up(rows.bags))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
        ctx.tier.update(ctx.rows, ctx.step, grad)
        return None, None, None, None


def _own_rows(bags: HotBags) -> tuple[torch.Tensor, OwnRows]:
    """The distinct slots of a batch, int64 ascending, and how gradients are summed over them."""
    ids = bags.slots.numel()
    in_order, at = bags.slots.to(torch.int32).sort()  # half the time of int64
    distinct, counts = torch.unique_consecutive(in_order, return_counts=True)
    bag = torch.repeat_interleave(torch.arange(bags.offsets.numel() - 1, device=at.device), bags.offsets.diff(), output_size=ids)
    return distinct.to(torch.int64), OwnRows(
        bags=bag.index_select(0, at),
        starts=torch.ops.fbgemm.asynchronous_complete_cumsum(counts),
        weights=None if bags.weights is None else bags.weights.index_select(0, at),
    )


def _sum_by_slot(grad: torch.Tensor, how: OwnRows) -> torch.Tensor:
    """Sums the gradient of bags over the slots in them: the gradient taken as a table, a slot as a bag of its rows."""
    if not grad.shape[0]:  # embedding_bag refuses an empty table
        return grad.new_zeros(how.starts.numel() - 1, grad.shape[1])
    sums: torch.Tensor = torch.nn.functional.embedding_bag(
        how.bags, grad, how.starts, mode="sum", per_sample_weights=how.weights, include_last_offset=True
    )
    return sums
