"""Which tier a row lives in and at which slot: a checked bijection between row ids and hot slots."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fae_torchrec.core.archive import load_archive, save_archive
from fae_torchrec.core.errors import DataError
from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.core.hot_set import HotSet
from fae_torchrec.core.row_ids import check_ids, checked_hot_ids, find_slots, hot_bytes
from fae_torchrec.core.tables import TableKind, TableSet

_KIND = "row placement"


@dataclass(frozen=True, eq=False)
class RowPlacement:
    """The tier and slot of every row (what FAE's Embedding Replicator copies, FAE §4.2).

    A hot row's slot is its index in the ascending hot ids of its table. A cold row has no slot: it stays at its home, its id in the
    original table. The arrays are part of a frozen value: treat them as read-only.

    Attributes:
        tables: the tables.
        hot_ids: table name -> int64 [hot rows], strictly ascending; all ids if the table is all hot.
        hot_set_fingerprint: the parent.
        budget_bytes: fast memory per rank that the hot set was selected for (weights and optimizer state).
        hot_inputs: predicted share of samples that are all hot, 0..1.
        coverage: share of counted accesses that are hot, 0..1.
        hot_inputs_interval: ends of the interval of `hot_inputs` (`estimate.CONFIDENCE`).

    Raises:
        DataError: the hot ids of a table are missing, out of order, repeated or out of range.
    """

    tables: TableSet
    hot_ids: Mapping[str, np.ndarray]
    hot_set_fingerprint: str
    budget_bytes: int
    hot_inputs: float
    coverage: float
    hot_inputs_interval: tuple[float, float] = (0.0, 1.0)
    _masks: dict[str, np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hot_ids", checked_hot_ids(self.tables, self.hot_ids))

    @classmethod
    def from_hot_set(cls, hot_set: HotSet) -> RowPlacement:
        """Places the rows of a hot set."""
        return cls(
            tables=hot_set.tables,
            hot_ids=hot_set.hot_ids,
            hot_set_fingerprint=hot_set.fingerprint,
            budget_bytes=hot_set.budget_bytes,
            hot_inputs=hot_set.hot_inputs,
            coverage=hot_set.coverage,
            hot_inputs_interval=hot_set.hot_inputs_interval,
        )

    def hot_rows(self, table: str) -> int:
        """Number of hot rows of a table, which is the number of its slots."""
        return len(self.hot_ids[table])

    def kind(self, table: str) -> TableKind:
        """HOT if all rows of the table are hot, COLD if none is, else SPLIT."""
        if self.hot_rows(table) == self.tables[table].rows:
            return TableKind.HOT
        return TableKind.SPLIT if self.hot_rows(table) else TableKind.COLD

    def slots(self, table: str, ids: np.ndarray) -> np.ndarray:
        """Slots of ids: int64 of the shape of `ids`, -1 where the row is cold.

        Raises:
            DataError: an id is not a row of the table.
        """
        check_ids(f"table {table!r}", ids, self.tables[table].rows)
        return find_slots(self.hot_ids[table], ids)

    def ids(self, table: str, slots: np.ndarray) -> np.ndarray:
        """Ids of slots, the inverse of `slots` on the hot rows: int64 of the shape of `slots`.

        Raises:
            DataError: a slot is outside 0..hot_rows-1.
        """
        if not self.hot_rows(table) and slots.size:
            raise DataError(f"table {table!r} is all cold and has no slots, received {slots.size}")
        check_ids(f"slots of table {table!r}", slots, self.hot_rows(table))
        ids: np.ndarray = self.hot_ids[table][slots]
        return ids

    def is_hot(self, table: str, ids: np.ndarray) -> np.ndarray:
        """Whether rows are hot: bool of the shape of `ids`, one memory access per id.

        Raises:
            DataError: an id is not a row of the table.
        """
        check_ids(f"table {table!r}", ids, self.tables[table].rows)
        kind = self.kind(table)
        hot: np.ndarray = self.hot_mask(table)[ids] if kind is TableKind.SPLIT else np.full(ids.shape, kind is TableKind.HOT)
        return hot

    def hot_mask(self, table: str) -> np.ndarray:
        """Whether each row of a table is hot: bool [rows], made at the first call and kept as long as the placement."""
        if table not in self._masks:
            mask = np.zeros(self.tables[table].rows, dtype=np.bool_)
            mask[self.hot_ids[table]] = True
            self._masks[table] = mask
        return self._masks[table]

    @cached_property
    def hot_bytes(self) -> int:
        """Bytes of all hot rows of all tables: weights and optimizer state."""
        return hot_bytes(self.tables, self.hot_ids)

    @cached_property
    def fingerprint(self) -> str:
        """Names the placement by what decides where a row is: the tables' names and rows, and the hot ids."""
        return fingerprint(_KIND, self.tables.fingerprint, *self.hot_ids.values())

    def check_tables(self, tables: TableSet) -> None:
        """Checks that the placement belongs to these tables.

        Raises:
            FingerprintError: it was made for other tables; names both fingerprints and the first difference.
        """
        self.tables.check_same(tables, f"row placement {self.fingerprint}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the placement to one .npz file, under a temporary name first; `path` may be a URI that iopath knows."""
        save_archive(
            path,
            _KIND,
            fingerprint=self.fingerprint,
            parent=self.hot_set_fingerprint,
            fields={
                "tables": self.tables.to_json(),
                "hot_set_fingerprint": self.hot_set_fingerprint,
                "budget_bytes": self.budget_bytes,
                "hot_inputs": self.hot_inputs,
                "coverage": self.coverage,
                "hot_inputs_interval": list(self.hot_inputs_interval),
            },
            arrays={"hot_ids": self.hot_ids},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RowPlacement:
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
                **{
                    **fields,
                    "tables": TableSet.from_json(fields["tables"]),
                    "hot_inputs_interval": tuple(fields["hot_inputs_interval"]),
                    **arrays,
                }
            ),
        )
