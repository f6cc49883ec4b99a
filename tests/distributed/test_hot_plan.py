"""Where hot rows and the homes of all-hot tables lie, and what is left for the cold tier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import CacheParams
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSet
from fae_torchrec.distributed.constraints import COLD_TIERS
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables

META = torch.device("meta")


def topology(device: str = "cpu", **more: Any) -> Topology:
    return Topology(world_size=2, local_world_size=2, compute_device=device, **more)


def pooled(sizes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """One collection of tables [rows, dim] under SGD."""
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[f"f{name}"])
        for name, (rows, dim) in sizes.items()
    ]
    model = nn.ModuleDict({"ebc": EmbeddingBagCollection(configs, device=META)})
    apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    return model


def placed(tables: TableSet, hot: Mapping[str, int]) -> RowPlacement:
    """The first rows of tables are hot: so many."""
    hot_ids = {name: np.arange(hot.get(name, 0)) for name in tables.names}
    return RowPlacement(tables=tables, hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


SIZES = {"tiny": (6, 4), "big": (200, 4), "wide": (90, 8), "frozen": (50, 4), "other": (120, 8)}
HOT = {"tiny": 6, "big": 60, "wide": 30, "other": 25}
HOT_BYTES = {"tiny": 96, "big": 960, "wide": 960, "other": 800}  # SGD: weights alone
INDEX = 4 * (6 + 200 + 90 + 50 + 120)


@pytest.mark.parametrize(("device", "where"), [("cpu", "cpu"), ("cuda", "cuda:{}")])
def test_homes_of_all_hot_tables_go_to_the_rank_that_holds_least(device: str, where: str) -> None:
    model = pooled({"cold": (50, 4), "a": (30, 4), "b": (25, 4), "c": (25, 4), "d": (40, 4)})
    placement = placed(model_tables(model), {"a": 30, "b": 25, "c": 25, "d": 40})
    constraints = {"cold": ParameterConstraints(sharding_types=["table_wise"])}
    plan = FAEShardingPlanner(placement, topology(device), 16, constraints).plan(model, get_fae_sharders()).plan["ebc"]
    (first,) = plan["cold"].ranks
    # Rows by rank, after `cold` on the first: d -> 50 40, a -> 50 70, b -> 75 70, c -> 75 95.
    assert {name: plan[name].ranks for name in "dabc"} == {"d": [1 - first], "a": [1 - first], "b": [first], "c": [1 - first]}
    (shard,), (stock,) = (plan[name].sharding_spec.shards for name in ("c", "cold"))
    assert (shard.shard_offsets, shard.shard_sizes) == ([0, 0], [25, 4])
    assert str(shard.placement) == f"rank:{1 - first}/{where.format(1 - first)}"
    assert str(stock.placement) == f"rank:{first}/{where.format(first)}", "control: as stock writes it"
    assert (plan["c"].sharding_type, plan["c"].compute_kernel) == ("table_wise", "fused")


@pytest.mark.parametrize(
    ("tier", "device", "cold"), [("table_wise", "cpu", "host"), ("table_wise", "cuda", "uvm"), ("row_wise", "cuda", "uvm_caching")]
)
def test_sharded_hot_rows_are_planned_by_stock(tier: str, device: str, cold: str) -> None:
    model = pooled(SIZES)
    given = {"big": ParameterConstraints(sharding_types=["table_wise", "row_wise"], cache_params=CacheParams(load_factor=0.3))}
    planner = FAEShardingPlanner(placed(model_tables(model), HOT), topology(device), 16, given, cold, tier)
    plan = planner.plan(model, get_fae_sharders()).plan["ebc"]
    assert isinstance(plan, FAEModuleShardingPlan)
    assert plan.hot_tier == tier
    assert list(plan) == list(SIZES)
    assert list(plan.hot) == ["tiny", "big", "wide", "other"], "what has hot rows"
    assert plan["tiny"] is plan.hot["tiny"], "the home of an all-hot table is its hot rows"
    assert {(sharding.sharding_type, sharding.compute_kernel) for sharding in plan.hot.values()} == {(tier, "fused")}
    by_row = {"tiny": [[3, 4], [3, 4]], "big": [[30, 4], [30, 4]], "wide": [[15, 8], [15, 8]], "other": [[13, 8], [12, 8]]}
    by_table = {"tiny": [[6, 4]], "big": [[60, 4]], "wide": [[30, 8]], "other": [[25, 8]]}
    shards = {name: [shard.shard_sizes for shard in sharding.sharding_spec.shards] for name, sharding in plan.hot.items()}
    assert shards == (by_row if tier == "row_wise" else by_table)
    assert {plan[name].compute_kernel for name in ("big", "wide", "frozen", "other")} == set(COLD_TIERS[cold, device].kernels)
    assert plan["big"].cache_params.load_factor == 0.3, "the user's word on the cold tier"
    assert plan.hot["big"].cache_params is None
    assert sum(shard.shard_sizes[0] for shard in plan["big"].sharding_spec.shards) == 200


def test_the_cold_tier_is_planned_over_what_the_hot_tier_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    of_stock = EmbeddingShardingPlanner.__init__

    def spy(self: Any, *args: Any, **more: Any) -> None:
        seen.append([device.storage.ddr for device in more["topology"].devices])
        of_stock(self, *args, **more)

    monkeypatch.setattr(EmbeddingShardingPlanner, "__init__", spy)
    model = pooled(SIZES)
    placement = placed(model_tables(model), HOT)
    FAEShardingPlanner(placement, topology(ddr_cap=10**6), 16).plan(model, get_fae_sharders())
    assert seen == [[10**6 - INDEX - sum(HOT_BYTES.values())] * 2]
    seen.clear()
    plan = FAEShardingPlanner(placement, topology(ddr_cap=10**6), 16, hot_tier="table_wise").plan(model, get_fae_sharders()).plan["ebc"]
    held = [sum(count for name, count in HOT_BYTES.items() if plan.hot[name].ranks == [rank]) for rank in range(2)]
    assert min(held) > 0
    assert seen == [[10**6 - INDEX] * 2, [10**6 - INDEX - count for count in held]]


def test_hot_rows_larger_than_storage() -> None:
    model = pooled(SIZES)
    placement = placed(model_tables(model), HOT)
    planner = FAEShardingPlanner(placement, topology(ddr_cap=4000), 16)
    with pytest.raises(PlannerError, match=r"on rank 0 \(hot rows 2,816, index 1,864\), which has 4,000 bytes of ddr; select the hot set"):
        planner.plan(model, get_fae_sharders())
    with pytest.raises(PlannerError, match=r"takes 1,864 bytes on rank 0 \(index 1,864\), which has 1,000"):
        FAEShardingPlanner(placement, topology(ddr_cap=1000), 16, hot_tier="table_wise").plan(model, get_fae_sharders())
    with pytest.raises(PlannerError):  # the stock planner's own
        FAEShardingPlanner(placement, topology(ddr_cap=2500), 16, hot_tier="table_wise").plan(model, get_fae_sharders())


@pytest.mark.parametrize(("tier", "device"), [("replicated", "cpu"), ("table_wise", "cpu"), ("row_wise", "cuda")])
def test_unpooled_collections_are_planned_like_pooled_ones(tier: str, device: str) -> None:
    model = pooled({"a": (40, 4), "b": (40, 4)})
    configs = [EmbeddingConfig(name=name, num_embeddings=40, embedding_dim=4, feature_names=[f"f{name}"]) for name in ("c", "d")]
    model["ec"] = EmbeddingCollection(configs, device=META)
    placement = placed(model_tables(model), {"a": 40, "b": 10, "c": 40, "d": 10})
    plan = FAEShardingPlanner(placement, topology(device), 16, hot_tier=tier).plan(model, get_fae_sharders()).plan
    assert {path: (type(part), list(part)) for path, part in plan.items()} == {
        "ebc": (FAEModuleShardingPlan, ["a", "b"]),
        "ec": (FAEModuleShardingPlan, ["c", "d"]),
    }
    assert list(plan["ec"].hot) == ([] if tier == "replicated" else ["c", "d"])
    assert plan["ec"]["d"].sharding_type in ("table_wise", "row_wise")
    assert (plan["ec"]["c"] is plan["ec"].hot.get("c")) == (tier != "replicated")
