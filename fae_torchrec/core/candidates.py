"""The rows that may become hot: every row that was seen, of every table that is not pinned, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from fae_torchrec.core.errors import BudgetError, ConfigError, DataError
from fae_torchrec.core.input_sample import InputSample
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_ids import find_slots
from fae_torchrec.core.tables import TableSet, TableSpec

_MOST = 2**31 - 1  # candidates have int32 numbers


def pinned_tables(tables: TableSet, pinned_max_rows: int = 1024) -> tuple[TableSpec, ...]:
    """The tables that are always all hot; the sum of their `total_bytes` is the smallest budget that can be kept.

    Raises:
        ConfigError: `pinned_max_rows` is negative.
    """
    if pinned_max_rows < 0:
        raise ConfigError(f"pinned_max_rows must be at least 0, received {pinned_max_rows}")
    return tuple(table for table in tables if table.rows <= pinned_max_rows)


class Candidates:
    """A profile's seen rows, numbered: table after table in table order, ids ascending within a table. Memory: 24 bytes per row.

    A selection is a bool [C] over the candidates. A row that was not seen is no candidate, so no policy can make it hot.

    Attributes:
        profile: where the counts come from.
        pinned: the tables that are all hot because they are small.
        tables: the others.
        starts: int64 [len(tables) + 1], number of each table's first candidate, and C.
        counts: int64 [C], accesses.
        row_bytes: int64 [C], bytes of one row in fast memory.

    Raises:
        ConfigError: `pinned_max_rows` is negative.
        DataError: 2**31 or more rows were seen.
    """

    def __init__(self, profile: PopularityProfile, pinned_max_rows: int) -> None:
        self.profile = profile
        self.pinned = pinned_tables(profile.tables, pinned_max_rows)
        self.tables = tuple(table for table in profile.tables if table.rows > pinned_max_rows)
        seen = [profile.counts[table.name] for table in self.tables]
        sizes = [counts.ids.size for counts in seen]
        if sum(sizes) > _MOST:
            raise DataError(f"{sum(sizes)} rows were seen, at most {_MOST} can be selected from; count fewer inputs (a lower sample_rate)")
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self.counts = np.concatenate([np.zeros(0, dtype=np.int64), *(counts.counts for counts in seen)])
        self.row_bytes = np.repeat(np.array([table.row_bytes for table in self.tables], dtype=np.int64), sizes)
        self.total_bytes = int(self.row_bytes.sum())

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def counted_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The `incidence` of the profile's counted inputs, kept for who asks next."""
        return self.incidence(self.profile.counted_inputs)

    def room(self, budget_bytes: int) -> int:
        """Bytes that a budget leaves for candidates after the pinned tables.

        Raises:
            BudgetError: the pinned tables alone exceed it; says what they need.
        """
        needed = sum(table.total_bytes for table in self.pinned)
        if needed > budget_bytes:
            raise BudgetError(
                f"the budget of {budget_bytes} bytes cannot hold the {len(self.pinned)} pinned tables, which need {needed} bytes (weights "
                f"and optimizer state); give at least {needed} bytes, or pin fewer tables with a smaller pinned_max_rows"
            )
        return budget_bytes - needed

    def hot_ids(self, hot: np.ndarray) -> Mapping[str, np.ndarray]:
        """The selection as hot ids of every table, the pinned ones' included: table name -> int64 [hot rows], ascending."""
        ids = {table.name: np.arange(table.rows, dtype=np.int64) for table in self.pinned}
        for number, table in enumerate(self.tables):
            ids[table.name] = self.profile.counts[table.name].ids[hot[self.starts[number] : self.starts[number + 1]]]
        return ids

    def incidence(self, inputs: InputSample) -> tuple[np.ndarray, np.ndarray]:
        """Which candidates each input needs: all of them must be hot for the input to be hot.

        Args:
            inputs: inputs whose rows were counted.

        Returns:
            input int32 [P] and candidate int32 [P], each pair once, for the ids in tables that are not pinned. Ids that were not counted
            are left out (there are none in counted inputs).
        """
        of_input, of_candidate = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int32)]
        for number, table in enumerate(self.tables):
            several = len(table.feature_names) > 1 or int(inputs.lengths[table.feature_names[0]].max()) > 1
            pairs = [self._feature_pairs(inputs, number, feature) for feature in table.feature_names]
            at, row = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
            if several:  # only here can an input need a row twice
                pairs_once = np.unique(at * np.int64(len(self)) + row, return_counts=True)[0]  # numpy 2.4 hashes without counts: slower
                at, row = np.divmod(pairs_once, len(self))
            of_input.append(at.astype(np.int32))
            of_candidate.append(row.astype(np.int32))
        return np.concatenate(of_input), np.concatenate(of_candidate)

    def _feature_pairs(self, inputs: InputSample, number: int, feature: str) -> tuple[np.ndarray, np.ndarray]:
        slots = find_slots(self.profile.counts[self.tables[number].name].ids, inputs.values[feature])
        known = slots >= 0
        return inputs.input_of_id(feature)[known], slots[known] + self.starts[number]
