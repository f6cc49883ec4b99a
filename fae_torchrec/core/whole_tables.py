"""Tables made all hot with the fast memory that a selection leaves: where every row fits, no row needs to be cold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fae_torchrec.core.expected_access import expected_access
from fae_torchrec.core.hot_set import HotSet
from fae_torchrec.core.popularity import PopularityProfile


def with_whole_tables(hot_set: HotSet, profile: PopularityProfile) -> HotSet:
    """Makes tables all hot as far as the hot set's budget goes; those first that take the most cold accesses per byte.

    A selection makes no row hot that the sample did not see, whatever the budget. Where memory is left for all rows of a table, that is
    too careful: its unseen rows would stay cold for nothing.

    Args:
        hot_set: the selection, with its budget.
        profile: what it was selected from.

    Returns:
        The hot set itself if no further table fits; its `used_bytes` are at most `budget_bytes`.
    """
    left = hot_set.budget_bytes - hot_set.used_bytes
    hot_ids = dict(hot_set.hot_ids)
    tables = [table for table in hot_set.tables if len(hot_ids[table.name]) < table.rows]
    missing = {table.name: (table.rows - len(hot_ids[table.name])) * table.row_bytes for table in tables}
    if not any(needed <= left for needed in missing.values()):
        return hot_set
    cold = {name: access.cold_ids_per_sample for name, access in expected_access(profile, hot_ids).items()}
    for table in sorted(tables, key=lambda table: (-cold[table.name] / missing[table.name], missing[table.name], table.name)):
        if missing[table.name] <= left:
            left -= missing[table.name]
            hot_ids[table.name] = np.arange(table.rows, dtype=np.int64)
    share = profile.hot_inputs(hot_ids)
    return replace(
        hot_set,
        hot_ids=hot_ids,
        used_bytes=hot_set.budget_bytes - left,
        coverage=profile.coverage(hot_ids),
        hot_inputs=share.value,
        hot_inputs_interval=(share.low, share.high),
    )
