"""Which rows are hot: one access threshold over all tables, converged to a budget of bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fae_torchrec.core.archive import load_archive, save_archive
from fae_torchrec.core.errors import BudgetError, ConfigError
from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.core.histogram import count_levels
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_ids import checked_hot_ids, hot_bytes
from fae_torchrec.core.tables import TableSet, TableSpec

_KIND = "hot set"


@dataclass(frozen=True, eq=False)
class HotSet:
    """The rows worth fast memory (what FAE's Embedding Classifier tags, FAE §4.2). The arrays are read-only by agreement.

    Attributes:
        tables: the tables.
        hot_ids: table name -> int64 [hot rows], strictly ascending; all ids if the table is all hot.
        pinned: names of the tables that are all hot because they are small.
        budget_bytes: fast memory per rank that was allowed (weights and optimizer state).
        used_bytes: fast memory per rank that the hot rows take.
        threshold: accesses; every row with at least as many is hot.
        policy: how it was selected, "threshold".
        coverage: share of counted accesses that are hot, 0..1.
        hot_inputs: share of the profile's probe that is all hot, 0..1.
        profile_fingerprint: the parent.

    Raises:
        DataError: the hot ids of a table are missing, out of order, repeated or out of range.
    """

    tables: TableSet
    hot_ids: Mapping[str, np.ndarray]
    pinned: tuple[str, ...]
    budget_bytes: int
    used_bytes: int
    threshold: int
    policy: str
    coverage: float
    hot_inputs: float
    profile_fingerprint: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "hot_ids", checked_hot_ids(self.tables, self.hot_ids))

    @cached_property
    def fingerprint(self) -> str:
        """Names the hot set by its parent, how it was selected, and the hot ids."""
        return fingerprint(
            _KIND,
            self.tables.fingerprint,
            self.profile_fingerprint,
            [self.policy, self.budget_bytes, self.used_bytes, self.threshold, list(self.pinned)],
            *self.hot_ids.values(),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the hot set to one .npz file, under a temporary name first; `path` may be a URI that iopath knows."""
        save_archive(
            path,
            _KIND,
            fingerprint=self.fingerprint,
            parent=self.profile_fingerprint,
            fields={
                "tables": self.tables.to_json(),
                "pinned": list(self.pinned),
                "budget_bytes": self.budget_bytes,
                "used_bytes": self.used_bytes,
                "threshold": self.threshold,
                "policy": self.policy,
                "coverage": self.coverage,
                "hot_inputs": self.hot_inputs,
                "profile_fingerprint": self.profile_fingerprint,
            },
            arrays={"hot_ids": self.hot_ids},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HotSet:
        """Reads what `save` wrote.

        Raises:
            ConfigError: there is no such file.
            DataError: the file is damaged or holds something else.
            FingerprintError: the content is not what was saved.
        """
        return load_archive(
            path,
            _KIND,
            lambda fields, arrays: cls(
                **{**fields, "tables": TableSet.from_json(fields["tables"]), "pinned": tuple(fields["pinned"]), **arrays}
            ),
        )


def select_hot_set(profile: PopularityProfile, budget_bytes: int, *, pinned_max_rows: int = 1024) -> HotSet:
    """Selects the hot rows by one access threshold over all tables (FAE's Statistical Optimizer, FAE §4.1).

    Small tables are pinned: all hot whatever their counts, since one unseen value of a tiny table would make a whole input cold.
    Over all other tables the threshold is the smallest t >= 1 for which the rows with at least t accesses fit in what is left of
    the budget. What is then left is filled with rows of t-1 accesses (if that is at least 1) in table order, then by id; a table
    whose next row does not fit is passed over. A row that the profile never saw is not hot, however large the budget.

    FAE finds the threshold by trying values and estimating sizes from samples of the tables; with exact counts at hand it is read
    off the bytes at every distinct count. Time is a few passes over the counts; memory is 8 bytes per hot row, and in passing at
    most 10 bytes per row of one table.

    Args:
        profile: the counts.
        budget_bytes: fast memory per rank, weights and optimizer state.
        pinned_max_rows: tables of at most so many rows are pinned; 0 pins none.

    Returns:
        The hot set; its `used_bytes` are at most `budget_bytes`.

    Raises:
        BudgetError: the pinned tables alone exceed the budget; says what they need.
        ConfigError: `pinned_max_rows` is negative.
    """
    return _Selector(profile, pinned_max_rows).select(budget_bytes)


def hot_inputs_curve(
    profile: PopularityProfile, budgets_bytes: Sequence[int], pinned_max_rows: int = 1024
) -> list[tuple[int, float, float]]:
    """How hot inputs and coverage grow with the budget, for the picture (FAE Fig. 5).

    Args:
        profile: the counts.
        budgets_bytes: budgets of fast memory per rank, in any order.
        pinned_max_rows: as in `select_hot_set`.

    Returns:
        One (used_bytes, hot_inputs, coverage) per budget, in the order given.

    Raises:
        BudgetError: a budget is smaller than the pinned tables.
        ConfigError: `pinned_max_rows` is negative.
    """
    selector = _Selector(profile, pinned_max_rows)  # the counts are tallied once for all budgets
    selected = (selector.select(budget) for budget in budgets_bytes)
    return [(hot_set.used_bytes, hot_set.hot_inputs, hot_set.coverage) for hot_set in selected]


def pinned_tables(tables: TableSet, pinned_max_rows: int = 1024) -> tuple[TableSpec, ...]:
    """The tables that are always all hot; the sum of their `total_bytes` is the smallest budget that `select_hot_set` accepts.

    Raises:
        ConfigError: `pinned_max_rows` is negative.
    """
    if pinned_max_rows < 0:
        raise ConfigError(f"pinned_max_rows must be at least 0, received {pinned_max_rows}")
    return tuple(table for table in tables if table.rows <= pinned_max_rows)


class _Selector:
    """A profile's rows by access count: tallied once, cut at any budget.

    levels int64 [L]: the distinct counts in all tables that are not pinned, descending; bytes_to int64 [L]: bytes of
    their rows with at least so many accesses.
    """

    def __init__(self, profile: PopularityProfile, pinned_max_rows: int) -> None:
        self.profile = profile
        self.pinned = pinned_tables(profile.tables, pinned_max_rows)
        self.others = tuple(table for table in profile.tables if table.rows > pinned_max_rows)
        tallies = [(count_levels(profile.counts[table.name]), table.row_bytes) for table in self.others]
        every_level = np.concatenate([levels for (levels, _), _ in tallies] or [np.zeros(0, dtype=np.int64)])
        every_bytes = np.concatenate([rows_at * row_bytes for (_, rows_at), row_bytes in tallies] or [np.zeros(0, dtype=np.int64)])
        ascending, level_of = np.unique(every_level, return_inverse=True)
        bytes_at = np.zeros(len(ascending), dtype=np.int64)
        np.add.at(bytes_at, level_of, every_bytes)
        self.levels = ascending[::-1]
        self.bytes_to = np.cumsum(bytes_at[::-1])

    def select(self, budget_bytes: int) -> HotSet:
        profile, tables = self.profile, self.profile.tables
        left = budget_bytes - self._pinned_bytes(budget_bytes)
        fitting = int(np.searchsorted(self.bytes_to, left, side="right"))
        # Bytes only change at a level, so the smallest threshold that fits is just above the first level that does not; and it is 1 whether
        # rows of level 0 fit or not.
        threshold = int(self.levels[fitting]) + 1 if fitting < len(self.levels) else 1
        left -= int(self.bytes_to[fitting - 1]) if fitting else 0

        hot_ids = {table.name: np.arange(table.rows, dtype=np.int64) for table in self.pinned}
        for table in self.others:
            counts = profile.counts[table.name]
            hot = counts >= threshold
            if threshold > 1:
                ties = np.flatnonzero(counts == threshold - 1)[: left // table.row_bytes]
                hot[ties] = True
                left -= len(ties) * table.row_bytes
            hot_ids[table.name] = np.flatnonzero(hot)
        return HotSet(
            tables=tables,
            hot_ids=hot_ids,
            pinned=tuple(table.name for table in self.pinned),
            budget_bytes=budget_bytes,
            used_bytes=hot_bytes(tables, hot_ids),
            threshold=threshold,
            policy="threshold",
            coverage=profile.coverage(hot_ids),
            hot_inputs=profile.hot_inputs(hot_ids),
            profile_fingerprint=profile.fingerprint,
        )

    def _pinned_bytes(self, budget_bytes: int) -> int:
        needed = sum(table.total_bytes for table in self.pinned)
        if needed > budget_bytes:
            raise BudgetError(
                f"the budget of {budget_bytes} bytes cannot hold the {len(self.pinned)} pinned tables, which need {needed} bytes (weights "
                f"and optimizer state); give at least {needed} bytes, or pin fewer tables with a smaller pinned_max_rows"
            )
        return needed
