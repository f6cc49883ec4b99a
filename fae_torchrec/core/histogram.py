"""How often each row of one table is accessed: exact counts, their levels, and the skew curve."""

from __future__ import annotations

import numpy as np

from fae_torchrec.core.row_counts import RowCounts
from fae_torchrec.core.row_ids import check_ids

_BUFFER_IDS = 1 << 18
_ORDINARY_ROWS = 1 << 26
_DENSE_FROM = 16
_CHUNK_ROWS = 1 << 22
_LEVEL_CLIP = 1 << 16


class AccessHistogram:
    """Exact access counts of the rows of one table.

    Ids wait in a buffer and are then merged into sparse counts of the rows seen so far, 16 bytes each. The counts become dense, 8 bytes for
    every row, when a table of at most 64 M rows has a sixteenth as many accesses as rows (counting is then a plain addition), and for a
    larger table when half of its rows are seen (dense counts are then the smaller ones).

    Memory: at most 8 bytes a row for tables of at most 64 M rows, else min(16 bytes per row seen, 8 bytes per row); to which comes the
    buffer, 8 bytes per id, of 262,144 ids or half the rows seen, whichever is more. About twice that in passing, while they are merged.

    Attributes:
        rows: rows of the table.
        total: accesses counted so far.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.total = 0
        self._buffer: list[np.ndarray] = []
        self._waiting = 0
        self._sparse = RowCounts(rows, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
        self._dense: np.ndarray | None = None

    def add(self, ids: np.ndarray) -> None:
        """Counts ids. The cost is that of the ids, whatever the rows: counting a batch must not sweep 40 M rows.

        Args:
            ids: int64, any shape; repeats count each time. Copied, if they have to wait.

        Raises:
            DataError: an id is outside 0..rows-1; nothing has been counted then.
        """
        check_ids("access histogram", ids, self.rows)
        if not ids.size:
            return
        self.total += ids.size
        if self._dense is None and self.rows <= _ORDINARY_ROWS and self.total * _DENSE_FROM >= self.rows:
            self._make_dense()
        if self._dense is not None:
            _count(ids, self._dense)
            return
        self._buffer.append(ids.flatten())
        self._waiting += ids.size
        if self._waiting >= max(_BUFFER_IDS, self._sparse.ids.size // 2):
            self._merge_buffer()

    def add_counts(self, counts: RowCounts) -> None:
        """Adds counts of the same table that were made elsewhere, by another worker for instance.

        Raises:
            DataError: they are of another number of rows.
        """
        self._sparse = RowCounts.merged([self._sparse, counts])
        self.total += counts.total
        if self._dense is not None:
            self._make_dense()
        else:
            self._watch_size()

    def row_counts(self) -> RowCounts:
        """All that was counted so far."""
        if self._dense is not None:
            return RowCounts.from_dense(self._dense)
        self._merge_buffer()
        return self._sparse if self._dense is None else RowCounts.from_dense(self._dense)

    def _merge_buffer(self) -> None:
        if self._buffer:
            ids, counts = np.unique(np.concatenate(self._buffer), return_counts=True)
            self._buffer, self._waiting = [], 0
            self._sparse = RowCounts.merged([self._sparse, RowCounts(self.rows, ids, counts)])
            self._watch_size()

    def _watch_size(self) -> None:
        """Dense counts as soon as the sparse ones would be larger (or the accesses of an ordinary table are many)."""
        many = self.rows <= _ORDINARY_ROWS and self.total * _DENSE_FROM >= self.rows
        if many or self._sparse.ids.size * 2 > self.rows:
            self._make_dense()

    def _make_dense(self) -> None:
        """Moves all sparse counts and all waiting ids into dense counts."""
        if self._dense is None:
            self._dense = np.zeros(self.rows, dtype=np.int64)
        self._dense[self._sparse.ids] += self._sparse.counts
        self._sparse = RowCounts(self.rows, self._sparse.ids[:0], self._sparse.counts[:0])
        for ids in self._buffer:
            _count(ids, self._dense)
        self._buffer, self._waiting = [], 0


def count_levels(counts: RowCounts) -> tuple[np.ndarray, np.ndarray]:
    """The distinct counts of the rows that were seen and how many rows have each, without sorting the rows.

    Counts below 65,536 are tallied by bincount; only rows above, at most total accesses / 65,536 of them, are sorted. Time is one
    pass; extra memory is 40 MB plus 32 bytes per sorted row.

    Returns:
        levels int64 [L], descending, at least 1 each, and rows_at int64 [L], at least 1 each, which sum to the number of rows seen.
    """
    tally = np.zeros(_LEVEL_CLIP + 1, dtype=np.int64)
    above = [tally[:0]]
    for start in range(0, counts.counts.size, _CHUNK_ROWS):
        chunk = counts.counts[start : start + _CHUNK_ROWS]
        tally += np.bincount(np.minimum(chunk, _LEVEL_CLIP), minlength=len(tally))
        above.append(chunk[chunk >= _LEVEL_CLIP])
    high, rows_at_high = np.unique(np.concatenate(above), return_counts=True)
    low = np.flatnonzero(tally[:_LEVEL_CLIP])
    return np.concatenate([low, high])[::-1], np.concatenate([tally[low], rows_at_high])[::-1]


def top_share(counts: RowCounts, share: float = 0.01) -> float:
    """Share of a table's accesses that its most accessed rows take.

    Args:
        counts: accesses of the table's rows.
        share: of the table's rows; at least one row is taken.

    Returns:
        0..1; 0 if nothing was accessed.
    """
    top = min(max(int(counts.rows * share), 1), counts.counts.size)
    most: np.ndarray = np.partition(counts.counts, counts.counts.size - top)[counts.counts.size - top :] if top else counts.counts
    return float(most.sum() / max(counts.total, 1))


def skew_curve(counts: RowCounts, points: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """How much of the traffic the most accessed rows take: the Lorenz curve of a table, for pictures.

    Args:
        counts: of the table's rows; those that were not seen are rows too.
        points: points of the curve, at least 2.

    Returns:
        row_share float64 [points], from one row to all rows, evenly spaced on a logarithmic axis; and access_share float64
        [points], the share of all accesses that the most accessed `row_share` of the rows take (0 if nothing was accessed).
    """
    row_share = np.geomspace(1 / counts.rows, 1.0, points)
    levels, rows_at = count_levels(counts)
    rows_up_to = np.concatenate([[0], np.cumsum(rows_at)])
    accesses_up_to = np.concatenate([[0], np.cumsum(levels * rows_at)])
    # Within a level all rows have the same count, so the curve is exactly linear there. After the last one, over unseen rows, it is flat.
    access_share = np.interp(row_share * counts.rows, rows_up_to, accesses_up_to) / max(counts.total, 1)
    return row_share, access_share


def _count(ids: np.ndarray, dense: np.ndarray) -> None:
    if ids.size >= dense.size:
        dense += np.bincount(ids.reshape(-1), minlength=dense.size)
    else:
        np.add.at(dense, ids, 1)
