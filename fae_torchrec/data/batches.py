"""Batches and the promise that one is hot: a KeyedJaggedTensor type that survives copies, pinning and streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


class BatchSource(Protocol):
    """What every reader and generator offers: a stream of batches, the same on every pass.

    Attributes:
        feature_names: keys of the KeyedJaggedTensor, in order.
        num_dense: columns of `dense_features`.
    """

    feature_names: tuple[str, ...]
    num_dense: int

    @property
    def num_samples(self) -> int:
        """Samples in one pass over all ranks."""
        ...

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One pass over this rank's share.

        Every rank gets floor(num_samples / world_size) samples (the remainder, fewer than `world_size` samples, is dropped), in
        batches of `batch_size` samples; the last may be smaller. Global step k's samples are consecutive in the data and are
        dealt to the ranks in contiguous runs, as TorchRec's own datasets do.

        Yields:
            Batches of dense [B, num_dense] float32, a KeyedJaggedTensor of int64 ids with F keys and stride B, labels [B] float32.
        """
        ...


class HotKeyedJaggedTensor(KeyedJaggedTensor):
    """A KeyedJaggedTensor whose ids are all hot: an explicit promise by the loader.

    The sharded module skips the cold tier, collectives included, for this type. `to` and `pin_memory` keep the promise; every other
    operation (`permute`, `split`, ...) returns a plain KeyedJaggedTensor, which is always right, only slower.
    """

    @classmethod
    def promise(cls, kjt: KeyedJaggedTensor) -> HotKeyedJaggedTensor:
        """Marks `kjt` as hot without copying it. The caller vouches that every id is hot under the placement in use."""
        hot = cls.__new__(cls)
        hot.__dict__.update(kjt.__dict__)
        return hot

    def to(self, device: torch.device, non_blocking: bool = False, dtype: torch.dtype | None = None) -> HotKeyedJaggedTensor:
        """As KeyedJaggedTensor.to; the copy is still promised to be hot."""
        return self.promise(super().to(device, non_blocking, dtype))

    def pin_memory(self) -> HotKeyedJaggedTensor:
        """As KeyedJaggedTensor.pin_memory; the copy is still promised to be hot."""
        return self.promise(super().pin_memory())


def is_hot_batch(batch: Batch) -> bool:
    """Whether the loader promised that every id of every sample of this batch is hot."""
    return isinstance(batch.sparse_features, HotKeyedJaggedTensor)
