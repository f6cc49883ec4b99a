"""A real DLRM, sharded by the stock planner and by ours: the same start, and after 50 steps on the same batches the same model."""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fae_torchrec.core.tables import Optimizer
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.sharded_embedding_bag import ShardedFAEEmbeddingBagCollection
from fae_torchrec.modules.model_tables import model_tables
from tests.distributed.small_model import optimizer_state, whole_tensors
from tests.training.small_run import BATCH_SIZE, Samples, new_model, new_placement, sharded

STEPS = 50
ATOL = 2e-7  # the last bit of a weight near 1; a weight near 0 that passed by such ones keeps their rounding
OPTIMIZERS = (Optimizer.SGD, Optimizer.ROWWISE_ADAGRAD)
WAYS: dict[str, dict[str, Any]] = {
    "stock": {},
    "replicated": {},
    "table-wise": {"hot_tier": "table_wise"},
    "left": {"stock_tables": ["t_b", "t_d"]},
}
Runs = dict[tuple[Optimizer, str], dict[str, Any]]


def _train(optimizer: Optimizer, way: str) -> dict[str, Any]:
    unsharded = new_model(optimizer)
    left = WAYS[way].get("stock_tables", ())
    placement = None if way == "stock" else new_placement(model_tables(unsharded, leave=left))
    model, combined = sharded(unsharded, placement, **WAYS[way])
    start = whole_tensors(model.state_dict())
    source = Samples(STEPS * BATCH_SIZE * dist.get_world_size())
    losses = []
    for batch in islice(source.batches(BATCH_SIZE, rank=dist.get_rank(), world_size=dist.get_world_size()), STEPS):
        combined.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        combined.step()
        losses.append(loss.item())
    return {
        "start": start,
        "losses": losses,
        "weights": whole_tensors(model.state_dict()),
        "optimizer": optimizer_state(model),
        "is ours": any(isinstance(module, ShardedFAEEmbeddingBagCollection) for module in model.modules()),
        "optimized": sorted(combined.params),
    }


def _train_all(rank: int) -> Runs:
    return {(optimizer, way): _train(optimizer, way) for optimizer in OPTIMIZERS for way in WAYS}


@cache
def trained(ranks: int) -> list[Runs]:
    return run_on_local_ranks(_train_all, ranks, timeout_s=240)


both = pytest.mark.parametrize("ranks", [1, 2])
each = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@both
@each
def test_start_weights_are_the_unsharded_ones(optimizer: Optimizer, ranks: int) -> None:
    expected = new_model(optimizer).state_dict()
    for rank in trained(ranks):
        for way in WAYS:
            start = rank[optimizer, way]["start"]
            assert start.keys() == expected.keys()
            assert all(torch.equal(start[key], expected[key]) for key in expected)


@both
@each
@pytest.mark.parametrize("way", [way for way in WAYS if way != "stock"])
def test_fifty_steps_equal_stock(way: str, optimizer: Optimizer, ranks: int) -> None:
    """Must show 3 of the issue: every weight within 1e-5 relative, on TorchRec's own DLRMTrain."""
    for rank in trained(ranks):
        stock, ours = rank[optimizer, "stock"], rank[optimizer, way]
        assert ours["is ours"] and not stock["is ours"]
        assert len(ours["losses"]) == STEPS
        torch.testing.assert_close(ours["weights"], stock["weights"], rtol=1e-5, atol=ATOL)
        torch.testing.assert_close(ours["optimizer"], stock["optimizer"], rtol=1e-5, atol=1e-10)
        torch.testing.assert_close(ours["losses"], stock["losses"], rtol=1e-5, atol=0)


@both
def test_training_moves_what_is_compared(ranks: int) -> None:
    """The control: both optimizers leave the start, and each other, behind by far more than the tolerance."""
    sgd, rowwise = (trained(ranks)[0][optimizer, "replicated"] for optimizer in OPTIMIZERS)
    for key, start in sgd["start"].items():
        assert not torch.allclose(sgd["weights"][key], start, rtol=1e-3, atol=1e-4), key
        assert not torch.allclose(sgd["weights"][key], rowwise["weights"][key], rtol=1e-3, atol=1e-4), key


@both
@each
def test_every_parameter_has_one_optimizer(optimizer: Optimizer, ranks: int) -> None:
    """A rank's fused optimizer has the tables that the rank holds; together the ranks have them all."""
    every = sorted(dict(new_model(optimizer).named_parameters()))
    for way in WAYS:
        runs = [rank[optimizer, way] for rank in trained(ranks)]
        assert sorted({name for run in runs for name in run["optimized"]}) == every
        assert all(len(set(run["optimized"])) == len(run["optimized"]) for run in runs)
