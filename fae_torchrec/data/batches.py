"""Batches, and what a loader says of one: its kind, the promise that it is hot, its weight, and where the epoch stands after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self  # Python 3.10

from fae_torchrec.core.schedule import Cursor, Kind


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


class AheadKeyedJaggedTensor(KeyedJaggedTensor):
    """A KeyedJaggedTensor that brings along what was made of its ids ahead of the step, on the host (`SplitAhead`).

    `to`, `pin_memory` and `record_stream` take that along; every other operation (`permute`, `split`, ...) returns a plain
    KeyedJaggedTensor, which is always right, only slower.

    Attributes:
        ahead: by the key of the collection it is for, what `BagSplit` gives; nothing where nobody split ahead.
    """

    ahead: Mapping[str, Any]

    @classmethod
    def of(cls, kjt: KeyedJaggedTensor, ahead: Mapping[str, Any]) -> Self:
        """`kjt` with something brought along, without copying it; what a subclass knows of it is kept."""
        kept = cls.__new__(cls)
        kept.__dict__.update(kjt.__dict__, ahead=ahead)
        return kept

    def to(self, device: torch.device, non_blocking: bool = False, dtype: torch.dtype | None = None) -> Self:
        """As KeyedJaggedTensor.to; everything comes along."""
        ahead = {key: ids.to(device, non_blocking) for key, ids in self.ahead.items()}
        return self._kept(super().to(device, non_blocking, dtype), ahead)

    def pin_memory(self) -> Self:
        """As KeyedJaggedTensor.pin_memory; everything comes along."""
        return self._kept(super().pin_memory(), {key: ids.pin_memory() for key, ids in self.ahead.items()})

    def record_stream(self, stream: torch.Stream) -> None:
        """As KeyedJaggedTensor.record_stream, for what comes along too."""
        super().record_stream(stream)
        for ids in self.ahead.values():
            ids.record_stream(stream)

    def _kept(self, kjt: KeyedJaggedTensor, ahead: Mapping[str, Any]) -> Self:
        return self.of(kjt, ahead)


class HotKeyedJaggedTensor(AheadKeyedJaggedTensor):
    """A KeyedJaggedTensor whose ids are all hot: an explicit promise by the loader.

    The sharded module skips the cold tier, collectives included, for this type. `to` and `pin_memory` keep the promise; every other
    operation (`permute`, `split`, ...) returns a plain KeyedJaggedTensor, which is always right, only slower.

    Attributes:
        one_each: every bag is known to have exactly one id, so that nobody need ask the device; seen when the promise was made on the CPU.
    """

    one_each: bool = False

    @classmethod
    def promise(cls, kjt: KeyedJaggedTensor) -> HotKeyedJaggedTensor:
        """Marks `kjt` as hot without copying it. The caller vouches that every id is hot under the placement in use."""
        hot = cls.of(kjt, getattr(kjt, "ahead", {}))
        lengths = kjt.lengths()
        hot.one_each = lengths.device.type == "cpu" and lengths.numel() == kjt.values().numel() and bool((lengths == 1).all())
        return hot

    def _kept(self, kjt: KeyedJaggedTensor, ahead: Mapping[str, Any]) -> Self:
        kept = super()._kept(kjt, ahead)
        kept.one_each = self.one_each
        return kept


def is_hot_batch(batch: Batch) -> bool:
    """Whether the loader promised that every id of every sample of this batch is hot."""
    return isinstance(batch.sparse_features, HotKeyedJaggedTensor)


class Position(NamedTuple):
    """Where a loader stands after a batch; the same on every rank.

    Attributes:
        epoch: passes finished before this one.
        window: window of the epoch, from 0.
        cold: cold (with the schedule "stock": mixed) steps of the window that were given out.
        hot: hot ones.
        cursor: where the schedule stands in the window.
    """

    epoch: int
    window: int
    cold: int
    hot: int
    cursor: Cursor


@dataclass
class HotColdBatch(Batch):
    """A batch of a HotColdDataLoader. Pipelines and models take it as the Batch that it is.

    A rank that has no sample of the step's kind takes part with a filler: one sample without ids, dense zeros, label 0 and weight 0.

    Attributes:
        kind: of the step, the same on every rank: "hot" (`sparse_features` is then a HotKeyedJaggedTensor), "cold", or "mixed".
        weight: what this rank's mean loss must be multiplied with, so that the gradient, averaged over ranks as DistributedDataParallel
            and TorchRec do, has every sample of the epoch with the same weight: samples here / batch size, 1 for a full batch. Of a "mixed"
            step: samples here * ranks / samples of all ranks, the mean over the step, as stock's last batch is.
        num_samples: real samples; 0 for a filler.
        sample_numbers: int64 [num_samples], a number for each sample that no other sample of the epoch has on any rank; on the CPU.
        position: what a checkpoint made after this batch's step remembers; None where nobody keeps one.
    """

    kind: Kind = "mixed"
    weight: float = 1.0
    num_samples: int = 0
    sample_numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    position: Position | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> HotColdBatch:
        """As Batch.to; what is said of the batch goes with it."""
        return self._like(super().to(device, non_blocking))

    def pin_memory(self) -> HotColdBatch:
        """As Batch.pin_memory; what is said of the batch goes with it."""
        return self._like(super().pin_memory())

    def _like(self, batch: Batch) -> HotColdBatch:
        return HotColdBatch(
            batch.dense_features,
            batch.sparse_features,
            batch.labels,
            self.kind,
            self.weight,
            self.num_samples,
            self.sample_numbers,
            self.position,
        )
