"""Tables made all hot with the fast memory that a selection leaves: where every row fits, no row needs to be cold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fae_torchrec.core.expected_access import TableAccess, expected_access
from fae_torchrec.core.hot_set import HotSet
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_ids import hot_bytes

MOST_ROWS = 1 << 25
"""Rows of tables made all hot, over all of them: a placement names each hot row, 8 bytes of host memory on every rank."""


def with_whole_tables(
    hot_set: HotSet,
    profile: PopularityProfile,
    bytes_beside: Callable[[TableAccess], int] | None = None,
    pays: Callable[[TableAccess], bool] | None = None,
    room_bytes: int | None = None,
) -> HotSet:
    """Makes tables all hot as far as the hot set's budget goes; those first that take the most cold accesses per byte.

    A selection makes no row hot that the sample did not see, whatever the budget. Where memory is left for all rows of a table, that is
    too careful: its unseen rows would stay cold for nothing. At most `MOST_ROWS` rows become hot so.

    Args:
        hot_set: the selection, with its budget.
        profile: what it was selected from.
        bytes_beside: bytes that a table's further hot rows take besides their own; given what is expected of it now.
        pays: whether all of a table should be hot, if it fits; given what is expected of it now. Default: yes.
        room_bytes: for hot rows and what is beside them. Default: the hot set's budget.

    Returns:
        The hot set itself if no further table fits; its `used_bytes` are at most `budget_bytes`.
    """
    room = hot_set.budget_bytes if room_bytes is None else room_bytes
    left, rows_left = room - hot_set.used_bytes, MOST_ROWS
    hot_ids = dict(hot_set.hot_ids)
    missing = {table.name: (table.rows - len(hot_ids[table.name])) * table.row_bytes for table in hot_set.tables}
    tables = [table for table in hot_set.tables if 0 < missing[table.name] <= left and table.rows <= MOST_ROWS]
    if not tables:
        return hot_set
    access = expected_access(profile, hot_ids)
    cold = {name: one.cold_ids_per_sample for name, one in access.items()}
    before = left
    for table in sorted(tables, key=lambda table: (-cold[table.name] / missing[table.name], missing[table.name], table.name)):
        beside = 0 if bytes_beside is None else bytes_beside(access[table.name])
        if missing[table.name] + beside > left or table.rows > rows_left or not (pays is None or pays(access[table.name])):
            continue
        left, rows_left = left - missing[table.name] - beside, rows_left - table.rows
        hot_ids[table.name] = np.arange(table.rows, dtype=np.int64)
    if left == before:
        return hot_set
    share = profile.hot_inputs(hot_ids)
    return replace(
        hot_set,
        hot_ids=hot_ids,
        used_bytes=hot_bytes(hot_set.tables, hot_ids),
        coverage=profile.coverage(hot_ids),
        hot_inputs=share.value,
        hot_inputs_interval=(share.low, share.high),
    )
