"""On a GPU: placement alone gives the result of stock in the GPU's memory, for every cold tier, hot tier, optimizer and pooling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import DataType, PoolingType

from fae_torchrec.distributed.split_ahead import SplitAhead
from tests.distributed import sequence_model
from tests.distributed.sequence_model import Setup
from tests.distributed.small_model import Case, new_batch, optimizer_state, placement_of, shard, train, whole_tensors
from tests.distributed.test_hot_batches import promised
from tests.gpu import CUDA, cuda_rank, on_device, requires_gpu

pytestmark = [requires_gpu, pytest.mark.usefixtures("one_rank")]

CACHE_BYTES = 1024  # some ten rows: evictions at every step, and conflicts that leave rows uncached
COLD_TIERS: dict[str, dict[str, Any]] = {
    "uvm": {"cold_tier": "uvm", "cold_cache_bytes": 0},
    "uvm_caching": {"cold_tier": "uvm_caching"},
    "small cache": {"cold_tier": "uvm_caching", "cold_cache_bytes": CACHE_BYTES},
    "host": {"cold_tier": "host"},
    "staged": {"cold_tier": "uvm", "cold_cache_bytes": 1 << 20},
    "hot table_wise": {"cold_tier": "uvm", "hot_tier": "table_wise"},
    "hot row_wise": {"cold_tier": "uvm_caching", "hot_tier": "row_wise"},
    "bitmap": {"cold_tier": "uvm", "compact_index_above_rows": 0},
}
CASES = [
    Case("sgd"),
    Case("adagrad", multi_hot=False, mixed_dims=False),
    Case("rowwise_adagrad", PoolingType.MEAN),
    Case("rowwise_adagrad", weighted=True, mixed_dims=False),
    Case("rowwise_adagrad", multi_hot=False),
    Case("adam"),
]
HALF = [Case("sgd", dtype=DataType.FP16, multi_hot=False), Case("rowwise_adagrad", dtype=DataType.FP16, mixed_dims=False)]


class Trained(NamedTuple):
    """What one run left."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    with cuda_rank():
        yield
    _stock.cache_clear()


def _batches(case: Case, *, promise: bool) -> list[Batch]:
    """Every third batch is hot, the first included."""
    hot = placement_of(case)
    plain = [new_batch(case, step, 0, hot_only=None if step % 3 else hot) for step in range(case.steps)]
    return [batch if step % 3 or not promise else promised(batch) for step, batch in enumerate(plain)]


@cache
def _stock(case: Case) -> Trained:
    return _train(case, None)


def _train(case: Case, tier: Mapping[str, Any] | None) -> Trained:
    # Stochastic rounding (fp16) draws random numbers, by kernel: no two placements would draw alike.
    model = shard(
        case, None if tier is None else placement_of(case), device=CUDA, fused_params={"stochastic_rounding": False}, **tier or {}
    )
    split: Any = SplitAhead(model) if tier is COLD_TIERS["staged"] else lambda batch, step: batch
    batches = [split(batch, step) for step, batch in enumerate(_batches(case, promise=tier is not None))]
    losses = train(model, on_device(batches))
    return Trained(losses, whole_tensors(model.state_dict()), optimizer_state(model))


def _compare(ours: Trained, stock: Trained, rtol: float) -> None:
    for mine, theirs in ((ours.weights, stock.weights), (ours.optimizer, stock.optimizer)):
        assert mine.keys() == theirs.keys()
        for key, expected in theirs.items():
            atol = rtol / 10 * float(expected.abs().max())
            torch.testing.assert_close(mine[key], expected, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(ours.losses, stock.losses, rtol=rtol, atol=0)


@pytest.mark.parametrize("tier", COLD_TIERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hot_cold_equals_stock(case: Case, tier: str) -> None:
    if tier == "host" and case.optimizer == "adam":
        with pytest.raises(PlannerError, match="no fused kernel on the CPU"):
            _train(case, COLD_TIERS[tier])
        return
    _compare(_train(case, COLD_TIERS[tier]), _stock(case), 1e-5)


@pytest.mark.parametrize("tier", ["uvm", "small cache", "staged"])
@pytest.mark.parametrize("case", HALF, ids=str)
def test_half_precision_rows(case: Case, tier: str) -> None:
    ours, stock = _train(case, COLD_TIERS[tier]), _stock(case)
    _compare(ours, stock, 5e-3)  # a last bit of fp16 that fell the other way is 1e-3


def test_another_learning_rate_would_be_seen() -> None:
    """The control of the tests above."""
    case = CASES[0]
    model = shard(case, placement_of(case), device=CUDA, cold_tier="uvm")
    for group in model.fused_optimizer.param_groups:
        group["lr"] *= 1.001
    losses = train(model, on_device(_batches(case, promise=True)))
    with pytest.raises(AssertionError, match="not close"):
        _compare(Trained(losses, whole_tensors(model.state_dict()), optimizer_state(model)), _stock(case), 1e-5)


@pytest.mark.parametrize("tier", ["uvm", "small cache", "host"])
def test_sequences_equal_stock(tier: str) -> None:
    setup = Setup("rowwise_adagrad")
    runs = []
    for placement, options in ((None, {}), (sequence_model.placement_of(setup), COLD_TIERS[tier])):
        model = sequence_model.shard(setup, placement, CUDA, **options)
        batches = [sequence_model.new_batch(setup, step, 0, hot=placement is not None and step % 3 == 0) for step in range(8)]
        if placement is None:  # the same ids
            batches = [sequence_model.new_batch(setup, step, 0, hot=step % 3 == 0) for step in range(8)]
            for batch in batches:
                batch.sparse_features = batch.sparse_features.permute(list(range(len(batch.sparse_features.keys()))))
        losses = train(model, on_device(batches))
        runs.append(Trained(losses, whole_tensors(model.state_dict()), optimizer_state(model)))
    _compare(runs[1], runs[0], 1e-5)


def test_bf16_autocast_of_the_dense_part() -> None:
    """Mixed precision as users have it: autocast around the model, fp32 rows."""
    case = Case("rowwise_adagrad")
    runs = []
    for tier in (None, COLD_TIERS["uvm"]):
        model = shard(case, None if tier is None else placement_of(case), device=CUDA, **tier or {})
        with torch.autocast("cuda", torch.bfloat16):
            losses = train(model, on_device(_batches(case, promise=tier is not None)))
        runs.append(Trained(losses, whole_tensors(model.state_dict()), optimizer_state(model)))
    _compare(runs[1], runs[0], 2e-2)
