"""FAE's Input Classifier: which samples are all hot, and cutting batches of samples apart and together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core import row_ids
from fae_torchrec.core.errors import DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind, TableSet

Rows: TypeAlias = slice | np.ndarray
"""Samples of a batch: a run from start to stop, or their numbers, int64."""


def check_ids(kjt: KeyedJaggedTensor, tables: TableSet) -> None:
    """Checks that every id of every lookup is a row of its table.

    Args:
        kjt: ids of F keys and stride B on the CPU; features that no table looks up are ignored.
        tables: the tables whose row counts are the allowed ranges.

    Raises:
        DataError: a feature is missing, the lengths do not add up to the ids, keys differ in stride, or an id is neither int64 nor int32 or
            is out of range.
    """
    one_hot = one_hot_ids(kjt) is not None
    _check_ids(_wide(kjt.values().numpy()), _feature_spans(kjt, one_hot=one_hot), tables)


def _wide(ids: np.ndarray) -> np.ndarray:
    """int32 ids, as TorchRec's own Criteo loader gives them, as int64; others as they are."""
    return ids.astype(np.int64) if ids.dtype == np.int32 else ids


def _check_ids(values: np.ndarray, spans: Mapping[str, tuple[int, int]], tables: TableSet) -> None:
    for table, feature in tables.lookups:
        if feature not in spans:
            raise DataError(
                f"feature {feature!r} of table {table!r} is not in the batch, which has {list(spans)}; "
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
    table_of_ids = one_hot_ids(kjt)
    values, spans = _wide(kjt.values().numpy()), _feature_spans(kjt, one_hot=table_of_ids is not None)
    if table_of_ids is None:
        return torch.from_numpy(_hot_of_bags(kjt, values, spans, placement))
    table_of_ids = values.reshape(table_of_ids.shape)
    in_range = False
    # Numpy, not torch: on one thread it gathers several times faster.
    if values.dtype == np.int64 and all(feature in spans for _, feature in placement.tables.lookups):
        # One pass over all ids instead of one for each feature; negative ids are the largest of all unsigned ones.
        largest = dict(zip(spans, table_of_ids.view(np.uint64).max(axis=1, initial=0).tolist(), strict=True))
        in_range = all(largest[feature] < placement.tables[table].rows for table, feature in placement.tables.lookups)
    if not in_range:
        _check_ids(values, spans, placement.tables)  # names what is wrong
    hot = np.ones(kjt.stride(), dtype=np.bool_)
    rows_of = dict(zip(spans, table_of_ids, strict=True))
    for table, feature in placement.tables.lookups:
        if placement.kind(table) is not TableKind.HOT:
            hot &= placement.hot_mask(table).take(rows_of[feature])
    return torch.from_numpy(hot)


def _hot_of_bags(kjt: KeyedJaggedTensor, values: np.ndarray, spans: Mapping[str, tuple[int, int]], placement: RowPlacement) -> np.ndarray:
    """`hot_samples` where bags hold any number of ids."""
    _check_ids(values, spans, placement.tables)
    cold = np.zeros(values.size, dtype=bool)
    for table, feature in placement.tables.lookups:
        if placement.kind(table) is TableKind.HOT:
            continue
        begin, end = spans[feature]
        cold[begin:end] |= ~placement.hot_mask(table).take(values[begin:end])
    # Cold ids before each id: a bag is cold iff this number grows across it. Unlike `reduceat`, right for empty bags.
    before = np.zeros(values.size + 1, dtype=np.int64)
    np.cumsum(cold, out=before[1:])
    at_offsets = before[kjt.offsets().numpy()]
    cold_bags = at_offsets[1:] != at_offsets[:-1]
    hot: np.ndarray = ~cold_bags.reshape(len(kjt.keys()), kjt.stride()).any(axis=0)
    return hot


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
    keys, at = kjt.keys(), index.numpy()
    weights, table_of_ids = kjt.weights_or_none(), one_hot_ids(kjt)
    if table_of_ids is not None:
        values = table_of_ids.take(at, axis=1).reshape(-1)
        lengths = _one_each(len(keys) * at.size, kjt.lengths().dtype)
        if weights is not None:
            weights = torch.from_numpy(weights.numpy().reshape(table_of_ids.shape).take(at, axis=1).reshape(-1))
    else:
        chosen = kjt.lengths().numpy().reshape(len(keys), -1).take(at, axis=1).reshape(-1)
        begins = kjt.offsets()[:-1].numpy().reshape(len(keys), -1).take(at, axis=1).reshape(-1)
        ends = np.cumsum(chosen, dtype=np.int64)
        place = np.arange(ends[-1] if ends.size else 0) + np.repeat(begins - (ends - chosen), chosen)
        values = kjt.values().numpy().take(place)
        weights = None if weights is None else torch.from_numpy(weights.numpy().take(place))
        lengths = torch.from_numpy(chosen)
    return Batch(
        dense_features=torch.from_numpy(batch.dense_features.numpy().take(at, axis=0)),
        sparse_features=KeyedJaggedTensor(
            keys=keys,
            values=torch.from_numpy(values),
            weights=weights,
            lengths=lengths,
            stride=at.size,
        ),
        labels=torch.from_numpy(batch.labels.numpy().take(at, axis=0)),
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
    return join_rows([(batch, slice(0, batch.sparse_features.stride())) for batch in batches])


def join_rows(parts: Sequence[tuple[Batch, Rows]]) -> Batch:
    """Joins some samples of batches one after the other.

    Args:
        parts: at least one; batches as for `concat_batches`, each with its samples.

    Returns:
        A plain batch of all these samples in order (for one whole batch: that batch itself, its promise not kept).

    Raises:
        DataError: as `concat_batches`.
    """
    if not parts:
        raise DataError("no batches to join; give at least one")
    first, of_first = parts[0]
    if len(parts) == 1 and isinstance(of_first, slice) and of_first == slice(0, first.sparse_features.stride()):
        return plain_batch(first)
    kjts, rows = [batch.sparse_features for batch, _ in parts], [rows for _, rows in parts]
    keys = kjts[0].keys()
    tables = [one_hot_ids(kjt) for kjt in kjts]
    for kjt in kjts:
        if kjt.keys() != keys:
            raise DataError(f"batches of one stream must have the same keys, received {list(keys)} and {list(kjt.keys())}")
    weights = [kjt.weights_or_none() for kjt in kjts]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise DataError(f"{len(given)} of {len(weights)} batches have per-sample weights; give them to all batches or to none")
    one_hot = [table for table in tables if table is not None]
    if len(one_hot) < len(tables):
        return _join_bags([select_samples(batch, _numbers(of_batch)) for batch, of_batch in parts], weighted=bool(given))
    ids = _join_columns(one_hot, rows)
    of_ids = [weight.numpy().reshape(table.shape) for weight, table in zip(given, one_hot, strict=False)]
    return Batch(
        dense_features=_join([batch.dense_features for batch, _ in parts], rows),
        sparse_features=KeyedJaggedTensor(
            keys,
            ids,
            _join_columns(of_ids, rows) if given else None,
            lengths=_one_each(ids.numel(), kjts[0].lengths().dtype),
            stride=ids.numel() // len(keys),
        ),
        labels=_join([batch.labels for batch, _ in parts], rows),
    )


def _join_bags(batches: Sequence[Batch], *, weighted: bool) -> Batch:
    """Joins whole batches whose bags hold any number of ids."""
    kjts = [batch.sparse_features for batch in batches]
    keys, sizes = kjts[0].keys(), [kjt.length_per_key() for kjt in kjts]
    return Batch(
        dense_features=torch.cat([batch.dense_features for batch in batches]),
        sparse_features=KeyedJaggedTensor(
            keys,
            _cat_by_key([kjt.values() for kjt in kjts], sizes),
            _cat_by_key([kjt.weights() for kjt in kjts], sizes) if weighted else None,
            lengths=torch.cat([kjt.lengths().view(len(keys), kjt.stride()) for kjt in kjts], dim=1).view(-1),
            stride=sum(kjt.stride() for kjt in kjts),
        ),
        labels=torch.cat([batch.labels for batch in batches]),
    )


def _join_columns(tables: Sequence[np.ndarray], rows: Sequence[Rows]) -> torch.Tensor:
    """Joins columns of [F, B] tables, flat."""
    parts = [table[:, at] if isinstance(at, slice) else table.take(at, axis=1) for table, at in zip(tables, rows, strict=True)]
    return torch.from_numpy(np.concatenate(parts, axis=1) if len(parts) > 1 else np.ascontiguousarray(parts[0])).view(-1)


def _join(tensors: Sequence[torch.Tensor], rows: Sequence[Rows]) -> torch.Tensor:
    parts = [x.numpy()[at] if isinstance(at, slice) else x.numpy().take(at, axis=0) for x, at in zip(tensors, rows, strict=True)]
    return torch.from_numpy(np.concatenate(parts) if len(parts) > 1 else parts[0].copy())


def _numbers(rows: Rows) -> torch.Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else torch.from_numpy(rows)


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


def with_shared_lengths(batch: Batch) -> Batch:
    """The same batch; where every bag has one id, with the lengths that all such batches share, so that nobody looks at them again."""
    kjt = batch.sparse_features
    if one_hot_ids(kjt) is None or kjt.lengths().dtype != torch.int32:
        return batch
    lengths = _one_each(kjt.lengths().numel(), torch.int32)
    lean = KeyedJaggedTensor(kjt.keys(), kjt.values(), kjt.weights_or_none(), lengths=lengths, stride=kjt.stride())
    return Batch(batch.dense_features, lean, batch.labels)


def one_hot_ids(kjt: KeyedJaggedTensor) -> np.ndarray | None:
    """Checks the layout, and sees whether every bag holds one id (Criteo's shape), which is several times faster to cut.

    Returns:
        The ids as a table [F, B], a view; None where bags hold other numbers of ids.

    Raises:
        DataError: keys differ in stride, or the bags do not cover the ids exactly.
    """
    if kjt.variable_stride_per_key() or kjt.inverse_indices_or_none() is not None:
        raise DataError(
            "received a batch whose keys differ in stride (variable batch size) or share samples by inverse indices; "
            "allowed is one bag per key and sample; expand the batch before it is segregated"
        )
    lengths, shape, ids = kjt.lengths().numpy(), (len(kjt.keys()), kjt.stride()), int(kjt.values().numel())
    if lengths.size == shape[0] * shape[1] == ids and (_is_one_each(kjt.lengths()) or (lengths == 1).all()):
        table: np.ndarray = kjt.values().numpy().reshape(shape)
        return table
    covered = int(kjt.offsets()[-1]) if lengths.size else 0
    if lengths.size != shape[0] * shape[1] or covered != ids:
        raise DataError(
            f"ragged lengths: {lengths.size} bags that cover {covered} ids, where {shape[0]} keys with stride {shape[1]} "
            f"and {ids} ids were received; every key needs one length per sample and the lengths must add up to the ids"
        )
    return None


_ones = torch.ones(0, dtype=torch.int32)


def _one_each(bags: int, dtype: torch.dtype) -> torch.Tensor:
    """Lengths of bags with one id each: a view of what is made once, as TorchRec's own datasets have it; do not change it in place."""
    global _ones
    if dtype != torch.int32:
        return torch.ones(bags, dtype=dtype)
    if len(_ones) < bags:
        _ones = torch.from_numpy(np.ones(bags, dtype=np.int32))
    return _ones[:bags]


def _is_one_each(lengths: torch.Tensor) -> bool:
    """Whether these lengths came from `_one_each`: looking at each of them takes longer than the rest of the cutting."""
    return len(lengths) > 0 and lengths.dtype == torch.int32 and lengths.data_ptr() == _ones.data_ptr()


def _feature_spans(kjt: KeyedJaggedTensor, *, one_hot: bool) -> dict[str, tuple[int, int]]:
    """Where the ids of each feature begin and end in `kjt.values()`."""
    keys, stride = kjt.keys(), kjt.stride()
    if one_hot:
        return {key: (i * stride, (i + 1) * stride) for i, key in enumerate(keys)}
    ends = kjt.offset_per_key()
    return {key: (ends[i], ends[i + 1]) for i, key in enumerate(keys)}


def _cat_by_key(tensors: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]]) -> torch.Tensor:
    """Joins per-id tensors of several batches key by key: all of the first key, then all of the second, and so on."""
    parts = [torch.split_with_sizes(tensor, list(size)) for tensor, size in zip(tensors, sizes, strict=True)]
    return torch.cat([part for key in zip(*parts, strict=True) for part in key])
