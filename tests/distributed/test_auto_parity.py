"""Two ranks train with what `from_profile` chose by itself, and get the stock result."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology

from fae_torchrec.core.tables import TableKind
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables
from tests.distributed.small_model import CPU, Case, new_batch, new_model, shard, start_weights, train, whole_tensors

CASE = Case(optimizer="rowwise_adagrad", steps=30)


def _trained(rank: int) -> dict[str, Any]:
    stock = shard(CASE, None)
    losses = train(stock, (new_batch(CASE, step, rank) for step in range(CASE.steps)))
    model = new_model(CASE)
    dense = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("ebc.")}
    profile = Calibrator(model_tables(model), sample_rate=0.5, seed=1).run(new_batch(CASE, step, 0) for step in range(40))
    topology = Topology(world_size=2, local_world_size=2, compute_device="cpu")
    planner = FAEShardingPlanner.from_profile(profile, topology, 16, pinned_max_rows=6)
    sharders = get_fae_sharders()
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    ours = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders)
    ours.load_state_dict({**dense, **start_weights(CASE)})
    our_losses = train(ours, (new_batch(CASE, step, rank) for step in range(CASE.steps)))
    kinds = {table.name: planner.placement.kind(table.name) for table in planner.placement.tables}
    return {
        "stock": (losses, whole_tensors(stock.state_dict())),
        "ours": (our_losses, whole_tensors(ours.state_dict())),
        "kinds": kinds,
        "hot_bytes": planner.placement.hot_bytes,
        "budget": planner.explanation.budget_bytes,
        "start": start_weights(CASE),
    }


def test_two_ranks_with_an_automatic_budget_equal_stock() -> None:
    first, second = run_on_local_ranks(_trained, 2, timeout_s=240)
    assert first["kinds"] == second["kinds"]
    assert TableKind.SPLIT in first["kinds"].values() and first["kinds"]["tiny"] is TableKind.HOT
    assert 0 < first["hot_bytes"] <= first["budget"]
    for result in (first, second):
        torch.testing.assert_close(result["ours"], result["stock"], rtol=1e-5, atol=1e-6)
    changed = [key for key, weight in first["start"].items() if not torch.allclose(first["ours"][1][key], weight, atol=1e-3)]
    assert len(changed) == len(first["start"]), "the control: all tables were trained"
