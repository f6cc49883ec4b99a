"""The fused optimizer of both tiers: learning rates reach every kernel, and it looks like the stock one."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from tests.distributed.small_model import Case, new_batch, optimizer_state, placement_of, shard, train, whole_tensors

CASE = Case(optimizer="adagrad")
TIERS = ["replicated", "table_wise"]
LEARNING_RATES = [0.3, 0.0, 0.05, 0.05, 0.01]


def _by_groups(model: DistributedModelParallel, rank: int) -> Any:
    """Another learning rate at every step, set on the groups as torch's schedulers do."""
    weights = []
    for step, learning_rate in enumerate(LEARNING_RATES):
        for group in model.fused_optimizer.param_groups:
            group["lr"] = learning_rate
        train(model, [new_batch(CASE, step, rank)])
        weights.append({key: value for key, value in whole_tensors(model.state_dict()).items() if "embedding_bags" in key})
    return weights


def _see(rank: int) -> dict[str, dict[str, Any]]:
    stock = shard(CASE, None)
    of_stock = len(stock.fused_optimizer.param_groups), _by_groups(stock, rank), optimizer_state(stock)
    return {tier: _compare(rank, shard(CASE, placement_of(CASE), hot_tier=tier), of_stock) for tier in TIERS}


def _compare(rank: int, ours: DistributedModelParallel, of_stock: tuple[int, Any, Any]) -> dict[str, Any]:
    groups, weights, state = of_stock
    seen: dict[str, Any] = {"groups": [groups, len(ours.fused_optimizer.param_groups)]}
    seen["weights"] = [weights, _by_groups(ours, rank)]
    seen["state"] = [state, optimizer_state(ours)]
    seen["hot rows"] = [table.weights.clone() for table in ours.module.ebc._hot.tables()]
    seen["keys"] = sorted(ours.fused_optimizer.params)

    # Stepping before or after backward makes no difference to the rate, and closures of torch are not asked for.
    for group in ours.fused_optimizer.param_groups:
        group["lr"] = 0.0
    before = whole_tensors(ours.state_dict())
    ours.fused_optimizer.step()
    loss, _ = ours(new_batch(CASE, 9, rank))
    loss.backward()
    after = whole_tensors(ours.state_dict())
    seen["moved by step"] = [key for key in before if "embedding" in key and not torch.equal(before[key], after[key])]

    tiers = [kernel.emb_module for lookup in ours.module.ebc._lookups for kernel in lookup._emb_modules]
    ours.fused_optimizer.update_hyper_parameters({"lr": 0.125})
    seen["rates of the kernels"] = [kernel.get_learning_rate() for kernel in tiers]
    return seen


@cache
def _of_ranks() -> list[dict[str, dict[str, Any]]]:
    return run_on_local_ranks(_see, 2, timeout_s=120)


@pytest.fixture(params=TIERS)
def seen(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What the ranks saw with one hot tier."""
    return [of_rank[request.param] for of_rank in _of_ranks()]


def test_learning_rates_reach_both_tiers_on_every_rank(seen: list[dict[str, Any]]) -> None:
    for here in seen:
        stock, ours = here["weights"]
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*here["state"], rtol=1e-5, atol=1e-9)
        for key in ours[0]:
            assert torch.equal(ours[0][key], ours[1][key]), f"{key}: a rate of 0"
            assert not torch.equal(ours[1][key], ours[2][key]), f"{key}: the control, another rate"


def test_every_rank_has_a_group_of_a_replicated_hot_tier() -> None:
    for of_rank in _of_ranks():
        stock, ours = of_rank["replicated"]["groups"]
        assert ours >= stock
        assert ours >= 2, "one per kernel of the hot tier, two dims"


def test_replicas_agree_after_every_change() -> None:
    first, second = (of_rank["replicated"]["hot rows"] for of_rank in _of_ranks())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_step_and_update_hyper_parameters_reach_the_kernels(seen: list[dict[str, Any]]) -> None:
    for here in seen:
        assert here["moved by step"] == []
        assert set(here["rates of the kernels"]) == {0.125}


def test_split_tables_are_shown_once(seen: list[dict[str, Any]]) -> None:
    keys = sorted(key for here in seen for key in here["keys"])
    assert keys == sorted(f"ebc.embedding_bags.{table}.weight" for table in ("tiny", "big", "wide", "frozen", "other"))
