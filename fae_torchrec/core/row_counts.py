"""How often each row of one table was accessed: the rows that were seen, and their counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.row_ids import check_ids, find_slots


@dataclass(frozen=True, eq=False)
class RowCounts:
    """Accesses of the rows of one table, sparse: 16 bytes per row that was seen, nothing for the others. Read-only by agreement.

    Attributes:
        rows: rows of the table, seen or not.
        ids: int64 [seen], strictly ascending.
        counts: int64 [seen], at least 1 each.

    Raises:
        DataError: the ids are not rows in ascending order, or a count is missing or below 1.
    """

    rows: int
    ids: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        check_ids("row counts", self.ids, self.rows)
        if self.ids.ndim != 1 or not bool(np.all(self.ids[1:] > self.ids[:-1])):
            raise DataError(f"row counts: ids must be a vector in ascending order without repeats, received shape {self.ids.shape}")
        least = int(self.counts.min()) if self.counts.size else 1
        if self.counts.shape != self.ids.shape or self.counts.dtype != np.int64 or least < 1:
            raise DataError(
                f"row counts: one int64 count of at least 1 is needed per id, received {self.counts.dtype} {list(self.counts.shape)} with "
                f"minimum {least} for {self.ids.size} ids"
            )

    @classmethod
    def from_dense(cls, counts: np.ndarray) -> RowCounts:
        """Counts given for every row: int64 [rows], none negative."""
        ids = np.flatnonzero(counts).astype(np.int64)
        return cls(len(counts), ids, counts[ids])

    @classmethod
    def merged(cls, parts: Iterable[RowCounts]) -> RowCounts:
        """The sum of counts of one table, such as those of several workers.

        Raises:
            DataError: no parts, or parts of tables of different sizes.
        """
        parts = list(parts)
        sizes = {part.rows for part in parts}
        if len(sizes) != 1:
            raise DataError(f"counts of tables of {sorted(sizes)} rows cannot be merged; merge counts of one table")
        seen = [part for part in parts if part.ids.size]
        if len(seen) <= 1:
            return seen[0] if seen else parts[0]
        ids = np.concatenate([part.ids for part in seen])
        order = np.argsort(ids, kind="stable")  # merges the ascending runs, which is faster than sorting anew
        ids = ids[order]
        first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
        return cls(sizes.pop(), ids[first], np.add.reduceat(np.concatenate([part.counts for part in seen])[order], first))

    @cached_property
    def total(self) -> int:
        """Accesses counted."""
        return int(self.counts.sum())

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Counts of some rows: int64 of the shape of `ids`, 0 where a row was not seen."""
        if not self.ids.size:
            return np.zeros(ids.shape, dtype=np.int64)
        slots = find_slots(self.ids, ids)
        return np.where(slots < 0, np.int64(0), self.counts[slots])

    def dense(self) -> np.ndarray:
        """Counts of every row: int64 [rows]; for small tables and pictures."""
        counts = np.zeros(self.rows, dtype=np.int64)
        counts[self.ids] = self.counts
        return counts
