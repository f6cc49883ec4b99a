"""What a profile lets expect of each table: ids and cold ids per sample, distinct rows of a batch, misses of a cache of cold rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_counts import RowCounts
from fae_torchrec.core.row_ids import find_slots
from fae_torchrec.core.tables import TableSpec

_AGES = np.geomspace(0.05, 2e5, 96)
"""Steps after which an LRU cache has forgotten a row that was not accessed again: one cache size each."""


@dataclass(frozen=True, eq=False)
class AccessRates:
    """Rows by how often a sample accesses them, as levels: rows of one level are alike.

    Attributes:
        rates: float64 [levels], accesses of one row per sample.
        rows: float64 [levels], rows of the level.
    """

    rates: np.ndarray
    rows: np.ndarray

    @property
    def ids_per_sample(self) -> float:
        """Accesses of all these rows per sample."""
        return float(self.rates @ self.rows)

    def joined(self, other: AccessRates) -> AccessRates:
        """The rows of both."""
        return AccessRates(np.concatenate([self.rates, other.rates]), np.concatenate([self.rows, other.rows]))

    def distinct(self, samples: float) -> float:
        """Rows of these that a batch accesses, each once: expected under independent accesses."""
        return float(-np.expm1(-self.rates * samples) @ self.rows)

    def miss_curve(self, samples: float) -> tuple[np.ndarray, np.ndarray]:
        """Misses of an LRU cache that is asked once a step for each distinct row of a batch, by its size (Che's approximation).

        A cache of the size that holds what was accessed in the last T steps, sum over rows of 1 - exp(-rate * samples * T), misses a row
        with probability exp(-rate * samples * T).

        Args:
            samples: of a step, over all ranks.

        Returns:
            Cache sizes in rows, float64 [n] ascending, and the share of lookups missed, float64 [n] descending.
        """
        asked = self.rates * samples
        kept = np.exp(-np.outer(_AGES, asked))
        sizes = (1 - kept) @ self.rows
        lookups = -np.expm1(-asked) * self.rows
        total = lookups.sum()
        misses = kept @ lookups / total if total else np.zeros_like(sizes)
        return np.concatenate([[0.0], sizes]), np.concatenate([[1.0 if total else 0.0], misses])


@dataclass(frozen=True, eq=False)
class TableAccess:
    """Expected accesses of one table under a hot set.

    Attributes:
        table: the table.
        hot_rows: how many of its rows are hot.
        ids: ids per sample of each of its features, hot and cold.
        cold_ids: cold ids per sample of each of its features.
        hot: the hot rows' rates.
        seen: the rates of cold rows that the counts have seen.
        unseen: the rates of the others.
    """

    table: TableSpec
    hot_rows: int
    ids: tuple[float, ...]
    cold_ids: tuple[float, ...]
    hot: AccessRates
    seen: AccessRates
    unseen: AccessRates

    @cached_property
    def cold(self) -> AccessRates:
        """The cold rows' rates."""
        return self.seen.joined(self.unseen)

    def all_hot(self) -> TableAccess:
        """The same table with all of its rows hot."""
        none = AccessRates(np.zeros(0), np.zeros(0))
        return replace(
            self, hot_rows=self.table.rows, cold_ids=(0.0,) * len(self.ids), hot=self.hot.joined(self.cold), seen=none, unseen=none
        )

    @property
    def ids_per_sample(self) -> float:
        """Over all features."""
        return sum(self.ids)

    @property
    def cold_ids_per_sample(self) -> float:
        """Over all features."""
        return sum(self.cold_ids)

    @property
    def coverage(self) -> float:
        """Share of the accesses that are hot; 1 if nothing is accessed."""
        return 1 - self.cold_ids_per_sample / self.ids_per_sample if self.ids_per_sample else 1.0


def expected_access(profile: PopularityProfile, hot_ids: Mapping[str, np.ndarray]) -> dict[str, TableAccess]:
    """What each table's tiers will be asked for, judged by inputs that the counts have not seen, where there are any.

    Counts of a sample say too much of the rows that it saw. So how many accesses go to hot rows, to cold rows that were seen and to rows
    that were not is taken from the fresh inputs; the counts only say how they spread over the rows. Accesses of rows that were not seen
    are spread over all such rows alike.

    Args:
        profile: the counts and the inputs.
        hot_ids: table name -> int64 [hot rows], strictly ascending, for every table.

    Returns:
        Table name -> its expected accesses.
    """
    inputs = profile.counted_inputs if profile.fresh_inputs is None else profile.fresh_inputs
    found = {}
    for table in profile.tables:
        hot, counts = hot_ids[table.name], profile.counts[table.name]
        ids, cold_ids, unseen = [], [], np.zeros(2)  # of cold rows and of hot rows
        for feature in table.feature_names:
            values = inputs.values[feature]
            is_hot = _among(hot, values, table.rows)
            ids.append(values.size / inputs.num_samples)
            cold_ids.append(int((~is_hot).sum()) / inputs.num_samples)
            unseen += np.bincount(is_hot[find_slots(counts.ids, values) < 0], minlength=2) / inputs.num_samples
        row_is_hot = _among(hot, counts.ids, table.rows)
        hot_seen = int(row_is_hot.sum())
        found[table.name] = TableAccess(
            table=table,
            hot_rows=len(hot),
            ids=tuple(ids),
            cold_ids=tuple(cold_ids),
            hot=_seen(counts, row_is_hot, sum(ids) - sum(cold_ids) - unseen[1]).joined(_even(unseen[1], len(hot) - hot_seen)),
            seen=_seen(counts, ~row_is_hot, sum(cold_ids) - unseen[0]),
            unseen=_even(unseen[0], table.rows - len(hot) - (counts.ids.size - hot_seen)),
        )
    return found


def _among(hot: np.ndarray, ids: np.ndarray, rows: int) -> np.ndarray:
    """Whether each id is hot: bool of the shape of `ids`; nothing is searched where all rows are hot."""
    return np.ones(ids.shape, dtype=np.bool_) if len(hot) == rows else find_slots(hot, ids) >= 0


def _seen(counts: RowCounts, chosen: np.ndarray, ids_per_sample: float) -> AccessRates:
    """Levels of the chosen rows that were seen (bool [seen]), whose accesses add up to what is given."""
    levels, number = np.unique(counts.counts[chosen], return_counts=True)
    total = float(levels @ number) if levels.size else 1.0
    return AccessRates(levels * (max(ids_per_sample, 0.0) / total), number.astype(np.float64))


def _even(ids_per_sample: float, rows: int) -> AccessRates:
    """Rows that are accessed alike, as one level; none if there are none."""
    return AccessRates(np.full(min(rows, 1), ids_per_sample / max(rows, 1)), np.full(min(rows, 1), float(rows)))
