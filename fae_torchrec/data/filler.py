"""Fillers: what a rank takes part with in a step for which it has no sample."""

from __future__ import annotations

from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.schedule import Kind
from fae_torchrec.data.batches import HotColdBatch, HotKeyedJaggedTensor, Position, is_hot_batch


def filler_like(batch: Batch, *, kind: Kind | None = None, position: Position | None = None) -> HotColdBatch:
    """Makes a batch that takes part in a step and changes nothing.

    Args:
        batch: any batch of the stream: its keys, dtypes, columns and device are taken, and whether its ids have weights.
        kind: of the step; None takes that of `batch` (a plain batch is "hot" if it is promised to be, else "mixed").
        position: of the step.

    Returns:
        One sample with an empty bag for every key, dense zeros and label 0; `weight` and `num_samples` are 0. Its ids are promised hot
        iff its kind is "hot".
    """
    if kind is None:
        kind = batch.kind if isinstance(batch, HotColdBatch) else "hot" if is_hot_batch(batch) else "mixed"
    kjt = batch.sparse_features
    weights = kjt.weights_or_none()
    sparse = KeyedJaggedTensor(
        keys=kjt.keys(),
        values=kjt.values().new_empty(0),
        weights=None if weights is None else weights.new_empty(0),
        lengths=kjt.lengths().new_zeros(len(kjt.keys())),
        stride=1,
    )
    return HotColdBatch(
        dense_features=batch.dense_features.new_zeros((1, *batch.dense_features.shape[1:])),
        sparse_features=HotKeyedJaggedTensor.promise(sparse) if kind == "hot" else sparse,
        labels=batch.labels.new_zeros((1, *batch.labels.shape[1:])),
        kind=kind,
        weight=0.0,
        num_samples=0,
        position=position,
    )
