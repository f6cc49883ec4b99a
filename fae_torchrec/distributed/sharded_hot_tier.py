"""Sharded hot tiers, table-wise or row-wise: the hot rows are tables of a stock sharded collection, for hot sets larger than one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.permute_pooled_embedding_modules import PermutePooledEmbeddings
from torch import nn
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import Awaitable, LazyAwaitable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Multistreamable

from fae_torchrec.core.tables import TableKind
from fae_torchrec.distributed.homes import LocalTable, local_tables
from fae_torchrec.distributed.step_count import StepCount
from fae_torchrec.distributed.touched_rows import check_kind
from fae_torchrec.modules.lookups import HotGroup, Lookup
from fae_torchrec.modules.tier_split import TieredIds


@dataclass
class ShardedHotInput(Multistreamable):
    """What the input dist of one batch gives the hot tier's lookup.

    Attributes:
        context: the stock context of the batch. It stands here, and not in the collection's own context, because the stock input dist
            begins only after the kind of the step was checked.
        features: what the stock input dist gave.
        ids: this rank's ids.
    """

    context: Multistreamable
    features: KJTList
    ids: TieredIds

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for part in (self.context, self.features, self.ids):
            part.record_stream(stream)


class ShardedHotTier:
    """The hot rows of one collection, each on one rank; what pooled and unpooled collections share.

    Args:
        module: the stock sharded collection of the hot rows: a table of so many rows for each table that has any, features keyed by lookup.
        groups: the groups of the TierSplit whose ids come in, not `by_group`.
        group: the ranks; None for one.

    Attributes:
        module: as given. Kept out of nn.Module's registry, as stock keeps its lookups.
        lookups: its grouped lookups, which hold the rows.
        group: as given.
        step_count: set by the module that has this tier; nothing to do here, where a kernel runs once in a step.
    """

    def __init__(self, module: Any, groups: Sequence[HotGroup], group: dist.ProcessGroup | None) -> None:
        self.module = module
        # Private in torchrec 1.8; the parity tests fail if it moves.
        self.lookups: list[nn.Module] = list(module._lookups)
        self.group = group
        self.step_count: StepCount | None = None
        self._in_order: list[Lookup] = [lookup for part in groups for lookup in part.lookups]
        tables = [table for part in groups for table in part.tables]
        firsts = accumulate((rows for _, rows in tables), initial=0)
        self._first_slot = {name: first for (name, _), first in zip(tables, firsts, strict=False)}

    def input_dist(self, ids: TieredIds, *, promised_hot: bool) -> Awaitable[Awaitable[ShardedHotInput]]:
        """Starts the check of the step's kind; on every rank at every step, also on one whose batch has no hot id.

        Args:
            ids: this rank's ids.
            promised_hot: the kind of this rank's batch; the ranks must agree.

        Returns:
            First wait: the kinds, checked on every rank alike before any other collective of this tier starts, and the counts of the stock
            input dist. Second wait: what the lookup takes.
        """
        kinds = check_kind(ids.misses, promised_hot=promised_hot, group=self.group)
        return _CheckedInputAwaitable(kinds, self, ids)

    @torch.no_grad()
    def stock_input_dist(self, ids: TieredIds) -> tuple[Multistreamable, Awaitable[KJTList]]:
        """Begins the stock input dist and waits for its counts: the stock context and what to wait for."""
        context = self.module.create_context()
        return context, self.module.input_dist(context, self._features(ids)).wait()

    def forward(self, rows: ShardedHotInput, step: int) -> Awaitable[torch.Tensor]:
        """Looks the hot rows up and starts the stock output dist.

        Args:
            rows: what `input_dist` gave.
            step: what `StepCount.advance` gave for this forward.

        Returns:
            On waiting: a new contiguous tensor, as the replicated tier's.
        """
        output = self.module.compute_and_output_dist(rows.context, rows.features)
        return _OutputAwaitable(self, output, rows.ids)

    def tables(self) -> Iterator[LocalTable]:
        """The hot rows that lie on this rank, and their optimizer state, as views."""
        return local_tables(self.lookups)

    def check_replicas(self) -> None:
        """Nothing to check: a row is on one rank."""

    def _features(self, ids: TieredIds) -> KeyedJaggedTensor:
        """The hot ids as the stock collection takes them: slots of a table, feature by feature."""
        raise NotImplementedError

    def join(self, output: Any, ids: TieredIds) -> torch.Tensor:
        """The stock collection's output as the tiers' join takes it."""
        raise NotImplementedError


class ShardedHotBags(ShardedHotTier):
    """The sharded hot tier of an EmbeddingBagCollection. Arguments: `ShardedHotTier`, and the device of the ids."""

    def __init__(self, module: Any, groups: Sequence[HotGroup], group: dist.ProcessGroup | None, device: torch.device) -> None:
        super().__init__(module, groups, group)
        at = {lookup.key: i for i, lookup in enumerate(self._in_order)}
        # In stock's order of ranks, so that its input dist need not permute. Private in torchrec 1.8, and the keys of all that it gives.
        self._keys: list[str] = list(module._embedding_names)
        hot = [self._in_order[at[key]] for key in self._keys]
        none = [lookup for lookup in self._in_order if lookup.key not in self._keys]
        self._order = torch.tensor([at[key] for key in self._keys], dtype=torch.int32, device=device)
        self._first = torch.tensor([self._first_slot[lookup.table] for lookup in hot], dtype=torch.int32, device=device)
        self._none_dim = sum(lookup.dim for lookup in none)
        blocks = [*hot, *none]
        self._permute = PermutePooledEmbeddings(
            [lookup.dim for lookup in blocks], [blocks.index(lookup) for lookup in self._in_order], device
        )

    def _features(self, ids: TieredIds) -> KeyedJaggedTensor:
        (bags,) = ids.hot
        # int32, half the bytes to send.
        lengths = bags.offsets.diff().to(torch.int32).view(len(self._in_order), -1)
        slots = bags.slots.to(torch.int32)
        lengths, slots, weights = torch.ops.fbgemm.permute_2D_sparse_data(self._order, lengths, slots, bags.weights, slots.numel())
        counts = lengths.sum(1)
        slots -= torch.repeat_interleave(self._first, counts, output_size=slots.numel())
        samples = lengths.shape[1]
        return KeyedJaggedTensor(self._keys, slots, weights, lengths=lengths.view(-1), stride=samples, length_per_key=counts.tolist())

    def join(self, output: Any, ids: TieredIds) -> torch.Tensor:
        """[samples, columns of all lookups]: stock's columns in the order of the lookups, zeros for those without hot rows."""
        values = output.values()
        if self._none_dim:
            values = torch.nn.functional.pad(values, (0, self._none_dim))
        joined: torch.Tensor = self._permute(values)
        return joined


class ShardedHotSequences(ShardedHotTier):
    """The sharded hot tier of an EmbeddingCollection. Arguments: `ShardedHotTier`, and the device of the ids."""

    def __init__(self, module: Any, groups: Sequence[HotGroup], group: dist.ProcessGroup | None, device: torch.device) -> None:
        super().__init__(module, groups, group)
        hot = [i for i, lookup in enumerate(self._in_order) if lookup.kind is not TableKind.COLD]
        self._keys = [self._in_order[i].key for i in hot]
        self._hot = torch.tensor(hot, device=device)
        self._first = torch.tensor([self._first_slot[self._in_order[i].table] for i in hot], dtype=torch.int32, device=device)

    def _features(self, ids: TieredIds) -> KeyedJaggedTensor:
        """All hot ids of a lookup as one sample: stock gives a row for each, in their order."""
        assert ids.lengths is not None
        (bags,) = ids.hot
        ends = torch.ops.fbgemm.asynchronous_complete_cumsum(ids.lengths.sum(1))
        counts = bags.offsets.index_select(0, ends).diff().index_select(0, self._hot)
        slots = bags.slots.to(torch.int32) - torch.repeat_interleave(self._first, counts, output_size=bags.slots.numel())
        return KeyedJaggedTensor(self._keys, slots, lengths=counts, stride=1, length_per_key=counts.tolist())

    def join(self, output: Any, ids: TieredIds) -> torch.Tensor:
        """[ids, dim]: the rows of hot ids at their places, zeros at those of the cold ones."""
        rows = torch.cat([output[key].values() for key in self._keys])
        (bags,) = ids.hot
        count = bags.offsets.numel() - 1
        if rows.shape[0] == count:
            return rows
        at = torch.nonzero_static(bags.offsets.diff(), size=rows.shape[0]).squeeze(1)
        return rows.new_zeros(count, rows.shape[1]).index_copy(0, at, rows)


class _CheckedInputAwaitable(Awaitable[Awaitable[ShardedHotInput]]):
    """Waits for the kinds of all ranks, then begins the stock input dist, which takes no cold id, and waits for its counts."""

    def __init__(self, kinds: Awaitable[list[list[int]]], tier: ShardedHotTier, ids: TieredIds) -> None:
        super().__init__()
        self._kinds, self._tier, self._ids = kinds, tier, ids

    def _wait_impl(self) -> Awaitable[ShardedHotInput]:
        self._kinds.wait()
        return _InputAwaitable(*self._tier.stock_input_dist(self._ids), self._ids)


class _InputAwaitable(Awaitable[ShardedHotInput]):
    def __init__(self, context: Multistreamable, features: Awaitable[KJTList], ids: TieredIds) -> None:
        super().__init__()
        self._context, self._features, self._ids = context, features, ids

    def _wait_impl(self) -> ShardedHotInput:
        return ShardedHotInput(self._context, self._features.wait(), self._ids)


class _OutputAwaitable(Awaitable[torch.Tensor]):
    def __init__(self, tier: ShardedHotTier, output: LazyAwaitable[Any], ids: TieredIds) -> None:
        super().__init__()
        self._tier, self._output, self._ids = tier, output, ids

    def _wait_impl(self) -> torch.Tensor:
        return self._tier.join(self._output.wait(), self._ids)
