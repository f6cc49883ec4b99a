"""Row ids as arrays: their range checked, the sorted hot ids of all tables checked, slots found in them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.tables import TableSet


def check_ids(owner: str, ids: np.ndarray, rows: int) -> None:
    """Checks that ids name rows, in one pass and without a copy.

    Args:
        owner: whose ids they are, for the message (a table's name).
        ids: int64 ids, any shape.
        rows: the number of rows that exist.

    Raises:
        DataError: the ids are not int64, or an id is outside 0..rows-1 (the first such id is named).
    """
    if ids.dtype != np.int64:
        raise DataError(f"{owner}: ids must be int64, received {ids.dtype}; convert them with astype(np.int64)")
    # As unsigned numbers the negative ids are the largest of all: one maximum finds both ends.
    if ids.size and int(ids.view(np.uint64).max()) >= rows:
        position = int(np.flatnonzero(ids.view(np.uint64) >= rows)[0])
        raise DataError(
            f"{owner}: id {int(ids.flat[position])} (number {position} of {ids.size}) is outside the allowed range 0..{rows - 1}; "
            "fix the data or give the table more rows"
        )


def checked_hot_ids(tables: TableSet, hot_ids: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The hot ids of every table, proved to be a set of rows in ascending order.

    Args:
        tables: the tables; every one needs an entry.
        hot_ids: table name -> int64 [hot rows], strictly ascending, in 0..rows-1; all ids if the table is all hot.

    Returns:
        The same arrays in table order.

    Raises:
        DataError: a table is missing or unknown, or its ids are not a strictly ascending vector of its rows.
    """
    if hot_ids.keys() != set(tables.names):
        missing, unknown = sorted(set(tables.names) - hot_ids.keys()), sorted(hot_ids.keys() - set(tables.names))
        raise DataError(f"hot ids must name every table once; missing {missing}, unknown {unknown}, allowed {list(tables.names)}")
    for table in tables:
        ids = hot_ids[table.name]
        check_ids(f"hot ids of table {table.name!r}", ids, table.rows)
        if ids.ndim != 1 or not bool(np.all(ids[1:] > ids[:-1])):
            raise DataError(
                f"hot ids of table {table.name!r} must be a vector in ascending order without repeats, received shape {ids.shape}; "
                "use numpy.unique"
            )
    return {name: hot_ids[name] for name in tables.names}


def find_slots(hot_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Where ids stand among the hot ids of their table, by binary search.

    Args:
        hot_ids: int64 [hot rows], strictly ascending.
        ids: int64, any shape.

    Returns:
        int64 of the shape of `ids`: the slot (index in `hot_ids`), or -1 where the id is cold.
    """
    if not hot_ids.size:
        return np.full(ids.shape, -1, dtype=np.int64)
    slots = np.searchsorted(hot_ids, ids)
    np.minimum(slots, hot_ids.size - 1, out=slots)
    return np.where(hot_ids[slots] == ids, slots, np.int64(-1))


def hot_bytes(tables: TableSet, hot_ids: Mapping[str, np.ndarray]) -> int:
    """Bytes of all hot rows of all tables: weights and optimizer state."""
    return sum(table.row_bytes * len(hot_ids[table.name]) for table in tables)
