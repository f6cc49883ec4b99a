"""Placement alone gives the stock result over fifty raw batches, losses too; replicas stay bit-identical. The grid has the rest."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torchrec.modules.embedding_configs import PoolingType

from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from tests.distributed.small_model import Case, new_batch, optimizer_state, placement_of, shard, train, whole_tensors

CASES = [Case(optimizer="sgd", steps=50), Case(optimizer="rowwise_adagrad", pooling=PoolingType.MEAN, steps=50)]


class Trained(NamedTuple):
    """What one run left."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    hot_rows: list[torch.Tensor]


def _train_all(rank: int) -> dict[tuple[str, bool], Trained]:
    trained = {}
    for case in CASES:
        for hot_cold in (False, True):
            model = shard(case, placement_of(case) if hot_cold else None)
            losses = train(model, (new_batch(case, step, rank) for step in range(case.steps)))
            tier = getattr(model.module.ebc, "_hot", None)  # stock has none
            hot = [tensor.clone() for table in (tier.tables() if tier else ()) for tensor in table.tensors().values()]
            trained[str(case), hot_cold] = Trained(losses, whole_tensors(model.state_dict()), optimizer_state(model), hot)
    return trained


@cache
def _trained(ranks: int) -> list[dict[tuple[str, bool], Trained]]:
    return run_on_local_ranks(_train_all, ranks, timeout_s=240)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hot_cold_equals_stock(case: Case, ranks: int) -> None:
    trained = _trained(ranks)[0]
    stock, ours = trained[str(case), False], trained[str(case), True]
    assert ours.weights.keys() == stock.weights.keys()
    assert ours.optimizer.keys() == stock.optimizer.keys()
    torch.testing.assert_close(ours.weights, stock.weights, rtol=1e-5, atol=1e-6)  # weights start at 0.25 on average
    torch.testing.assert_close(ours.optimizer, stock.optimizer, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ours.losses, stock.losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_changed_every_kind_of_table(ranks: int) -> None:
    """The control of the test above: equal weights would mean nothing if nothing had been trained."""
    for case in CASES:
        ours = _trained(ranks)[0][str(case), True]
        other = _trained(ranks)[0][str(next(c for c in CASES if c.optimizer != case.optimizer)), True]
        for key in ours.weights:
            assert not torch.allclose(ours.weights[key], other.weights[key], rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicas_are_bit_identical(case: Case) -> None:
    first, second = (rank[str(case), True].hot_rows for rank in _trained(2))
    assert first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
