"""FAEShardingPlanner.from_profile: bytes by hand, what changes them, what is chosen and why, and how it says no."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from fae_torchrec.core.errors import BudgetError, ConfigError, FingerprintError
from fae_torchrec.core.input_sample import InputSample
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_counts import RowCounts
from fae_torchrec.distributed.hot_choice import CPU_SHARE
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables
from tests.distributed.small_budget import KIB, ROW_BYTES, ROWS, gpus, new_model, new_profile, no_reservation, planned

ALL_ROWS = sum(ROWS.values())


def budget_of(planner: FAEShardingPlanner) -> int:
    return planner.explanation.budget_bytes


def test_the_bytes_of_one_gpu_by_hand() -> None:
    planner = planned(new_model(dense=100))
    (memory,) = planner.explanation.memory
    parts = dict(memory.parts)
    assert (memory.memory, memory.total) == ("hbm", 1024 * KIB)
    assert parts["dense"] == 6 * 4 * 100, "TorchRec: six times the dense parameters, for gradients and optimizer"
    assert parts["kjt"] == 3 * 16 * 8 * 20, "an id for each sample and table, 8 bytes, 20 copies"
    assert parts["index"] == 4 * ALL_ROWS, "more than one row in 16 is hot: a number a row"
    assert parts["cold optimizer state"] == 4 * ROWS["large"], "FBGEMM keeps it on the device; the other two tables are all hot"
    assert parts["hot rows"] == planner.placement.hot_bytes == planner.explanation.hot_bytes
    assert planner.hot_set is not None and planner.hot_set.used_bytes == parts["hot rows"]
    # What was left when nothing was hot yet: the budget and the index; all of the optimizer's states are cold then.
    first = next(choice.because for choice in planner.explanation.choices if choice.what == "budget")
    assert f"cold optimizer state {4 * ALL_ROWS:,}" in first
    left = int(first.split(" has ")[1].split(" of ")[0].replace(",", ""))
    assert budget_of(planner) == left - 4 * ALL_ROWS
    assert memory.left >= 0


def test_the_budget_falls_by_what_else_grows() -> None:
    small, large = (budget_of(planned(new_model(dense))) for dense in (8, 5008))
    assert small - large == 6 * 4 * 5000
    ids = budget_of(planned(new_model(), batch_size=64))
    assert ids < small - 48 * 3 * 8 * 20, "KJTs, activations and the staging area grow with the batch"
    assert budget_of(planned(new_model(), storage_reservation=no_reservation())) - small == 6 * 4 * 8 + 3 * 16 * 8 * 20
    less = budget_of(planned(new_model(), topology=gpus(hbm=1000 * KIB)))
    assert small - less == 24 * KIB
    assert budget_of(planned(new_model(), cold_cache_bytes=0)) > small, "nothing is staged"


def test_stock_tables_come_first() -> None:
    model = new_model()
    profile = new_profile(model, leave=("middle",))
    planner = planned(model, profile, stock_tables=["middle"], constraints={"middle": ParameterConstraints(compute_kernels=["fused"])})
    (memory,) = planner.explanation.memory
    assert memory.parts["stock tables"] >= ROWS["middle"] * ROW_BYTES
    tables = {table.table: table for table in planner.explanation.modules[0].tables}
    assert tables["middle"].kind == "stock" and "stock_tables" in tables["middle"].because
    assert tables["middle"].cold_bytes == memory.parts["stock tables"] and tables["middle"].rows == ROWS["middle"]
    with pytest.raises(PlannerError, match=r"stock_tables \['middle'\] are tables of the popularity profile"):
        FAEShardingPlanner.from_profile(new_profile(model), gpus(), stock_tables=["middle"])


def test_all_tables_fit() -> None:
    planner = planned(new_model(), topology=gpus(hbm=4096 * KIB))
    assert budget_of(planner) == ALL_ROWS * ROW_BYTES == planner.placement.hot_bytes
    assert {table.kind for table in planner.explanation.modules[0].tables} == {"hot"}
    assert planner.explanation.traffic is not None and planner.explanation.traffic.cold_bytes == 0
    reasons = {choice.what: choice.because for choice in planner.explanation.choices}
    assert "every row of every table fits" in reasons["hot rows"]


def test_on_a_cpu_it_is_a_share_of_the_tables() -> None:
    cpu = Topology(world_size=2, local_world_size=2, compute_device="cpu")
    planner = planned(new_model(), topology=cpu)
    assert budget_of(planner) == int(CPU_SHARE * ALL_ROWS * ROW_BYTES)
    assert planner.explanation.hot_tier == "replicated"
    assert planner.explanation.tightest.memory == "ddr"
    # Pinned tables that need more get it.
    pinned = planned(new_model(), topology=cpu, pinned_max_rows=4000)
    assert budget_of(pinned) == (ROWS["tiny"] + ROWS["middle"]) * ROW_BYTES
    # And memory that has less left gives less.
    tight = Topology(world_size=2, local_world_size=2, compute_device="cpu", ddr_cap=900 * KIB)
    assert budget_of(planned(new_model(), topology=tight)) < budget_of(planner)


def test_given_budgets() -> None:
    planner = planned(new_model(), budget="64KiB")
    assert (budget_of(planner), planner.explanation.choices[0].because) == (64 * KIB, "it was given")
    assert budget_of(planned(new_model(), budget="10%")) == ALL_ROWS * ROW_BYTES // 10
    assert budget_of(planned(new_model(), budget=5000)) == 5000
    assert {table.kind for table in planner.explanation.modules[0].tables} == {"hot", "split"}, "rows that nobody saw stay cold"
    for budget in ("much", 0, "200%"):
        with pytest.raises(ConfigError, match="budget"):
            FAEShardingPlanner.from_profile(new_profile(new_model()), gpus(), budget=budget)
    with pytest.raises(BudgetError, match="pinned tables"):
        planned(new_model(), budget=100)


@settings(max_examples=12, deadline=None)
@given(st.integers(220, 1500), st.sampled_from([1, 2, 4]), st.sampled_from(["auto", "uvm", "uvm_caching"]), st.integers(1, 64))
def test_never_more_than_a_rank_has(hbm_kib: int, ranks: int, cold_tier: str, batch_size: int) -> None:
    planner = planned(new_model(), topology=gpus(ranks, hbm_kib * KIB), cold_tier=cold_tier, batch_size=batch_size)
    for memory in planner.explanation.memory:
        assert memory.left >= 0, memory.listed()
        assert memory.total == hbm_kib * KIB
    if planner.explanation.hot_tier == "replicated":
        assert planner.placement.hot_bytes <= budget_of(planner)


def test_no_room() -> None:
    with pytest.raises(
        PlannerError, match=r"budget 'auto': rank 0 has [\d,]+ of 122,880 bytes of hbm left for hot rows \(dense 192, "
    ) as error:
        planned(new_model(), topology=gpus(hbm=120 * KIB))
    assert error.value.error_type is PlannerErrorType.INSUFFICIENT_STORAGE
    for remedy in ("batch_size", "storage_reservation", "hbm_cap", "pinned_max_rows"):
        assert remedy in str(error.value)
    with pytest.raises(PlannerError, match=r"does not fit even without a hot row") as error:
        planned(new_model(), topology=gpus(ddr_cap=100 * KIB))
    assert error.value.error_type is PlannerErrorType.INSUFFICIENT_STORAGE


def test_the_hot_tier_that_moves_fewer_bytes() -> None:
    # A GPU holds all that is worth being hot, and the link between hosts is slow: rows that repeat are best replicated.
    skewed = planned(new_model(), topology=gpus(2, inter_host_bw=1e3, intra_host_bw=1e3), batch_size=512)
    assert skewed.explanation.hot_tier == "replicated"
    reasons = {choice.what: choice.because for choice in skewed.explanation.choices}
    assert "replicated" in reasons["hot tier"] and "row_wise" in reasons["hot tier"]
    # With a fast link and a slow host memory, the ranks together hold more.
    wide = planned(new_model(), topology=gpus(4, hbm=200 * KIB, hbm_to_ddr_mem_bw=1.0, intra_host_bw=1e12), cold_tier="uvm")
    assert wide.explanation.hot_tier in ("row_wise", "table_wise")
    ebc = wide.plan(new_model(), get_fae_sharders()).plan["ebc"]
    assert isinstance(ebc, FAEModuleShardingPlan) and dict(ebc.hot)
    given_tier = planned(new_model(), topology=gpus(4, hbm=200 * KIB, hbm_to_ddr_mem_bw=1.0, intra_host_bw=1e12), hot_tier="replicated")
    assert given_tier.explanation.hot_tier == "replicated"


def test_the_explanation() -> None:
    planner = planned(new_model(), topology=gpus(2, hbm=400 * KIB), hot_tier="replicated", cold_tier="uvm_caching")
    told = planner.explanation
    (module,) = told.modules
    tables = {table.table: table for table in module.tables}
    assert (module.path, module.hot_cold) == ("ebc", True)
    assert tables["tiny"].because == "small, so always hot (pinned_max_rows)"
    large = tables["large"]
    assert (large.kind, large.rows, large.hot_rows) == ("split", ROWS["large"], planner.placement.hot_rows("large"))
    assert large.hot_bytes == large.hot_rows * ROW_BYTES and large.hot_sharding == "replicated"
    assert large.cold_kernel == "fused_uvm_caching" and large.cold_sharding in ("table_wise", "row_wise", "table_row_wise")
    assert large.coverage is not None and large.cold_ids_per_sample is not None and large.ids_per_sample == 1.0
    assert large.cold_ids_per_sample == pytest.approx(1 - large.coverage)
    assert f"{large.hot_rows:,} of {large.rows:,} rows" in large.because
    assert large.expected_miss_rate is not None and 0 < large.expected_miss_rate <= 1
    assert sum(module.cold_bytes) == sum(t.rows for t in module.tables if t.kind != "hot") * ROW_BYTES
    assert module.hot_bytes == (told.hot_bytes, told.hot_bytes)
    assert told.hot_inputs[1] <= told.hot_inputs[0] <= told.hot_inputs[2]
    assert json.loads(json.dumps(told.to_json()))["modules"][0]["tables"][2]["table"] == "large"


def test_nothing_was_planned_yet() -> None:
    planner = FAEShardingPlanner.from_profile(new_profile(new_model()), gpus())
    for look in (lambda: planner.placement, lambda: planner.explanation):
        with pytest.raises(PlannerError, match="nothing was planned yet"):
            look()
    assert planner.hot_set is None


def test_a_profile_of_other_tables() -> None:
    other = new_profile(new_model(rows={**ROWS, "tiny": 51}))
    with pytest.raises(FingerprintError, match="popularity profile"):
        planned(new_model(), other)


def test_a_given_placement_with_its_profile() -> None:
    """The stock planner is told of the cold rows, and the explanation has figures; without the profile it has none."""
    model, first = new_model(), planned(new_model(), topology=gpus(hbm=400 * KIB))
    common: dict[str, Any] = {"topology": gpus(2), "batch_size": 16, "stats": []}
    known = FAEShardingPlanner(first.placement, profile=new_profile(model), **common)
    known.plan(model, get_fae_sharders())
    blind = FAEShardingPlanner(first.placement, **common)
    blind.plan(model, get_fae_sharders())
    told, silent = (each.explanation.modules[0].tables[2] for each in (known, blind))
    assert told.cold_ids_per_sample is not None and silent.cold_ids_per_sample is None
    assert silent.cache_load_factor is None and told.cache_load_factor is not None and told.cache_load_factor < 0.2
    assert known.placement is first.placement
    assert known.explanation.traffic is not None and blind.explanation.traffic is None


def _on_ranks(rank: int, differs: bool) -> tuple[str, dict[str, int], int]:
    model = new_model()
    profile = new_profile(model, seed=3 + (rank if differs else 0))
    cpu = Topology(world_size=2, local_world_size=2, compute_device="cpu")
    planner = FAEShardingPlanner.from_profile(profile, cpu, 16)
    plan = planner.collective_plan(model, get_fae_sharders(), dist.group.WORLD)
    ebc = plan.plan["ebc"]
    assert isinstance(ebc, FAEModuleShardingPlan)
    return ebc.placement.fingerprint, {name: len(ids) for name, ids in ebc.placement.hot_ids.items()}, planner.explanation.tightest.left


def test_all_ranks_have_the_plan_of_rank_0() -> None:
    first, second = run_on_local_ranks(_on_ranks, 2, False, timeout_s=120)
    assert first == second
    assert set(first[1]) == set(model_tables(new_model()).names)


def test_ranks_with_other_profiles() -> None:
    with pytest.raises(FingerprintError, match=r"the ranks hold different popularity profiles: .*load the same profile file on every rank"):
        run_on_local_ranks(_on_ranks, 2, True, timeout_s=120)


def test_an_unpooled_table_takes_a_row_for_each_id() -> None:
    """Pooled, ten ids give one row; unpooled, ten."""
    rng = np.random.default_rng(1)
    bytes_of = []
    for kind, config in ((EmbeddingBagCollection, EmbeddingBagConfig), (EmbeddingCollection, EmbeddingConfig)):
        tables = [config(name="t", num_embeddings=2000, embedding_dim=8, feature_names=["f"])]
        model = nn.ModuleDict({"tables": kind(tables=tables, device=torch.device("meta"))})
        specs = model_tables(model)
        ids, lengths = rng.integers(0, 2000, 1000), np.full(100, 10)
        counts = {"t": RowCounts.from_dense(np.bincount(ids, minlength=2000))}
        profile = PopularityProfile(specs, counts, InputSample({"f": ids}, {"f": lengths}, 100), None, 100, 100, 1.0, 0, "generated")
        planner = planned(model, profile, gpus(hbm=4096 * KIB), batch_size=4)
        bytes_of.append(planner.explanation.tightest.parts["hot lookups"])
    assert bytes_of[1] - bytes_of[0] == pytest.approx(4 * 2 * 9 * 8 * 4, rel=0.3), "nine further rows and their gradients for each sample"
