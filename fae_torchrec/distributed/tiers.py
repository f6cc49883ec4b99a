"""StockTier: a stock sharded collection as a tier of a hot/cold one, and the context of a batch on its way through the tiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import Awaitable, LazyAwaitable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Multistreamable

from fae_torchrec.distributed.row_cache import RowCache
from fae_torchrec.distributed.rows_ahead import LookupAhead, RowsAhead
from fae_torchrec.distributed.staging import StagedBatch
from fae_torchrec.modules.lookups import TableConfig
from fae_torchrec.modules.tier_split import TieredIds


@dataclass
class FAEContext(Multistreamable):
    """What the input dist of one batch leaves for compute and output dist.

    Attributes:
        ids: the batch's ids by tier.
        cold: the cold tier's stock context, None for a hot batch and where no table has a cold row.
        left: the stock context of the tables left to stock sharding, None where there are none.
        ahead: the cold rows, where they were looked up before the batch's turn.
        staged: the batch, where its cold rows are brought beside the hot ones.
        sharding_contexts: as TorchRec's pipelines want them: one per awaitable, None where a tier of ours has none.
    """

    ids: TieredIds | None = None
    cold: Multistreamable | None = None
    left: Multistreamable | None = None
    ahead: RowsAhead | None = None
    staged: StagedBatch | None = None
    sharding_contexts: list[EmbeddingShardingContext | None] = field(default_factory=list)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for part in (self.ids, self.cold, self.left, self.staged):
            if part is not None:
                part.record_stream(stream)


class StockTier:
    """A stock sharded collection as a part of ours: the cold tier, or the tables left to stock sharding.

    Kept out of nn.Module's registry (as stock keeps its lookups): names and state are those of the whole collection.

    Args:
        module: the sharded stock module.
        tables: its tables.
        keys: keys of every batch it gets, in this order; stock remembers the order of its first.
    """

    def __init__(self, module: Any, tables: Sequence[TableConfig], keys: Sequence[str]) -> None:
        self.module = module
        self.tables = [table.name for table in tables]
        self.keys = list(keys)
        self.cache = RowCache(module._lookups)

    def input_dist(self, ctx: FAEContext, features: KeyedJaggedTensor) -> tuple[Multistreamable, list[Awaitable[Any]]]:
        """Starts the input dist of one batch.

        Returns:
            The stock context, whose sharding contexts are added to `ctx`, and the awaitables.
        """
        stock = self.module.create_context()
        awaitables = self.module.input_dist(stock, features).awaitables
        ctx.sharding_contexts.extend(stock.sharding_contexts)
        return stock, awaitables

    def look_up(self, stock: Multistreamable, inputs: Sequence[Any]) -> Any:
        """Looks a batch up and starts its output dist.

        Args:
            stock: the batch's stock context.
            inputs: what its input dist gave.

        Returns:
            What to `wait()` for: the stock collection's output.
        """
        output: LazyAwaitable[Any] = self.module.compute_and_output_dist(stock, KJTList(list(inputs)))
        self.cache.looked_up()
        return output

    def look_ahead(self, stock: Multistreamable, inputs: Sequence[Any], ahead: RowsAhead) -> None:
        """Looks a coming batch up and starts its output dist, as far as values go; its update keeps its own turn. Collective.

        A fused kernel takes learning rate and step count at its forward, which would be those of an earlier step here. So the lookup is
        made without gradient, and backward makes the forward that its update needs.

        Args:
            stock: the batch's stock context.
            inputs: what its input dist gave.
            ahead: gets the output.
        """
        lookups = self.module._lookups
        self.module._lookups = [LookupAhead(lookup, ahead) for lookup in lookups]
        try:
            ahead.output = self.look_up(stock, inputs)
        finally:
            self.module._lookups = lookups

    def prefetch(self, inputs: Sequence[Any], forward_stream: torch.Stream | None) -> None:
        """The stock prefetch of a batch's rows into the caches, on the current stream; nothing where the tier has none.

        Args:
            inputs: what the batch's input dist gave.
            forward_stream: where its forward will run.
        """
        if self.cache.prefetches:
            self.cache.before_prefetch()
            self.module.prefetch(KJTList(list(inputs)), forward_stream)

    def settle(self) -> None:
        """Brings cached rows home and empties the caches, what was prefetched included: the rows may be about to change (UVM caching)."""
        self.cache.forget()
        for lookup in self.module._lookups:
            lookup.flush()
            lookup.purge()
        self.cache.used()

    @property
    def input_dists(self) -> list[nn.Module]:
        """The stock input dists, whose exchange of splits TorchRec's pipelines fuse."""
        return list(self.module._input_dists)

    @property
    def num_inputs(self) -> int:
        """Awaitables that an input dist gives: one per sharding type."""
        return len(self.module._input_dists)

    def prime(self, device: torch.device, *, weighted: bool) -> None:
        """Runs one batch of empty bags through the input dist, which stock creates at its first batch.

        TorchRec's pipelines want it created once their first batch is in; theirs may be hot and never reach the cold tier.
        """
        none = torch.empty(0, dtype=torch.int64, device=device)
        weights = none.to(torch.float32) if weighted else None
        lengths = torch.zeros(len(self.keys), dtype=torch.int32, device=device)
        ctx = self.module.create_context()
        self.module.input_dist(ctx, KeyedJaggedTensor(self.keys, none, weights, lengths)).wait().wait()
