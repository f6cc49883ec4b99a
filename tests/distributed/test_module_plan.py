"""FAEModuleShardingPlan: always true, and the same after a copy."""

from __future__ import annotations

import copy
import pickle

import numpy as np

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan


def test_a_plan_is_true_and_can_be_copied_and_pickled() -> None:
    tables = TableSet((TableSpec("t", 9, 4, ("f",)),))
    placement = RowPlacement(
        tables=tables, hot_ids={"t": np.arange(5)}, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0
    )
    plan = FAEModuleShardingPlan({}, placement, "table_wise", {"t": "its sharding"})
    for other in (plan, copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert type(other) is FAEModuleShardingPlan
        assert other, "DistributedModelParallel takes a false plan for none"
        assert (dict(other), other.hot_tier, dict(other.hot)) == ({}, "table_wise", {"t": "its sharding"})
        assert other.placement.fingerprint == placement.fingerprint
    plan["t"] = "home"
    assert dict(copy.deepcopy(plan)) == {"t": "home"}
