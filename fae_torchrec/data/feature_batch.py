"""Making a Batch of what a reader has read: ids by feature, with one id or a bag of ids per sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def one_hot_batch(names: Sequence[str], dense: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> Batch:
    """A batch in which every bag has one id. Nothing is copied: the batch owns the arrays from here on.

    Args:
        names: the F features.
        dense: float32 [B, D], contiguous.
        ids: int64 [F, B], contiguous.
        labels: float32 [B].
    """
    size = len(labels)
    count = len(names) * size
    sparse = KeyedJaggedTensor(
        keys=list(names),
        values=torch.from_numpy(ids.reshape(-1)),
        # numpy's fills, not torch's: the latter's threads would spin against pyarrow's, which parse the next lines meanwhile.
        lengths=torch.from_numpy(np.ones(count, dtype=np.int32)),
        offsets=torch.from_numpy(np.arange(count + 1, dtype=np.int32)),
        stride=size,
        length_per_key=[size] * len(names),
        offset_per_key=[size * i for i in range(len(names) + 1)],
    )
    return Batch(dense_features=torch.from_numpy(dense), sparse_features=sparse, labels=torch.from_numpy(labels))


def bag_batch(names: Sequence[str], dense: np.ndarray, bags: Sequence[tuple[np.ndarray, np.ndarray]], labels: np.ndarray) -> Batch:
    """A batch of bags.

    Args:
        names: the F features.
        dense: float32 [B, D], contiguous.
        bags: (ids int64 [n], lengths int32 [B]) of each feature.
        labels: float32 [B].
    """
    sparse = KeyedJaggedTensor(
        keys=list(names),
        values=torch.from_numpy(np.concatenate([ids for ids, _ in bags])),
        lengths=torch.from_numpy(np.concatenate([lengths for _, lengths in bags])),
        stride=len(labels),
    )
    return Batch(dense_features=torch.from_numpy(dense), sparse_features=sparse, labels=torch.from_numpy(labels))
