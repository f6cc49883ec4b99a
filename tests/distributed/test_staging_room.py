"""The bytes of a staging area: room for the cold ids that the profile promises for a batch, twice, and never more than there are rows."""

from __future__ import annotations

import numpy as np
from torchrec.distributed.planner.types import ParameterConstraints

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.distributed.staging_room import staging_bytes

ROW = 8 * 4 + 4  # the widest cold row: eight floats and a row-wise state


def _placement(coverage: float, hot_inputs: float, rows: int = 10**6) -> RowPlacement:
    """A small table that is all hot, a split one of two features, a cold one."""
    tables = TableSet((TableSpec("small", 4, 16, ("a",)), TableSpec("split", rows, 8, ("b", "c")), TableSpec("cold", rows, 4, ("d",))))
    hot = {"small": np.arange(4), "split": np.arange(100), "cold": np.arange(0)}
    return RowPlacement(tables, hot, "by hand", 0, hot_inputs, coverage)


def test_two_batches_of_cold_ids() -> None:
    """A batch of 1,000 has 4,000 ids; 0.9 are hot, and half the samples, whose ids are not in a cold batch."""
    expected = 1.25 * 4000 * 0.1 / 0.5 + 256
    assert staging_bytes(_placement(0.9, 0.5), 1000) == 2 * expected * ROW


def test_without_a_profile_every_id_of_a_table_that_may_be_cold_counts() -> None:
    assert staging_bytes(_placement(0.0, 0.0), 1000) == 2 * (1.25 * 3000 + 256) * ROW
    assert staging_bytes(_placement(1.0, 1.0), 1000) == 2 * 256 * ROW, "a profile that saw hot ids alone"


def test_bags_of_several_ids() -> None:
    given = {"split": ParameterConstraints(pooling_factors=[3.0, 5.0])}
    assert staging_bytes(_placement(0.0, 0.0), 1000, given) == 2 * (1.25 * 9000 + 256) * ROW


def test_no_more_than_all_rows_and_none_without_cold_ones() -> None:
    assert staging_bytes(_placement(0.0, 0.0, rows=500), 1000) == 2 * 1000 * ROW
    tables = TableSet((TableSpec("small", 4, 16, ("a",)),))
    assert staging_bytes(RowPlacement(tables, {"small": np.arange(4)}, "by hand", 0, 1.0, 1.0), 1000) == 0


def test_torchrecs_default_batch_size() -> None:
    assert staging_bytes(_placement(0.0, 0.0), None) == staging_bytes(_placement(0.0, 0.0), 512)
