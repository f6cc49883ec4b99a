"""How often each row of one table is accessed: exact counts, their levels, and the skew curve."""

from __future__ import annotations

import numpy as np

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.row_ids import check_ids

_CHUNK_ROWS = 1 << 22
_LEVEL_CLIP = 1 << 16


class AccessHistogram:
    """Access counts of the rows of one table; memory is 8 bytes per row.

    Attributes:
        rows: rows of the table.
        counts: int64 [rows], accesses of each row so far.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.counts = np.zeros(rows, dtype=np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Counts ids.

        The cost is that of the ids, not of the rows, unless there are as many: counting a batch must not sweep 40 M rows.

        Args:
            ids: int64, any shape; repeats count each time.

        Raises:
            DataError: an id is outside 0..rows-1; nothing has been counted then.
        """
        check_ids("access histogram", ids, self.rows)
        if ids.size >= self.rows:
            self.counts += np.bincount(ids.reshape(-1), minlength=self.rows)
        else:
            seen, times = np.unique(ids, return_counts=True)
            self.counts[seen] += times

    def merge(self, other: AccessHistogram) -> None:
        """Adds the counts of another histogram of the same table.

        Raises:
            DataError: it has another number of rows.
        """
        if other.rows != self.rows:
            raise DataError(f"histograms of {self.rows} and {other.rows} rows cannot be merged; merge histograms of one table")
        self.counts += other.counts

    @property
    def total(self) -> int:
        """Accesses counted so far."""
        return int(self.counts.sum())


def count_levels(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct counts and how many rows have each, without sorting the rows.

    Counts below 65,536 are tallied by bincount; only rows above, at most total accesses / 65,536 of them, are sorted. Time is one
    pass; extra memory is 40 MB plus 32 bytes per sorted row.

    Args:
        counts: int64 [rows], none negative.

    Returns:
        levels int64 [L], descending, and rows_at int64 [L], at least 1 each, which sum to the number of rows.
    """
    tally = np.zeros(_LEVEL_CLIP + 1, dtype=np.int64)
    above = []
    for start in range(0, len(counts), _CHUNK_ROWS):
        chunk = counts[start : start + _CHUNK_ROWS]
        tally += np.bincount(np.minimum(chunk, _LEVEL_CLIP), minlength=len(tally))
        above.append(chunk[chunk >= _LEVEL_CLIP])
    high, rows_at_high = np.unique(np.concatenate(above), return_counts=True) if above else (tally[:0], tally[:0])
    low = np.flatnonzero(tally[:_LEVEL_CLIP])
    return np.concatenate([low, high])[::-1], np.concatenate([tally[low], rows_at_high])[::-1]


def skew_curve(counts: np.ndarray, points: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """How much of the traffic the most accessed rows take: the Lorenz curve of a table, for pictures.

    Args:
        counts: int64 [rows], none negative.
        points: points of the curve, at least 2.

    Returns:
        row_share float64 [points], from one row to all rows, evenly spaced on a logarithmic axis; and access_share float64
        [points], the share of all accesses that the most accessed `row_share` of the rows take (0 if nothing was accessed).
    """
    rows = len(counts)
    row_share = np.geomspace(1 / rows, 1.0, points)
    levels, rows_at = count_levels(counts)
    rows_up_to = np.concatenate([[0], np.cumsum(rows_at)])
    accesses_up_to = np.concatenate([[0], np.cumsum(levels * rows_at)])
    # Within a level all rows have the same count, so the curve is exactly linear there.
    access_share = np.interp(row_share * rows, rows_up_to, accesses_up_to) / max(int(accesses_up_to[-1]), 1)
    return row_share, access_share
