"""LocalTier: the cold tier of a single rank. Nothing is exchanged, so ids go straight into the stock kernel and rows straight out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.types import Awaitable, NoWait
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Multistreamable

from fae_torchrec.distributed.rows_ahead import LookupAhead, RowsAhead
from fae_torchrec.distributed.tiers import FAEContext, StockTier
from fae_torchrec.modules.lookups import TableConfig


@dataclass
class LocalIds(Multistreamable):
    """One batch's ids as FBGEMM's kernel takes them.

    Attributes:
        indices: int64 [ids], feature by feature.
        offsets: int64 [features x samples + 1].
        weights: float32 [ids] or None.
    """

    indices: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor | None

    def device(self) -> torch.device:
        """Where they lie."""
        return self.indices.device

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for part in (self.indices, self.offsets, self.weights):
            if part is not None:
                part.record_stream(stream)


@dataclass
class _NoContext(Multistreamable):
    """The context of a batch that is not exchanged."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Nothing to keep."""


class _PooledHere:
    """Pooled rows that are there already: as much of an awaitable KeyedTensor as joining the tiers asks for."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def wait(self) -> _PooledHere:
        """Itself."""
        return self

    def values(self) -> torch.Tensor:
        """[samples, columns]."""
        return self._values


class LocalTier(StockTier):
    """A stock sharded EmbeddingBagCollection as the cold tier of a single rank, past its input and output dists.

    What it computes is what the stock module computes: the same FBGEMM kernel on the same ids. The stock module holds the rows, and gives
    and takes the state. Arguments: `StockTier`, for a module that `fits`.
    """

    def __init__(self, module: Any, tables: Sequence[TableConfig], keys: Sequence[str]) -> None:
        super().__init__(module, tables, keys)
        (group,) = _groups(module)
        names: list[str] = group.config.feature_names()
        self._kernel: Any = group.emb_module
        self._permutation = [] if names == self.keys else [self.keys.index(name) for name in names]

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether all tables lie in one fused kernel, as table-wise ones of a rank with the same dtype and optimizer do (TorchRec 1.8)."""
        groups = _groups(module)
        return len(groups) == 1 and isinstance(groups[0].emb_module, SplitTableBatchedEmbeddingBagsCodegen)

    def input_dist(self, ctx: FAEContext, features: KeyedJaggedTensor) -> tuple[Multistreamable, list[Awaitable[Any]]]:
        """As StockTier's; nothing is exchanged."""
        if self._permutation:
            features = features.permute(self._permutation)
        ids = LocalIds(features.values().to(torch.int64), features.offsets().to(torch.int64), features.weights_or_none())
        ctx.sharding_contexts.append(None)
        return _NoContext(), [NoWait(NoWait(ids))]

    def look_up(self, stock: Multistreamable, inputs: Sequence[Any]) -> Any:
        """As StockTier's."""
        (ids,) = inputs
        output = _PooledHere(self._rows(ids))
        self.cache.looked_up()
        return output

    def look_ahead(self, stock: Multistreamable, inputs: Sequence[Any], ahead: RowsAhead) -> None:
        """As StockTier's."""
        (ids,) = inputs
        ahead.output = _PooledHere(LookupAhead(self._rows, ahead)(ids))

    def prefetch(self, inputs: Sequence[Any], forward_stream: torch.Stream | None) -> None:
        """As StockTier's."""
        if self.cache.prefetches:
            (ids,) = inputs
            self.cache.before_prefetch()
            self._kernel.prefetch(ids.indices, ids.offsets, forward_stream)

    @property
    def num_inputs(self) -> int:
        """Awaitables that an input dist gives."""
        return 1

    @property
    def input_dists(self) -> list[nn.Module]:
        """None: TorchRec's pipelines have nothing to fuse."""
        return []

    def prime(self, device: torch.device, *, weighted: bool) -> None:
        """Nothing to prime."""

    def _rows(self, ids: LocalIds) -> torch.Tensor:
        values: torch.Tensor = self._kernel(ids.indices, ids.offsets, ids.weights)
        return values


def _groups(module: Any) -> list[Any]:
    """The groups of tables that share a kernel. Private in torchrec 1.6 to 1.8; the parity tests fail if one moves."""
    return [group for lookup in module._lookups for group in getattr(lookup, "_emb_modules", [])]
