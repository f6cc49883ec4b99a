"""FAEShardingPlanner: what it plans, and every way in which it says no."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from fae_torchrec.core.errors import FingerprintError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSet
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharded_embedding_bag import ShardedFAEEmbeddingBagCollection
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables
from tests.distributed.small_model import Case, new_batch, new_model, placement_of, shard, train, whole_tensors

CASE = Case()


def topology(world_size: int = 2, **more: Any) -> Topology:
    return Topology(world_size=world_size, local_world_size=world_size, compute_device="cpu", **more)


def with_hot(tables: TableSet, share: float) -> RowPlacement:
    """The first rows of every table are hot."""
    hot_ids = {table.name: np.arange(round(share * table.rows)) for table in tables}
    return RowPlacement(tables=tables, hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


def test_the_plan_holds_the_cold_tier_and_the_placement() -> None:
    placement = placement_of(CASE)
    constraints = {"big": ParameterConstraints(pooling_factors=[3.0, 3.0]), "tiny": ParameterConstraints(sharding_types=["row_wise"])}
    plan = FAEShardingPlanner(placement, topology(), batch_size=16, constraints=constraints).plan(new_model(CASE), get_fae_sharders())
    assert list(plan.plan) == ["ebc"]
    ebc = plan.plan["ebc"]
    assert isinstance(ebc, FAEModuleShardingPlan)
    assert ebc.placement is placement
    assert (ebc.hot_tier, dict(ebc.hot)) == ("replicated", {})
    assert list(ebc) == ["tiny", "big", "wide", "frozen", "other"], "`tiny` is all hot: its constraints do not matter"
    assert {(sharding.sharding_type, sharding.compute_kernel) for sharding in ebc.values()} == {("table_wise", "fused")}
    assert constraints["big"].sharding_types is None, "the user's constraints stay as they were"


def test_without_a_hot_row_the_plan_is_the_stock_one_under_the_constraints_of_the_cold_tier() -> None:
    model = new_model(CASE)
    placement = with_hot(model_tables(model), 0.0)
    ours = FAEShardingPlanner(placement, topology(), 16).plan(model, get_fae_sharders())
    constraints = {table.name: ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"]) for table in placement.tables}
    stock = EmbeddingShardingPlanner(topology(), 16, constraints=constraints).plan(model, get_default_sharders())
    assert str(ours) == str(stock)
    assert not any(isinstance(plan, FAEModuleShardingPlan) for plan in ours.plan.values())


def test_without_a_hot_row_there_is_nothing_on_the_host_beside_a_gpu() -> None:
    model, gpus = new_model(CASE), Topology(world_size=2, local_world_size=2, compute_device="cuda")
    placement = with_hot(model_tables(model), 0.0)
    with pytest.raises(PlannerError, match=r"module 'ebc': the placement has no hot row of its tables .*choose cold_tier='uvm'"):
        FAEShardingPlanner(placement, gpus, 16, cold_tier="host").plan(model, get_fae_sharders())
    FAEShardingPlanner(placement, gpus, 16, cold_tier="uvm").plan(model, get_fae_sharders())


@pytest.mark.parametrize(
    ("ranks", "options", "kernel", "staged"),
    [
        (1, {}, "fused_uvm", True),
        (1, {"cold_cache_bytes": 0}, "fused_uvm", False),
        (1, {"hot_tier": "table_wise"}, "fused_uvm", False),
        (1, {"cold_tier": "uvm_caching"}, "fused_uvm_caching", False),
        (2, {}, "fused_uvm_caching", False),
        (2, {"cold_cache_bytes": 2**30}, "fused_uvm_caching", False),  # more than all rows take
        (2, {"cold_tier": "uvm"}, "fused_uvm", False),
    ],
)
def test_the_cold_tier_on_gpus(ranks: int, options: dict[str, Any], kernel: str, staged: bool) -> None:
    """One GPU stages rows of UVM; several have a cache, prefetched into."""
    gpus = Topology(world_size=ranks, local_world_size=ranks, compute_device="cuda")
    model = new_model(CASE)
    plan = FAEShardingPlanner(placement_of(CASE), gpus, 16, **options).plan(model, get_fae_sharders()).plan["ebc"]
    assert isinstance(plan, FAEModuleShardingPlan)
    cold = [plan[name] for name in ("big", "wide", "frozen", "other")]
    assert {sharding.compute_kernel for sharding in cold} == {kernel}
    prefetched = [sharding.cache_params is not None and bool(sharding.cache_params.prefetch_pipeline) for sharding in cold]
    assert prefetched == [kernel == "fused_uvm_caching"] * 4
    assert (plan.staging_rows > 0) == staged


def test_other_tables() -> None:
    placement = placement_of(CASE)
    model = nn.Module()
    model.ebc = EmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="tiny", num_embeddings=7, embedding_dim=4, feature_names=["a"])], device=torch.device("meta")
    )
    given = model_tables(model).fingerprint
    with pytest.raises(FingerprintError) as error:
        FAEShardingPlanner(placement, topology()).plan(model, get_fae_sharders())
    assert placement.tables.fingerprint in str(error.value)
    assert given in str(error.value)
    assert placement.fingerprint in str(error.value)
    assert "saved table 'tiny' with 6 rows and features ['a'], given table 'tiny' with 7 rows" in str(error.value)


def _both_kinds() -> nn.Module:
    """A pooled and an unpooled collection."""
    bags = [EmbeddingBagConfig(name=name, num_embeddings=40, embedding_dim=4, feature_names=[f"f{name}"]) for name in ("a", "b")]
    rows = [EmbeddingConfig(name=name, num_embeddings=40, embedding_dim=4, feature_names=[f"f{name}"]) for name in ("c", "d")]
    meta = torch.device("meta")
    return nn.ModuleDict({"ebc": EmbeddingBagCollection(bags, device=meta), "ec": EmbeddingCollection(rows, device=meta)})


def test_tables_left_to_stock() -> None:
    model = _both_kinds()
    placement = with_hot(model_tables(model, leave=["b", "c", "d"]), 0.5)
    given = {"b": ParameterConstraints(sharding_types=["data_parallel"]), "c": ParameterConstraints(sharding_types=["column_wise"])}
    planner = FAEShardingPlanner(placement, topology(), 16, given, stock_tables=("b", "c", "d"))
    ours = planner.plan(model, get_fae_sharders()).plan
    stock = EmbeddingShardingPlanner(topology(), 16, constraints=given).plan(model, get_default_sharders()).plan
    assert (type(ours["ebc"]), list(ours["ebc"])) == (FAEModuleShardingPlan, ["a", "b"])
    assert [(part["ebc"]["b"].sharding_type, part["ebc"]["b"].compute_kernel) for part in (ours, stock)] == [("data_parallel", "dense")] * 2
    assert not isinstance(ours["ec"], FAEModuleShardingPlan)
    assert [part["ec"]["c"].sharding_type for part in (ours, stock)] == ["column_wise"] * 2


def test_which_tables_may_be_left_to_stock() -> None:
    model = _both_kinds()
    placement = with_hot(model_tables(model, leave=["b", "c", "d"]), 0.5)
    with pytest.raises(FingerprintError, match=r"stock sharding: FAEShardingPlanner\(..., stock_tables=\['b', 'c', 'd'\]\)"):
        FAEShardingPlanner(placement, topology()).plan(model, get_fae_sharders())
    with pytest.raises(PlannerError, match=r"stock_tables \['a'\] are tables of the row placement .*; a table is either placed or left"):
        FAEShardingPlanner(placement, topology(), stock_tables=["a", "b", "c", "d"])
    with pytest.raises(PlannerError, match=r"stock_tables \['e'\] are not tables of the model, which has \['a', 'b', 'c', 'd'\]"):
        FAEShardingPlanner(placement, topology(), stock_tables=["b", "c", "d", "e"]).plan(model, get_fae_sharders())


def test_constraints_that_leave_nothing() -> None:
    given = {"big": ParameterConstraints(sharding_types=["row_wise"])}
    message = r"table 'big': constraints allow the sharding types \['row_wise'\], its cold tier offers \['table_wise'\]; add one of these"
    with pytest.raises(PlannerError, match=message):
        FAEShardingPlanner(placement_of(CASE), topology(), constraints=given)
    given = {"other": ParameterConstraints(compute_kernels=["dense"])}
    with pytest.raises(
        PlannerError, match=r"table 'other': constraints allow the compute kernels \['dense'\], its cold tier offers \['fused'\]"
    ):
        FAEShardingPlanner(placement_of(CASE), topology(), constraints=given)


def test_stock_arguments_that_change_the_tiers() -> None:
    model, free = new_model(CASE), EmbeddingEnumerator(topology(), 16, {"big": ParameterConstraints(sharding_types=["column_wise"])})
    planner = FAEShardingPlanner(placement_of(CASE), topology(), 16, enumerator=free)
    with pytest.raises(PlannerError, match=r"table 'big': the stock planner gave \('column_wise', 'fused'\) for its cold tier.*enumerator"):
        planner.plan(model, get_fae_sharders())


def test_no_process_group() -> None:
    with pytest.raises(PlannerError, match=r"needs a process group.*init_process_group, or use plan\(\)"):
        FAEShardingPlanner(placement_of(CASE), topology(1)).collective_plan(new_model(CASE))


class TwoCollections(nn.Module):
    """Two collections; the second has no hot row."""

    def __init__(self) -> None:
        super().__init__()
        first = [
            EmbeddingBagConfig(name="tiny", num_embeddings=6, embedding_dim=4, feature_names=["a"]),
            EmbeddingBagConfig(name="big", num_embeddings=200, embedding_dim=4, feature_names=["b"]),
        ]
        second = [EmbeddingBagConfig(name="frozen", num_embeddings=50, embedding_dim=4, feature_names=["d"])]
        meta = torch.device("meta")
        self.parts = nn.ModuleList([EmbeddingBagCollection(first, device=meta), EmbeddingBagCollection(second, device=meta)])
        apply_optimizer_in_backward(torch.optim.SGD, self.parts.parameters(), {"lr": 0.1})
        self.over = nn.Linear(12, 1)
        nn.init.constant_(self.over.weight, 0.5)
        nn.init.constant_(self.over.bias, 0.0)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (part(batch.sparse_features).to_dict() for part in self.parts)
        logits = self.over(torch.cat([first["a"], first["b"], second["d"]], dim=1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


def _train_two(rank: int, hot_cold: bool) -> Any:
    model = TwoCollections()
    tables = model_tables(model)
    hot_ids = {"tiny": np.arange(6), "big": np.arange(0, 200, 3), "frozen": np.arange(0)}
    placement = RowPlacement(tables=tables, hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)
    constraints = {table.name: ParameterConstraints(sharding_types=["table_wise"]) for table in tables}
    planner = FAEShardingPlanner(placement) if hot_cold else EmbeddingShardingPlanner(constraints=constraints)
    sharders = get_fae_sharders() if hot_cold else get_default_sharders()
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    generator = torch.Generator().manual_seed(3)
    start = {
        f"parts.{int(t.name == 'frozen')}.embedding_bags.{t.name}.weight": torch.rand(t.rows, t.dim, generator=generator) for t in tables
    }
    sharded.load_state_dict({**start, "over.weight": torch.full((1, 12), 0.5), "over.bias": torch.zeros(1)})
    losses = train(sharded, [new_batch(CASE, step, rank) for step in range(4)])
    return losses, whole_tensors(sharded.state_dict()), [type(part).__name__ for part in sharded.module.parts]


def _written(plan: ShardingPlan) -> str:
    return f"{plan} {plan.plan['ebc'].hot_tier} {plan.plan['ebc'].hot}"


def _error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class _FailingPartitioner:
    def partition(self, *_: Any, **__: Any) -> None:
        raise PlannerError("nothing fits, says this partitioner")


def _on_two_ranks(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    placement, model, group = placement_of(CASE), new_model(CASE), dist.group.WORLD
    planner = FAEShardingPlanner(placement, topology(), 16)
    sharded = FAEShardingPlanner(placement, topology(), 16, hot_tier="table_wise")
    seen["plans"] = [_written(plan(model, get_fae_sharders())) for plan in (planner.plan, planner.collective_plan)]
    seen["sharded plans"] = [_written(plan(model, get_fae_sharders())) for plan in (sharded.plan, sharded.collective_plan)]
    differing = with_hot(placement.tables, 0.1 * (1 + rank))
    seen["placements"] = differing.fingerprint
    seen["differing placements"] = _error_of(lambda: FAEShardingPlanner(differing, topology()).collective_plan(model, pg=group))
    other_tables = with_hot(model_tables(_both_kinds()), 0.5) if rank else placement
    seen["other tables on rank 1"] = _error_of(lambda: FAEShardingPlanner(other_tables, topology()).collective_plan(model))
    failing = FAEShardingPlanner(placement, topology(), partitioner=_FailingPartitioner())
    seen["planning fails on rank 0"] = _error_of(lambda: failing.collective_plan(model))
    batches = [new_batch(CASE, step, rank) for step in range(4)]
    for name, share in (("stock", None), ("no hot row", 0.0), ("all hot", 1.0)):
        sharded = shard(CASE, None if share is None else with_hot(placement.tables, share))
        seen[name] = (type(sharded.module.ebc), train(sharded, batches), whole_tensors(sharded.state_dict()))
        if name == "all hot":
            seen["cold tier of all hot"] = len(sharded.module.ebc._cold)
    seen["two collections"] = [_train_two(rank, hot_cold) for hot_cold in (False, True)]
    return seen


@cache
def seen_by_ranks() -> list[dict[str, Any]]:
    return run_on_local_ranks(_on_two_ranks, 2, timeout_s=120)


def test_collective_plan_equals_plan_on_every_rank() -> None:
    for kind in ("plans", "sharded plans"):
        assert len({plan for seen in seen_by_ranks() for plan in seen[kind]}) == 1


def test_differing_placements_are_an_error_on_every_rank() -> None:
    fingerprints = [seen["placements"] for seen in seen_by_ranks()]
    for seen in seen_by_ranks():
        assert seen["differing placements"].startswith(
            f"FingerprintError: the ranks hold different row placements: {fingerprints} by rank; load"
        )
        assert seen["other tables on rank 1"].startswith("FingerprintError: the ranks hold different row placements")


def test_an_error_of_the_stock_planner_is_raised_on_every_rank() -> None:
    for seen in seen_by_ranks():
        assert "nothing fits, says this partitioner" in seen["planning fails on rank 0"]


def test_extreme_placements_train_as_stock() -> None:
    for seen in seen_by_ranks():
        _, losses, weights = seen["stock"]
        for name, kind in (("no hot row", ShardedEmbeddingBagCollection), ("all hot", ShardedFAEEmbeddingBagCollection)):
            assert seen[name][0] is kind
            torch.testing.assert_close(seen[name][1], losses, rtol=1e-5, atol=0)
            torch.testing.assert_close(seen[name][2], weights, rtol=1e-5, atol=1e-6)
        assert seen["cold tier of all hot"] == 0


def test_a_model_with_two_collections() -> None:
    for seen in seen_by_ranks():
        (stock_losses, stock, _), (losses, ours, modules) = seen["two collections"]
        assert modules == ["ShardedFAEEmbeddingBagCollection", "ShardedEmbeddingBagCollection"]
        torch.testing.assert_close(losses, stock_losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
