"""How much fast memory a staging area for cold rows gets (`Staging`): room for those of two batches."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torchrec.distributed.planner.constants import BATCH_SIZE, POOLING_FACTOR
from torchrec.distributed.planner.types import ParameterConstraints

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind

_MARGIN, _MORE_IDS = 1.25, 256  # batches differ, small ones the most


def staging_bytes(placement: RowPlacement, batch_size: int | None, constraints: Mapping[str, ParameterConstraints] | None = None) -> int:
    """Bytes for two halves, each for as many rows as a batch of cold samples should have cold ids, a quarter more and 256.

    Should: by the profile of the placement. A batch that has more all the same is looked up without the area, which is slower.

    Args:
        placement: where the rows live, with its hot share of ids (`coverage`) and of samples (`hot_inputs`); of one made by hand they
            are 0, and every id counts.
        batch_size: samples; None for TorchRec's default.
        constraints: ids per sample (`pooling_factors`) by table, where they are not 1.

    Returns:
        Weights and optimizer state; 0 where no table has a cold row.
    """
    cold = [table for table in placement.tables if placement.kind(table.name) is not TableKind.HOT]
    if not cold:
        return 0
    ids = {table.name: _ids_per_sample(table.name, len(table.feature_names), constraints or {}) for table in placement.tables}
    of_cold_samples = (1 - placement.coverage) / max(1 - placement.hot_inputs, 1e-6)
    per_sample = min(sum(ids.values()) * of_cold_samples, sum(ids[table.name] for table in cold))
    rows = math.ceil(_MARGIN * (batch_size or BATCH_SIZE) * per_sample) + _MORE_IDS
    return 2 * min(rows, sum(table.rows for table in cold)) * max(table.row_bytes for table in cold)


def _ids_per_sample(table: str, features: int, constraints: Mapping[str, ParameterConstraints]) -> float:
    given = constraints[table].pooling_factors if table in constraints else None
    return float(sum(given) if given else features * POOLING_FACTOR)
