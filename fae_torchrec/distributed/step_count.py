"""One step count for the kernels of both tiers, whichever of them a batch uses and however often: what Adam's bias correction needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn


class StepCount:
    """Makes every fused kernel count the collection's forwards, as a stock kernel counts its own.

    Stock (FBGEMM 1.8's SplitTableBatchedEmbeddingBagsCodegen.forward): a kernel adds one to its count at each of its forwards, in training,
    in evaluation and without gradient alike, and hands it to the update that the forward's backward makes; every kernel runs at every
    forward of its collection, so all have the same count. Here a hot batch leaves the cold kernels out, and a replicated hot kernel runs
    twice in a step, for the lookup and for the update. So `advance` counts for all kernels, and what a kernel is about to add at its own
    forward is taken back before. Between steps, `iter` and `iter_cpu` of every kernel are what stock's would be.

    The count starts where stock's does: at a kernel's `iter`, which `set_optimizer_step` or a loaded state may have set before the first
    forward. A later change of `iter` does not reach the updates, as in stock. No checkpoint of TorchRec holds the count, here as there.

    Kernels of optimizers without a step count (SGD, Adagrad, row-wise Adagrad) are left alone: then nothing here costs anything.

    Args:
        lookups: the modules that hold the kernels of all tiers, as in `ShardedEmbeddingBagCollection._lookups`.
    """

    def __init__(self, lookups: Iterable[nn.Module]) -> None:
        modules = (module for lookup in lookups for module in lookup.modules())
        self._kernels: list[Any] = [module for module in modules if _counts_steps(module)]
        self._step: int | None = None  # of the latest forward; None before the first
        for kernel in self._kernels:
            kernel.register_forward_pre_hook(self._take_back)

    def advance(self) -> int:
        """Counts a forward of the collection; to be called before its lookups, in training and in evaluation, hot batches included.

        Returns:
            The number of this forward, for `resume`; 0 where no kernel counts.
        """
        if not self._kernels:
            return 0
        if self._step is None:  # as stock, which reads the device's `iter` once, at its first forward
            self._step = max(int(kernel.iter_cpu) or int(kernel.iter) for kernel in self._kernels)
        self._step += 1
        self.resume(self._step)
        return self._step

    def restart(self) -> None:
        """Takes the count from the kernels again at the next forward: a checkpoint may have set it."""
        self._step = None

    def resume(self, step: int) -> None:
        """Makes what kernels do until the next `advance` part of an earlier forward; to be called before the update in backward.

        The collection may have run forward again since: stock updates with the count of the forward that the gradient belongs to.

        Args:
            step: what `advance` returned for that forward.
        """
        for kernel in self._kernels:
            kernel.iter_cpu.fill_(step)
            kernel.iter.fill_(step)

    @staticmethod
    def _take_back(kernel: Any, _: Any) -> None:
        """Before a kernel's forward, which adds one to both counts. `iter` lies on the device and is written only, never read."""
        kernel.iter_cpu.sub_(1)
        kernel.iter.sub_(1)


def _counts_steps(module: nn.Module) -> bool:
    """Whether a module is a fused kernel whose optimizer needs its step: FBGEMM then has `iter` in the kernel's state."""
    return isinstance(module, SplitTableBatchedEmbeddingBagsCodegen) and "iter" in module.state_dict()
