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
    """One batch's ids as FBGEMM's kernels take them.

    Attributes:
        parts: by kernel: indices int64 [ids], feature by feature; offsets int64 [features x samples + 1]; weights float32 [ids] or None.
    """

    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]

    def device(self) -> torch.device:
        """Where they lie."""
        return self.parts[0][0].device

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for part in self.parts:
            for tensor in part:
                if tensor is not None:
                    tensor.record_stream(stream)


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
        groups = _groups(module)
        names = [group.config.feature_names() for group in groups]
        self._kernels: list[Any] = [group.emb_module for group in groups]
        self._counts = [len(of_kernel) for of_kernel in names]
        order = [self.keys.index(name) for of_kernel in names for name in of_kernel]
        self._permutation = [] if order == list(range(len(order))) else order
        self._order = torch.tensor(order, dtype=torch.int32)

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether all tables lie in fused kernels of one sharding type, as table-wise ones do (TorchRec 1.6 to 1.8)."""
        fused = [isinstance(group.emb_module, SplitTableBatchedEmbeddingBagsCodegen) for group in _groups(module)]
        return len(module._lookups) == 1 and bool(fused) and all(fused)

    def input_dist(self, ctx: FAEContext, features: KeyedJaggedTensor) -> tuple[Multistreamable, list[Awaitable[Any]]]:
        """As StockTier's; nothing is exchanged."""
        if self._permutation:
            if self._order.device != features.device():
                self._order = self._order.to(features.device())  # kept: made anew, the host would wait for it at every step
            features = features.permute(self._permutation, self._order)
        parts = [features] if len(self._counts) == 1 else features.split(self._counts)
        ids = LocalIds([(part.values().to(torch.int64), part.offsets().to(torch.int64), part.weights_or_none()) for part in parts])
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
            for kernel, (indices, offsets, _) in zip(self._kernels, ids.parts, strict=True):
                kernel.prefetch(indices, offsets, forward_stream)

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
        rows = [kernel(*part) for kernel, part in zip(self._kernels, ids.parts, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _groups(module: Any) -> list[Any]:
    """The groups of tables that share a kernel. Private in torchrec 1.6 to 1.8; the parity tests fail if one moves."""
    return [group for lookup in module._lookups for group in getattr(lookup, "_emb_modules", [])]
