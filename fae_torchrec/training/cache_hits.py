"""CacheHits: which share of the rows that steps look up lies in the caches of UVM caching already, asked right before each lookup."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.types import ShardedModule


class CacheHits:
    """Counts on this rank, while it watches; nothing where no row is cached.

    FBGEMM 1.6 to 1.8, as in benchmarks/gpu_counts.py: the ids of all cached tables of a kernel are made one range, and looked up in the
    cache's state without changing it.

    Args:
        model: sharded.

    Attributes:
        rows: distinct cached-table rows of the steps so far, summed over steps and kernels.
        hits: those of them that lay in the cache.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kernels = [kernel for kernel in _kernels(model) if kernel.lxu_cache_weights.numel()]
        self.rows = 0.0
        self.hits = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts the lookups of a `with` block."""
        hooks = [kernel.register_forward_pre_hook(self._count, with_kwargs=True) for kernel in self._kernels]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        indices = kwargs["indices"] if "indices" in kwargs else args[0]
        offsets = kwargs["offsets"] if "offsets" in kwargs else args[1]
        rows = torch.unique(torch.ops.fbgemm.linearize_cache_indices(kernel.cache_hash_size_cumsum, indices, offsets))
        rows = rows[rows < kernel.total_cache_hash_size]  # beyond: of tables that are not cached
        found = torch.ops.fbgemm.lxu_cache_lookup(rows, kernel.lxu_cache_state, kernel.total_cache_hash_size)
        self.rows += rows.numel()
        self.hits += int((found >= 0).sum())


def _kernels(model: nn.Module) -> Iterator[Any]:
    """FBGEMM's fused kernels of all sharded modules, which keep their lookups out of nn.Module's registry."""
    for module in model.modules():
        if isinstance(module, ShardedModule):
            for lookup in getattr(module, "_lookups", ()):  # private, torchrec 1.6 and 1.8
                yield from (part for part in lookup.modules() if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen))
