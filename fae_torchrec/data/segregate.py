"""FAE's Input Classifier: which samples are all hot, and cutting batches of samples apart and together."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core import row_ids
from fae_torchrec.core.errors import DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind, TableSet


def check_ids(kjt: KeyedJaggedTensor, tables: TableSet) -> None:
    """Checks that every id of every lookup is a row of its table.

    Args:
        kjt: ids of F keys and stride B on the CPU; features that no table looks up are ignored.
        tables: the tables whose row counts are the allowed ranges.

    Raises:
        DataError: a feature is missing, the lengths do not add up to the ids, keys differ in stride, or an id is not int64 or out of range.
    """
    _check_layout(kjt)
    values = kjt.values().numpy()
    spans = _feature_spans(kjt)
    for table, feature in tables.lookups:
        if feature not in spans:
            raise DataError(
                f"feature {feature!r} of table {table!r} is not in the batch, which has {list(kjt.keys())}; "
                f"give the source this feature or take it out of the table"
            )
        begin, end = spans[feature]
        row_ids.check_ids(f"table {table!r}, feature {feature!r}", values[begin:end], tables[table].rows)


def hot_samples(kjt: KeyedJaggedTensor, placement: RowPlacement) -> torch.Tensor:
    """Finds the samples whose ids are all hot (FAE §4.2, Input Classifier).

    An empty bag has no cold id, so it does not make its sample cold. Features that no table looks up are ignored.

    Args:
        kjt: ids of F keys and stride B on the CPU, one-hot or multi-hot.
        placement: which rows are hot.

    Returns:
        bool [B], True where every id of every lookup is hot.

    Raises:
        DataError: as `check_ids`.
    """
    check_ids(kjt, placement.tables)
    values = kjt.values().numpy()
    spans = _feature_spans(kjt)
    cold = np.zeros(values.size, dtype=bool)
    for table, feature in placement.tables.lookups:
        if placement.kind(table) is TableKind.HOT:
            continue
        begin, end = spans[feature]
        cold[begin:end] |= ~placement.is_hot(table, values[begin:end])
    # Cold ids before each id: a bag is cold iff this number grows across it. Unlike `reduceat`, right for empty bags.
    before = np.zeros(values.size + 1, dtype=np.int64)
    np.cumsum(cold, out=before[1:])
    at_offsets = before[kjt.offsets().numpy()]
    cold_bags = at_offsets[1:] != at_offsets[:-1]
    return torch.from_numpy(~cold_bags.reshape(len(kjt.keys()), kjt.stride()).any(axis=0))


def select_samples(batch: Batch, index: torch.Tensor) -> Batch:
    """Takes some samples out of a batch, in the order of `index`.

    Args:
        batch: dense [B, D], ids of F keys and stride B (with or without weights), labels [B], on the CPU.
        index: int64 [n] sample numbers in 0..B-1; repeats are allowed.

    Returns:
        A copy of these samples as a plain batch of n samples: a promise to be hot is not kept.

    Raises:
        DataError: keys differ in stride or the lengths do not add up to the ids.
    """
    kjt = batch.sparse_features
    _check_layout(kjt)
    keys, stride = kjt.keys(), kjt.stride()
    lengths = kjt.lengths().view(len(keys), stride)
    if kjt.values().numel() == lengths.numel() and bool((lengths == 1).all()):
        # All bags hold one id (Criteo's shape): the ids are a [F, B] table, which is several times cheaper to cut than a jagged one.
        chosen = lengths.new_ones(len(keys) * index.numel())
        place = (torch.arange(len(keys)).unsqueeze(1) * stride + index).view(-1)
    else:
        chosen = lengths[:, index].reshape(-1)
        begins = kjt.offsets()[:-1].view(len(keys), stride)[:, index].reshape(-1).long()
        counts = chosen.long()
        ends = counts.cumsum(0)
        total = int(ends[-1]) if ends.numel() else 0
        place = torch.arange(total) + torch.repeat_interleave(begins - (ends - counts), counts, output_size=total)
    weights = kjt.weights_or_none()
    return Batch(
        dense_features=batch.dense_features[index],
        sparse_features=KeyedJaggedTensor(
            keys=keys,
            values=kjt.values()[place],
            weights=None if weights is None else weights[place],
            lengths=chosen,
            stride=index.numel(),
        ),
        labels=batch.labels[index],
    )


def concat_batches(batches: Sequence[Batch]) -> Batch:
    """Joins batches one after the other.

    Args:
        batches: at least one; all with the same keys in the same order, all with or all without weights.

    Returns:
        A plain batch of all samples in order (for one batch: that batch itself, its promise not kept).

    Raises:
        DataError: no batch, other keys, or weights in only some of the batches.
    """
    if not batches:
        raise DataError("no batches to join; give at least one")
    if len(batches) == 1:
        return plain_batch(batches[0])
    kjts = [batch.sparse_features for batch in batches]
    keys = kjts[0].keys()
    for kjt in kjts:
        _check_layout(kjt)
        if kjt.keys() != keys:
            raise DataError(f"batches of one stream must have the same keys, received {list(keys)} and {list(kjt.keys())}")
    weights = [kjt.weights_or_none() for kjt in kjts]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise DataError(f"{len(given)} of {len(weights)} batches have per-sample weights; give them to all batches or to none")
    sizes = [kjt.length_per_key() for kjt in kjts]
    return Batch(
        dense_features=torch.cat([batch.dense_features for batch in batches]),
        sparse_features=KeyedJaggedTensor(
            keys=keys,
            values=_cat_by_key([kjt.values() for kjt in kjts], sizes),
            weights=_cat_by_key(given, sizes) if given else None,
            lengths=torch.cat([kjt.lengths().view(len(keys), kjt.stride()) for kjt in kjts], dim=1).view(-1),
            stride=sum(kjt.stride() for kjt in kjts),
        ),
        labels=torch.cat([batch.labels for batch in batches]),
    )


def plain_batch(batch: Batch) -> Batch:
    """The same batch without a promise to be hot; tensors are shared, not copied."""
    kjt = batch.sparse_features
    if type(kjt) is KeyedJaggedTensor:
        return batch
    plain = KeyedJaggedTensor(
        keys=kjt.keys(),
        values=kjt.values(),
        weights=kjt.weights_or_none(),
        lengths=kjt.lengths_or_none(),
        offsets=kjt.offsets_or_none(),
        stride=kjt.stride(),
    )
    return Batch(dense_features=batch.dense_features, sparse_features=plain, labels=batch.labels)


class Bundler:
    """Samples waiting in a queue: they come in batches of any size and go out in batches of another.

    Each sample carries its position in the stream, so that two queues can be merged in stream order again.
    """

    def __init__(self) -> None:
        self._pieces: deque[tuple[Batch, torch.Tensor]] = deque()
        self._taken = 0  # samples of the first piece that have gone out already
        self._samples = 0

    def __len__(self) -> int:
        """Samples that wait."""
        return self._samples

    def add(self, batch: Batch, positions: torch.Tensor) -> None:
        """Appends the n samples of `batch`, which stand at `positions` (int64 [n]) of the stream."""
        samples = positions.numel()
        if samples:
            self._pieces.append((batch, positions))
            self._samples += samples

    def pop(self, samples: int) -> tuple[Batch, torch.Tensor]:
        """Takes out the first samples.

        Args:
            samples: how many, at least 1.

        Returns:
            A plain batch of them and their positions, int64 [samples].

        Raises:
            DataError: fewer samples are waiting.
        """
        if not 1 <= samples <= self._samples:
            raise DataError(f"cannot take {samples} samples out of {self._samples} waiting; allowed 1..{self._samples}")
        self._samples -= samples
        batches, positions = [], []
        while samples:
            batch, places = self._pieces[0]
            size = min(samples, places.numel() - self._taken)
            if size == places.numel():
                batches.append(batch)
            else:
                batches.append(select_samples(batch, torch.arange(self._taken, self._taken + size)))
            positions.append(places[self._taken : self._taken + size])
            self._taken += size
            if self._taken == places.numel():
                self._pieces.popleft()
                self._taken = 0
            samples -= size
        return concat_batches(batches), torch.cat(positions)


def _check_layout(kjt: KeyedJaggedTensor) -> None:
    """Raises DataError unless every key has the same stride and the bags cover the ids exactly."""
    if kjt.variable_stride_per_key() or kjt.inverse_indices_or_none() is not None:
        raise DataError(
            "received a batch whose keys differ in stride (variable batch size) or share samples by inverse indices; "
            "allowed is one bag per key and sample; expand the batch before it is segregated"
        )
    bags, ids = int(kjt.lengths().numel()), int(kjt.values().numel())
    covered = int(kjt.offsets()[-1]) if bags else 0
    if bags != len(kjt.keys()) * kjt.stride() or covered != ids:
        raise DataError(
            f"ragged lengths: {bags} bags that cover {covered} ids, where {len(kjt.keys())} keys with stride {kjt.stride()} "
            f"and {ids} ids were received; every key needs one length per sample and the lengths must add up to the ids"
        )


def _feature_spans(kjt: KeyedJaggedTensor) -> dict[str, tuple[int, int]]:
    """Where the ids of each feature begin and end in `kjt.values()`."""
    ends = kjt.offset_per_key()
    return {key: (ends[i], ends[i + 1]) for i, key in enumerate(kjt.keys())}


def _cat_by_key(tensors: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]]) -> torch.Tensor:
    """Joins per-id tensors of several batches key by key: all of the first key, then all of the second, and so on."""
    parts = [torch.split_with_sizes(tensor, list(size)) for tensor, size in zip(tensors, sizes, strict=True)]
    return torch.cat([part for key in zip(*parts, strict=True) for part in key])
