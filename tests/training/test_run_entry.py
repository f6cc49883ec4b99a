"""A run's entry: the audit weighted as the run was, and fast memory by hand for plans of both devices."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ShardingPlan

from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.audit import KindAudit
from fae_torchrec.training.metrics import Scores
from fae_torchrec.training.progress import TrainResult
from fae_torchrec.training.run_entry import planned_cold_memory, planned_fast_memory, run_entry
from fae_torchrec.training.shard import fae_planner
from tests.training.small_run import ROWS, new_model, new_placement

HOT = {"hot rows": 800, "index": 200, "stock tables": 0}


def entry(samples_by_kind: dict[str, int], kinds: dict[str, KindAudit], name: str = "fae") -> dict[str, Any]:
    result = TrainResult(
        samples_per_s=1.0,
        samples_per_s_spread=(1.0, 1.0),
        train_loss=0.5,
        loss_curve=[(1, 0.5)],
        test=Scores(0.5, 0.5, 0.5, 1),
        samples_by_kind=samples_by_kind,
        steps_by_kind={kind: count // 10 for kind, count in samples_by_kind.items()},
        swap_losses=[],
        wall_s=1.0,
    )
    return run_entry(name, 2, HOT, result, kinds)


def test_audit_is_weighted_as_the_run() -> None:
    kinds = {
        "hot": KindAudit(4, 40, hot_samples=40, lookups=200, crossed_bytes=400, crossed_by_collective={"allreduce": 400}),
        "cold": KindAudit(
            1,
            10,
            lookups=50,
            cold_rows=30,
            cold_bytes=600,
            crossed_bytes=1000,
            forward_ms=3.0,
            cached_rows=20,
            cache_hits=5,
            crossed_by_collective={"alltoall_base": 600, "allreduce": 400},
        ),
        "mixed": KindAudit(1, 5, hot_samples=2, lookups=25, cold_rows=6, cold_bytes=120, crossed_bytes=600, input_dist_ms=8.0),
    }
    whole = entry({"hot": 600, "cold": 300, "mixed": 100}, kinds)
    assert whole["hot_inputs"] == pytest.approx(0.6 + 0.1 * 2 / 5)
    assert whole["hot_batches"] == 0.6
    assert whole["bytes_crossed_per_sample"] == pytest.approx(0.6 * 10 + 0.3 * 100 + 0.1 * 120)
    assert whole["cold_rows_per_sample"] == pytest.approx(0.3 * 3 + 0.1 * 6 / 5)
    assert whole["bytes_crossed_by_collective"] == pytest.approx({"allreduce": 0.6 * 10 + 0.3 * 40, "alltoall_base": 0.3 * 60})
    assert whole["lookups_per_sample"] == 5
    assert whole["cache_hits"] == 0.25
    assert whole["hot_lookups"] == pytest.approx(1 - (0.3 * 3 + 0.1 * 1.2) / 5)
    assert whole["cold_bytes_per_sample"] == pytest.approx(0.3 * 60 + 0.1 * 24)
    assert whole["breakdown"]["cold"] == {"input_dist": 0, "forward": 3.0, "backward": 0, "optimizer": 0}
    assert whole["breakdown"]["mixed"]["input_dist"] == 8.0
    assert (whole["fast_memory_bytes"], whole["fast_memory"]) == (1000, HOT)
    json.dumps(whole)
    # A kind that the audited batches had none of: the other that uses both tiers stands for it; for hot, the average of all.
    cold, hot, mixed = kinds["cold"], kinds["hot"], kinds["mixed"]
    assert entry({"hot": 10, "cold": 10}, {"hot": hot, "mixed": mixed})["cold_rows_per_sample"] == 0.6
    assert entry({"hot": 10}, {"cold": cold, "mixed": mixed})["cold_rows_per_sample"] == pytest.approx(36 / 15)
    stock = entry({"mixed": 10}, {"mixed": mixed}, "stock")
    assert (stock["hot_inputs"], stock["hot_batches"], stock["hot_lookups"], stock["cache_hits"]) == (None,) * 4
    assert entry({"mixed": 10}, {"mixed": mixed}, "stock-uvm")["hot_inputs"] is None


def plan(device: str, hot_tier: str = "replicated", left: tuple[str, ...] = (), ranks: int = 2, **options: Any) -> ShardingPlan:
    model = new_model()
    placement = new_placement(model_tables(model, leave=left))
    topology = Topology(world_size=ranks, local_world_size=ranks, compute_device=device)
    return fae_planner(placement, topology, 16, hot_tier=hot_tier, stock_tables=left, **options).plan(model, get_fae_sharders())


INDEX = 4 * sum(ROWS.values())  # the plain map: four bytes a row
HOT_ROWS = 6 + 60 + 24 + 12


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fast_memory_of_replicated_rows(device: str) -> None:
    """A row is four fp32 and SGD keeps no state; cold tables lie on the host."""
    parts = {"hot rows": HOT_ROWS * 16, "index": INDEX, "stock tables": 0}
    if device == "cuda":  # two ranks: UVM caching of a fifth of t_b, t_c and t_d, half of each here, with 20 bytes beside a row
        parts["cache"] = (30 + 12 + 6) * (16 + 20)
    assert planned_fast_memory(plan(device), model_tables(new_model()), device, 2) == parts


def test_cold_memory() -> None:
    """Whole tables, hot rows' homes too; t_a is all hot and has none. On 1 rank it is all there; a table left to stock is beside it."""
    tables = model_tables(new_model())
    whole = {name: rows * 16 for name, rows in ROWS.items()}
    assert planned_cold_memory(plan("cpu", ranks=1), tables, "cpu", 1) == {
        "cold tier": whole["b"] + whole["c"] + whole["d"], "stock tables": 0,
    }  # fmt: skip
    left = plan("cpu", left=("t_b",), ranks=1)
    assert planned_cold_memory(left, tables, "cpu", 1) == {"cold tier": whole["c"] + whole["d"], "stock tables": whole["b"]}
    assert planned_cold_memory(plan("cuda", left=("t_b",), ranks=1), tables, "cuda", 1)["stock tables"] == 0, "in device memory"
    two = planned_cold_memory(plan("cuda"), tables, "cuda", 2)
    assert two == {"cold tier": (150 + 60 + 30) * 16, "stock tables": 0}, "by row: half on each rank"


def test_fast_memory_of_a_staging_area() -> None:
    """On one GPU there is one: two halves of whole rows."""
    given = planned_fast_memory(plan("cuda", ranks=1, cold_cache_bytes=1000), model_tables(new_model()), "cuda", 1)
    assert given["staging"] == 2 * (1000 // 32) * 16
    assert planned_fast_memory(plan("cuda", ranks=1), model_tables(new_model()), "cuda", 1)["staging"] > 0
    assert "staging" not in planned_fast_memory(plan("cuda", ranks=1, cold_cache_bytes=0), model_tables(new_model()), "cuda", 1)


def test_fast_memory_of_the_fullest_rank() -> None:
    """Table-wise, the 60 hot rows of t_b make one rank the fullest, whoever else is there."""
    planned = planned_fast_memory(plan("cpu", "table_wise"), model_tables(new_model()), "cpu", 2)
    assert planned["index"] == INDEX
    assert HOT_ROWS * 16 / 2 <= planned["hot rows"] < HOT_ROWS * 16


def test_fast_memory_of_tables_left_to_stock() -> None:
    left = ("t_b", "t_c")
    on_gpu, on_cpu = (planned_fast_memory(plan(device, left=left), model_tables(new_model()), device, 2) for device in ("cuda", "cpu"))
    hot = {"hot rows": (6 + 12) * 16, "index": 4 * (6 + 60)}
    assert on_cpu == {**hot, "stock tables": 0}
    assert {name: on_gpu[name] for name in hot} == hot
    assert 120 * 16 <= on_gpu["stock tables"] <= 420 * 16, "at least a table, at most both, on the fullest rank"


def test_fast_memory_of_stock() -> None:
    model, tables = new_model(), model_tables(new_model())
    constraints = {name: ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"]) for name in tables.names}
    for device, expected in (("cuda", sum(ROWS.values()) * 16), ("cpu", 0)):
        topology = Topology(world_size=1, local_world_size=1, compute_device=device)
        stock = EmbeddingShardingPlanner(topology=topology, batch_size=16, constraints=constraints).plan(model, get_default_sharders())
        assert planned_fast_memory(stock, tables, device, 1) == {"hot rows": 0, "index": 0, "stock tables": expected}
