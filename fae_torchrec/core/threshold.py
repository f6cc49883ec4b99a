"""FAE's selection: one access threshold over all tables, in per cent of each table's accesses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fae_torchrec.core.candidates import Candidates
from fae_torchrec.core.histogram import count_levels
from fae_torchrec.core.row_counts import RowCounts


@dataclass(frozen=True)
class ThresholdChoice:
    """Rows selected by a threshold.

    Attributes:
        hot: bool [C] over the candidates.
        threshold: per cent; every row with at least so large a share of its table's accesses is hot. None if no level fits whole.
    """

    hot: np.ndarray
    threshold: float | None


class ThresholdSelector:
    """Every candidate's share of its table's accesses, tallied into levels once and cut at any budget (FAE §4.1).

    A row is hot if it takes at least t per cent of the T accesses of its table. On a sample of rate x its count is held against the
    cutoff t * T * x / 100, where T * x is what was counted of the table; a cutoff below one access means "seen". With exact counts at
    hand the sizes at every threshold are known, so the search is a bisection over the levels; FAE estimates the sizes from random chunks
    of the tables (`StatisticalOptimizer`).

    Args:
        candidates: the rows.

    Attributes:
        levels: float64 [L], the distinct shares in per cent, descending.
        bytes_to: int64 [L], bytes of all rows of at least so large a share.
    """

    def __init__(self, candidates: Candidates) -> None:
        self.candidates = candidates
        self._tallies = [self._tally(candidates.profile.counts[table.name]) for table in candidates.tables]
        none = np.zeros(0)
        every_level = np.concatenate([none, *(percent for percent, _, _ in self._tallies)])
        every_bytes = np.concatenate(
            [none, *(rows_at * table.row_bytes for (_, _, rows_at), table in zip(self._tallies, candidates.tables, strict=True))]
        )
        # Rows of equal count in tables of equal traffic are one level.
        ascending, level_of = np.unique(every_level, return_inverse=True)
        self.levels = ascending[::-1]
        self.bytes_to = np.cumsum(np.bincount(level_of, every_bytes, len(ascending))[::-1]).astype(np.int64)

    @staticmethod
    def _tally(counts: RowCounts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A table's levels, descending: per cent of its accesses, accesses, and rows at the level."""
        levels, rows_at = count_levels(counts)
        return 100.0 * levels / max(counts.total, 1), levels, rows_at

    def at(self, threshold: float) -> np.ndarray:
        """The rows with at least `threshold` per cent of their table's accesses: bool [C]."""
        hot = np.zeros(len(self.candidates), dtype=np.bool_)
        for number, (percent, levels, _) in enumerate(self._tallies):
            above = int(np.searchsorted(-percent, -threshold, side="right"))
            if above:
                span = slice(*self.candidates.starts[number : number + 2])
                hot[span] = self.candidates.counts[span] >= levels[above - 1]
        return hot

    def select(self, room: int, least: float = 0.0) -> ThresholdChoice:
        """The smallest threshold whose rows fit, and what fits of the next level.

        What the threshold leaves of the budget is filled with rows of the level below it, in table order, then by id; a table whose next
        row does not fit is passed over.

        Args:
            room: bytes for candidates.
            least: no smaller threshold is taken, in per cent (what `StatisticalOptimizer` found, for example).
        """
        allowed = int(np.searchsorted(-self.levels, -least, side="right"))
        fitting = min(int(np.searchsorted(self.bytes_to, room, side="right")), allowed)
        threshold = float(self.levels[fitting - 1]) if fitting else None
        hot = np.zeros(len(self.candidates), dtype=np.bool_) if threshold is None else self.at(threshold)
        if fitting < len(self.levels):
            left = room - (int(self.bytes_to[fitting - 1]) if fitting else 0)
            tied = np.flatnonzero(self.at(self.levels[fitting]) & ~hot)
            bounds = np.searchsorted(tied, self.candidates.starts)
            for number, table in enumerate(self.candidates.tables):
                taken = tied[bounds[number] : bounds[number + 1]][: left // table.row_bytes]
                hot[taken] = True
                left -= len(taken) * table.row_bytes
        return ThresholdChoice(hot, threshold)
