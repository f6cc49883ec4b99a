"""FAE's Statistical Optimizer: the lowest access threshold whose hot rows, estimated from a few chunks of each table, fit a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.estimate import CONFIDENCE, Estimate, share_estimate
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_counts import RowCounts

CHUNKS = 35
"""Chunks that are looked at in a table (n of FAE §4.1)."""

CHUNK_ROWS = 1024
"""Rows of a chunk (m of FAE §4.1)."""

_QUANTILE = float(stdtrit(CHUNKS - 1, 1 - (1 - CONFIDENCE) / 2))
_MOST_STEPS = 60
_CLOSE = 1e-6
_NO_ROW_PERCENT = 200.0  # no row has twice the accesses of its table


def access_cutoff(threshold_percent: float, accesses: int) -> int:
    """The counted accesses that make a row hot: H = t * T * x / 100 of FAE §4.1, where T * x accesses of the table were counted.

    Args:
        threshold_percent: t, the share of its table's accesses that makes a row hot, in per cent.
        accesses: counted accesses of the table.

    Returns:
        H rounded up (counts are whole); 1, "seen once", if H is below one access: a row that was not seen is never hot.
    """
    return max(1, math.ceil(threshold_percent * accesses / 100))


def chunk_interval(found: np.ndarray, chunks: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a whole table by those found in `CHUNKS` of its chunks: N * (mean ± t(0.0005, 34) * sqrt((N - n) / N * s² / n)).

    Args:
        found: int [..., CHUNKS], rows found in each chunk looked at.
        chunks: N, chunks of the table, at least `CHUNKS`; not whole if its rows do not fill the last chunk.

    Returns:
        The estimate and half the width of its interval, float64 [...] each.
    """
    unseen_share = (chunks - CHUNKS) / chunks
    half_width = _QUANTILE * np.sqrt(unseen_share * found.var(axis=-1, ddof=1) / CHUNKS)
    return chunks * found.mean(axis=-1), chunks * half_width


class ChunkSample:
    """Chunks of one table's counts, drawn once; asks of them cost at most 35,840 counts, however large the table is.

    A chunk is 1,024 rows of a random order of the table's rows, so that where the hot rows lie does not matter. With chunks of neighbouring
    rows it does: ids of a vocabulary stand in order of popularity, and all hot rows are then in a few chunks that mostly are not drawn (of
    300 intervals for the 999 most popular of 200,000 such rows, 72 held the truth; with rows in random order, all did).

    The interval at `CONFIDENCE` is `chunk_interval`, with two corrections:

    - Its ends are at least as far apart as those of the binomial interval of the rows looked at (`share_estimate`): with about 30 hot rows
      in the table or fewer, the chunks may hold none, and the spread between them says nothing.
    - They are never outside what is certain: the rows found, and beside them at most the rows that were seen elsewhere, and at most as many
      as the accesses elsewhere suffice for.

    A table of no more than `CHUNKS` chunks is counted whole. The interval is about the rows of these counts; how far the counts are those
    of all inputs is another question (`fae_torchrec.core.resolution`).

    Args:
        counts: counted accesses of the table's rows.
        rng: draws the rows.
    """

    def __init__(self, counts: RowCounts, rng: np.random.Generator) -> None:
        self._rows = counts.rows
        self.is_whole = counts.rows <= CHUNKS * CHUNK_ROWS
        if self.is_whole:
            self._chunk_of, self._counts = np.zeros(counts.ids.size, dtype=np.int64), counts.counts
        else:
            drawn = counts.of(rng.choice(counts.rows, size=CHUNKS * CHUNK_ROWS, replace=False))
            seen = np.flatnonzero(drawn)
            self._chunk_of, self._counts = seen // CHUNK_ROWS, drawn[seen]
        self._rows_elsewhere = counts.ids.size - self._counts.size
        self._accesses_elsewhere = counts.total - int(self._counts.sum())

    def rows_at_least(self, cutoff: int) -> Estimate:
        """How many rows of the table were accessed at least `cutoff` times, at least 1."""
        found = np.bincount(self._chunk_of[self._counts >= cutoff], minlength=CHUNKS)
        total = int(found.sum())
        if self.is_whole:
            return Estimate(total, total, total)
        value, half_width = (float(part) for part in chunk_interval(found, self._rows / CHUNK_ROWS))
        binomial = share_estimate(total, CHUNKS * CHUNK_ROWS)
        low = max(total, min(value - half_width, self._rows * binomial.low))
        most = total + min(self._rows_elsewhere, self._accesses_elsewhere // cutoff)
        high = min(most, max(value + half_width, self._rows * binomial.high))
        return Estimate(min(value, most), min(low, most), high)


@dataclass(frozen=True)
class ThresholdSearch:
    """What a search for the access threshold found.

    Attributes:
        threshold_percent: the threshold, in per cent of a table's accesses.
        hot_bytes: bytes of the rows at or above it; its upper end is within the budget.
        steps: (threshold, low, value, high) of every threshold tried, in order.
        clamped: tables whose cutoff would be below one counted access, where every row seen is hot.
    """

    threshold_percent: float
    hot_bytes: Estimate
    steps: tuple[tuple[float, float, float, float], ...]
    clamped: tuple[str, ...]


class StatisticalOptimizer:
    """Finds FAE's access threshold (FAE §4.1): one share of a table's accesses, the same for all tables, that makes a row hot.

    A table's estimate is a `ChunkSample`'s. Tables' intervals are added end by end, which is wider than needed: the sum is outside only if
    at least one table's count is.

    Args:
        profile: counts of the tables, and the bytes of their rows.
        tables: names of the tables whose rows compete for the budget.
        seed: of the chunks drawn.

    Raises:
        ConfigError: a table is not one of the profile's.
    """

    def __init__(self, profile: PopularityProfile, tables: Iterable[str], seed: int) -> None:
        names = tuple(tables)
        unknown = sorted(set(names) - set(profile.tables.names))
        if unknown:
            raise ConfigError(f"the optimizer is asked for tables {unknown}, which the profile lacks; it has {list(profile.tables.names)}")
        rng = np.random.default_rng(seed)
        self._accesses = {name: profile.counts[name].total for name in names}
        self._row_bytes = {name: profile.tables[name].row_bytes for name in names}
        self._samples = {name: ChunkSample(profile.counts[name], rng) for name in names}

    def cutoffs(self, threshold_percent: float) -> dict[str, int]:
        """Table name -> the counted accesses that make a row hot at a threshold, as `access_cutoff`."""
        return {name: access_cutoff(threshold_percent, accesses) for name, accesses in self._accesses.items()}

    def hot_bytes(self, threshold_percent: float) -> Estimate:
        """Bytes of the hot rows of all tables at a threshold: weights and optimizer state."""
        low = value = high = 0.0
        for name, cutoff in self.cutoffs(threshold_percent).items():
            rows, row_bytes = self._samples[name].rows_at_least(cutoff), self._row_bytes[name]
            low, value, high = low + rows.low * row_bytes, value + rows.value * row_bytes, high + rows.high * row_bytes
        return Estimate(value, low, high)

    def search(self, budget_bytes: int) -> ThresholdSearch:
        """The lowest threshold at which even the upper end of the interval fits the budget.

        How FAE searches is not published; this bisects the logarithm of the threshold between "every row seen is hot" and "none is", until
        the two ends differ by one access in one table, so that no threshold is between them, or by a millionth. The upper end may rise with
        the threshold here and there (the chunks then differ more); the threshold found fits, and one a step lower does not.

        Args:
            budget_bytes: fast memory for the rows, not negative.

        Raises:
            ConfigError: the budget is negative.
        """
        if budget_bytes < 0:
            raise ConfigError(f"the budget for hot rows must be at least 0 bytes, received {budget_bytes}")
        steps: list[tuple[float, float, float, float]] = []

        def tried(threshold: float) -> Estimate:
            estimate = self.hot_bytes(threshold)
            steps.append((threshold, estimate.low, estimate.value, estimate.high))
            return estimate

        # Half an access in the table with the most: there, as everywhere, the cutoff is 1.
        too_low = 50 / max([1, *self._accesses.values()])
        found = too_low
        estimate = tried(found)
        if estimate.high > budget_bytes:
            found = _NO_ROW_PERCENT
            estimate = tried(found)
            while found / too_low > 1 + _CLOSE and self._accesses_between(too_low, found) > 1 and len(steps) < _MOST_STEPS:
                middle = math.sqrt(too_low * found)
                candidate = tried(middle)
                if candidate.high <= budget_bytes:
                    found, estimate = middle, candidate
                else:
                    too_low = middle
        clamped = tuple(name for name, accesses in self._accesses.items() if 0 < found * accesses < 100)
        return ThresholdSearch(found, estimate, tuple(steps), clamped)

    def _accesses_between(self, low: float, high: float) -> int:
        """By how much the cutoffs of two thresholds differ, over all tables."""
        return sum(self.cutoffs(high).values()) - sum(self.cutoffs(low).values())
