"""Placement alone changes nothing: optimizers x poolings x bags x ranks x hot tiers, trained on mixed and hot batches, equal stock.

The Adam of these cases is the plain torch reference in FBGEMM's place, for stock and for us: the CPU has no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import PoolingType

from fae_torchrec.distributed import step_count
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from tests.distributed.reference_adam import reference_adam
from tests.distributed.small_model import (
    LEARNING_RATE,
    OPTIMIZERS,
    Case,
    new_batch,
    optimizer_state,
    placement_of,
    shard,
    train,
    whole_tensors,
)
from tests.distributed.test_hot_batches import promised

HOT_TIERS = ["replicated", "table_wise"]
POOLINGS = [(PoolingType.SUM, False), (PoolingType.SUM, True), (PoolingType.MEAN, False)]  # and whether ids are weighted
GRID = [
    Case(optimizer=optimizer, pooling=pooling, weighted=weighted, multi_hot=multi_hot, mixed_dims=multi_hot)
    for optimizer, (pooling, weighted), multi_hot in product(OPTIMIZERS, POOLINGS, [False, True])
]
CONTROLS = [Case(optimizer=optimizer) for optimizer in OPTIMIZERS]
HOT_EVERY = 3  # every third batch is hot, the first included


class Trained(NamedTuple):
    """What one run left.

    Attributes:
        losses: by step.
        weights: by stock key, whole.
        optimizer: by "<parameter>/<state>", whole.
    """

    losses: list[float]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


Runs = dict[tuple[Case, str | None], Trained]  # by case and hot tier, None for stock, or the name of a control


@cache
def _batches(case: Case, rank: int) -> list[Batch]:
    hot = placement_of(case)
    return [new_batch(case, step, rank, size=8, hot_only=None if step % HOT_EVERY else hot) for step in range(case.steps)]


def _train(case: Case, rank: int, hot_tier: str | None, learning_rate: float = LEARNING_RATE) -> Trained:
    """One run; without a hot tier it is stock's, which gets the same ids without the promise."""
    model = shard(case, placement_of(case) if hot_tier else None, hot_tier=hot_tier or "replicated")
    batches = _batches(replace(case, optimizer="sgd", pooling=PoolingType.SUM), rank)  # ids depend on neither
    if hot_tier:
        batches = [batch if step % HOT_EVERY else promised(batch) for step, batch in enumerate(batches)]
    for group in model.fused_optimizer.param_groups:
        group["lr"] = learning_rate
    losses = train(model, batches)
    return Trained(losses, whole_tensors(model.state_dict()), optimizer_state(model))


def _train_all(rank: int) -> Runs:
    trained = {}
    with reference_adam():
        for case, hot_tier in product(GRID, [None, *HOT_TIERS]):
            trained[case, hot_tier] = _train(case, rank, hot_tier)
        for case in CONTROLS:
            trained[case, "perturbed"] = _train(case, rank, HOT_TIERS[0], LEARNING_RATE * 1.001)
        with mock.patch.object(step_count, "_counts_steps", return_value=False):
            trained[Case(optimizer="adam"), "own counts"] = _train(Case(optimizer="adam"), rank, HOT_TIERS[0])
    return trained


@pytest.fixture(scope="module", params=[1, 2], ids="ranks={}".format)
def trained(request: pytest.FixtureRequest) -> Runs:
    """All runs of one number of ranks, in one start of the ranks; if that fails, it fails once for all cases."""
    return run_on_local_ranks(_train_all, request.param, timeout_s=280)[0]


def _compare(ours: Trained, stock: Trained) -> None:
    _compare_tensors(ours.weights, stock.weights)
    _compare_tensors(ours.optimizer, stock.optimizer)
    torch.testing.assert_close(ours.losses, stock.losses, rtol=1e-5, atol=0)


def _compare_tensors(ours: Mapping[str, torch.Tensor], stock: Mapping[str, torch.Tensor]) -> None:
    """Within 1e-5 relative; a value that cancelled to almost nothing, within a millionth of its tensor's largest."""
    assert ours.keys() == stock.keys()
    for key, expected in stock.items():
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(ours[key], expected, rtol=1e-5, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("hot_tier", HOT_TIERS)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_hot_cold_equals_stock(case: Case, hot_tier: str, trained: Runs) -> None:
    _compare(trained[case, hot_tier], trained[case, None])


@pytest.mark.parametrize("case", CONTROLS, ids=str)
def test_another_learning_rate_would_be_seen(case: Case, trained: Runs) -> None:
    """A control: a thousandth more is enough, in all hot, split and all cold tables."""
    ours, stock = trained[case, "perturbed"].weights, trained[case, None].weights
    tables = [key for key in stock if "embedding_bags" in key]
    assert len(tables) == 5
    for key in tables:
        with pytest.raises(AssertionError, match="not close"):
            _compare_tensors({key: ours[key]}, {key: stock[key]})


def test_kernels_that_count_for_themselves_would_be_seen(trained: Runs) -> None:
    """A control: Adam, whose cold kernels then miss the hot batches."""
    case = Case(optimizer="adam")
    with pytest.raises(AssertionError, match="not close"):
        _compare(trained[case, "own counts"], trained[case, None])
