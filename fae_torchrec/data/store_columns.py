"""StoreColumns: the columns of a segregated store's files, from samples and back.

Files are Arrow IPC files, not compressed, so that they can be read where they are mapped.

    column         type
    sample         int64: number in the data, counted from the first sample of the file's part
    label          float32
    dense          fixed-size list of float32; left out without dense features
    id.FEATURE     the narrowest type for the rows of the feature's tables; a list of it where some bag of the file has not exactly one id
    weight.FEATURE float32, or a list of it as the ids; only if the source has weights
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
from torchrec.datasets.utils import Batch

from fae_torchrec.core.tables import TableSet

_ID_TYPES = (np.uint8, np.uint16, np.int32)


def column_names(features: Sequence[str], num_dense: int, *, weighted: bool) -> list[str]:
    """The columns of a file, in order."""
    weights = [f"weight.{name}" for name in features] if weighted else []
    return ["sample", "label", *(["dense"] if num_dense else []), *(f"id.{name}" for name in features), *weights]


def id_types(features: Sequence[str], tables: TableSet) -> list[Any]:
    """The numpy type of each feature's ids: the narrowest for the smallest of its tables; int64 for a feature without a table."""
    rows: dict[str, int] = {}
    for table, feature in tables.lookups:
        rows[feature] = min(tables[table].rows, rows.get(feature, tables[table].rows))
    return [next((t for t in _ID_TYPES if rows.get(name, 2**63) <= np.iinfo(t).max + 1), np.int64) for name in features]


def record_batch(batch: Batch, numbers: np.ndarray, types: Sequence[Any], bags: np.ndarray) -> Any:
    """Makes samples a pyarrow RecordBatch.

    Args:
        batch: n samples with F keys; ids within the rows of their tables.
        numbers: int64 [n], of the samples in their part.
        types: numpy type of the ids of each feature.
        bags: bool [F], features to be written as lists; the others must have one id for every sample.
    """
    kjt = batch.sparse_features
    names, ends = kjt.keys(), kjt.offset_per_key()
    lengths = kjt.lengths().view(len(names), len(numbers)).numpy()
    weights = kjt.weights_or_none()
    num_dense = batch.dense_features.shape[1]

    def column(values: np.ndarray, feature: int) -> Any:
        if not bags[feature]:
            return pa.array(values)
        offsets = np.zeros(len(numbers) + 1, dtype=np.int32)
        np.cumsum(lengths[feature], out=offsets[1:])
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    columns = [pa.array(numbers), pa.array(batch.labels.float().numpy())]
    if num_dense:
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(batch.dense_features.float().numpy().reshape(-1)), num_dense))
    columns += [column(kjt.values()[ends[f] : ends[f + 1]].numpy().astype(types[f]), f) for f in range(len(names))]
    if weights is not None:
        columns += [column(weights[ends[f] : ends[f + 1]].float().numpy(), f) for f in range(len(names))]
    return pa.record_batch(columns, names=column_names(names, num_dense, weighted=weights is not None))


@dataclass(frozen=True, eq=False)
class StoreColumns:
    """Views of one record batch: nothing is copied before it is read.

    Attributes:
        samples: int64 [n], counted from `first`.
        first: number in the data of the first sample of the part.
        labels: float32 [n].
        dense: float32 [n, D].
        ids: for each feature, of any integer type; [n] or [ids].
        weights: for each feature, float32 as its ids; empty without weights.
        offsets: for each feature, int32 [n + 1] in its ids, or None where every bag has one.
        one_hot: whether they are all None.
    """

    samples: np.ndarray
    first: int
    labels: np.ndarray
    dense: np.ndarray
    ids: list[np.ndarray]
    weights: list[np.ndarray]
    offsets: list[np.ndarray | None]
    one_hot: bool

    @classmethod
    def of(cls, records: Any, num_features: int, num_dense: int, first: int) -> StoreColumns:
        """The columns of a pyarrow RecordBatch; their names are `column_names`."""
        columns = records.columns
        at = 3 if num_dense else 2
        ids, weights = columns[at : at + num_features], columns[at + num_features :]
        offsets = [_view(column.offsets) if _is_list(column) else None for column in ids]
        return cls(
            samples=_view(columns[0]),
            first=first,
            labels=_view(columns[1]),
            dense=_view(columns[2].values).reshape(-1, num_dense) if num_dense else np.zeros((records.num_rows, 0), dtype=np.float32),
            ids=[_view(column.values if _is_list(column) else column) for column in ids],
            weights=[_view(column.values if _is_list(column) else column) for column in weights],
            offsets=offsets,
            one_hot=all(bags is None for bags in offsets),
        )

    def cut(self, per_id: list[np.ndarray], start: int, stop: int) -> list[np.ndarray]:
        """What belongs to the rows start..stop-1 in `ids` or `weights`: views, one for each feature."""
        if self.one_hot:
            return list(map(itemgetter(slice(start, stop)), per_id))  # in the hot loop: faster than a comprehension
        # Not strict: there may be no weights.
        bags = zip(per_id, self.offsets)  # noqa: B905
        return [array[start:stop] if at is None else array[at[start] : at[stop]] for array, at in bags]

    def lengths(self, start: int, stop: int) -> list[np.ndarray]:
        """Ids in each bag of the rows start..stop-1, for each feature int32 [stop - start]."""
        ones = np.ones(stop - start, dtype=np.int32)
        return [ones if bags is None else np.diff(bags[start : stop + 1]) for bags in self.offsets]


def _is_list(column: Any) -> bool:
    return isinstance(column, pa.ListArray)


def _view(array: Any) -> np.ndarray:
    view: np.ndarray = array.to_numpy(zero_copy_only=True)
    return view
