"""RowCache: the caches that UVM caching keeps in front of a tier's rows, and in which order streams may touch them.

FBGEMM 1.6 to 1.8, read in SplitTableBatchedEmbeddingBagsCodegen: with `prefetch_pipeline` a prefetch locks the rows that it brings until
the backward of their batch; a backward waits for the prefetch stream before it updates, and the next prefetch waits for that backward. What
FBGEMM leaves to its caller is here: a prefetch must come after whatever a forward last did to the cache, a forward without backward must
let its rows go, and rows that were prefetched for a batch must be let go before another one is looked up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn


class RowCache:
    """The caches of one tier that are prefetched into; there are none on the CPU, nor without UVM caching and `prefetch_pipeline`.

    Args:
        lookups: the stock grouped lookups that hold the tier's kernels.

    Attributes:
        prefetches: whether there are such caches.
    """

    def __init__(self, lookups: Iterable[nn.Module]) -> None:
        modules = (module for lookup in lookups for module in lookup.modules())
        kernels = (module for module in modules if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen))
        self._kernels: list[Any] = [kernel for kernel in kernels if kernel.prefetch_pipeline and kernel.lxu_cache_weights.numel()]
        self.prefetches = bool(self._kernels)
        self._used: torch.cuda.Event | None = None

    def used(self) -> None:
        """Tells that this stream has just queued something that changes the caches other than a prefetch or a backward."""
        if self.prefetches:
            self._used = self._used or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._used.record()

    def before_prefetch(self) -> None:
        """Makes this stream, which is about to prefetch, wait for what `used` told of, and FBGEMM wait for this stream."""
        stream = torch.cuda.current_stream()
        if self._used is not None:
            stream.wait_event(self._used)
        for kernel in self._kernels:
            if kernel.prefetch_stream not in (None, stream):  # another pipeline's; FBGEMM would go on waiting for that one
                stream.wait_stream(kernel.prefetch_stream)
            kernel.prefetch_stream = stream

    def looked_up(self) -> None:
        """Tells of a forward. One that no backward can follow lets its rows go: else evaluations would fill the caches with locked rows."""
        if not self.prefetches:
            return
        if not torch.is_grad_enabled():
            for kernel in self._kernels:
                self._unlock(kernel, kernel.lxu_cache_locations)
        self.used()

    def forget(self) -> None:
        """Takes back what was prefetched and no forward has used: the next forward is another batch's. The rows stay, unlocked."""
        for kernel in self._kernels:
            if kernel.lxu_cache_locations_list:
                torch.cuda.current_stream().wait_stream(kernel.prefetch_stream)
            for locations in kernel.lxu_cache_locations_list:
                self._unlock(kernel, locations)
            kernel.lxu_cache_locations_list.clear()
            kernel.timesteps_prefetched.clear()
        self.used()

    @staticmethod
    def _unlock(kernel: Any, locations: torch.Tensor) -> None:
        torch.ops.fbgemm.lxu_cache_locking_counter_decrement(kernel.lxu_cache_locking_counter, locations)
