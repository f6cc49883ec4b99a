"""The fused optimizer of both tiers: learning rates reach every kernel, and it looks like the stock one."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from tests.distributed.small_model import Case, new_batch, optimizer_state, placement_of, shard, train, whole_tensors

CASE = Case(optimizer="adagrad")
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


def _see(rank: int) -> dict[str, Any]:
    stock, ours = shard(CASE, None), shard(CASE, placement_of(CASE))
    seen: dict[str, Any] = {"groups": [len(model.fused_optimizer.param_groups) for model in (stock, ours)]}
    seen["weights"] = [_by_groups(model, rank) for model in (stock, ours)]
    seen["state"] = [optimizer_state(model) for model in (stock, ours)]
    hot = ours.module.ebc._hot_lookups
    seen["hot rows"] = [weight.clone() for lookup in hot for kernel in lookup._emb_modules for weight in kernel.split_embedding_weights()]
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
def _seen() -> list[dict[str, Any]]:
    return run_on_local_ranks(_see, 2, timeout_s=120)


def test_learning_rates_reach_both_tiers_on_every_rank() -> None:
    for seen in _seen():
        stock, ours = seen["weights"]
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*seen["state"], rtol=1e-5, atol=1e-9)
        for key in ours[0]:
            assert torch.equal(ours[0][key], ours[1][key]), f"{key}: a rate of 0"
            assert not torch.equal(ours[1][key], ours[2][key]), f"{key}: the control, another rate"


def test_every_rank_has_a_group_of_the_hot_tier() -> None:
    for seen in _seen():
        stock, ours = seen["groups"]
        assert ours >= stock
        assert ours >= 2, "one per kernel of the hot tier, two dims"


def test_replicas_agree_after_every_change() -> None:
    first, second = (seen["hot rows"] for seen in _seen())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_step_and_update_hyper_parameters_reach_the_kernels() -> None:
    for seen in _seen():
        assert seen["moved by step"] == []
        assert set(seen["rates of the kernels"]) == {0.125}


def test_split_tables_are_shown_once() -> None:
    keys = {key for seen in _seen() for key in seen["keys"]}
    assert keys == {f"ebc.embedding_bags.{table}.weight" for table in ("tiny", "big", "wide", "frozen", "other")}
