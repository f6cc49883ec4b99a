"""What the tables of a sharded model really take on this rank, tier by tier, from the storages of FBGEMM's kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.types import ShardedModule

from fae_torchrec.distributed.hot_cold_module import ShardedHotColdModule


def tier_memory(model: nn.Module) -> dict[str, int]:
    """Bytes that the tables take on this rank: weights, optimizer state, caches and indices as they are allocated.

    Args:
        model: sharded.

    Returns:
        By purpose: "hot rows" (a staging area lies beside them), "index" (from id to slot), "cold tier" and "stock tables"; what the
        kernels keep of themselves (offsets and the like) is with their tables.
    """
    parts: dict[str, list[torch.Tensor]] = {"hot rows": [], "index": [], "cold tier": [], "stock tables": []}
    for module in model.modules():
        if isinstance(module, ShardedHotColdModule):
            parts["index"] += module.tier_split.buffers()
            parts["hot rows"] += _tensors(module._hot.lookups)
            parts["cold tier"] += _tensors(lookup for tier in module._cold for lookup in tier.module._lookups)
            parts["stock tables"] += _tensors(lookup for tier in module._left for lookup in tier.module._lookups)
        elif isinstance(module, ShardedModule):
            parts["stock tables"] += _tensors(getattr(module, "_lookups", ()))  # private, torchrec 1.6 and 1.8
    return {purpose: storage_bytes(tensors) for purpose, tensors in parts.items()}


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _tensors(lookups: Iterable[Any]) -> list[torch.Tensor]:
    kernels = (part for lookup in lookups for part in lookup.modules() if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen))
    return [tensor for kernel in kernels for tensor in (*kernel.parameters(), *kernel.buffers())]
