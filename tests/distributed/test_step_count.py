"""Kernels that skip batches, or run twice in one, count and update as stock kernels do that run once in every batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn

from fae_torchrec.distributed.step_count import StepCount
from tests.distributed.reference_adam import reference_adam

LEARNING_RATE, BETA1, BETA2 = 0.1, 0.9, 0.999


def _kernel(optimizer: EmbOptimType = EmbOptimType.ADAM) -> Any:
    with reference_adam():
        kernel = SplitTableBatchedEmbeddingBagsCodegen(
            [(3, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=optimizer,
            learning_rate=LEARNING_RATE,
            eps=0.0,
            beta1=BETA1,
            beta2=BETA2,
        )
    kernel.split_embedding_weights()[0].fill_(1.0)
    return kernel


def _look_up(kernel: Any, *ids: int) -> torch.Tensor:
    with reference_adam():
        out: torch.Tensor = kernel(torch.tensor(ids, dtype=torch.int64), torch.tensor([0, len(ids)]))
    return out


def _row(kernel: Any, row: int) -> float:
    return float(kernel.split_embedding_weights()[0][row, 0])


def _counts(*kernels: Any) -> list[tuple[int, int]]:
    return [(int(kernel.iter), int(kernel.iter_cpu)) for kernel in kernels]


def _moved_by(steps: list[int]) -> float:
    """How far Adam moves a row whose gradient is 1 at each of these steps; it is not touched in the others."""
    first = second = moved = 0.0
    for step in steps:
        first, second = BETA1 * first + 1 - BETA1, BETA2 * second + 1 - BETA2
        moved += LEARNING_RATE * first / (1 - BETA1**step) / (second / (1 - BETA2**step)) ** 0.5
    return moved


def test_a_kernel_that_skips_batches_updates_with_the_step_of_all() -> None:
    """Steps 1 and 4 are mixed, 2 and 3 hot: the cold kernel runs twice."""
    hot, cold = _kernel(), _kernel()
    count = StepCount([nn.ModuleList([hot]), cold])
    for step, mixed in enumerate([True, False, False, True], start=1):
        assert count.advance() == step
        for kernel in [hot, cold] if mixed else [hot]:
            _look_up(kernel, 1, 2).sum().backward()
        assert _counts(hot, cold) == [(step, step)] * 2
    assert _row(hot, 1) == pytest.approx(1 - _moved_by([1, 2, 3, 4]), rel=1e-6)
    assert _row(cold, 1) == pytest.approx(1 - _moved_by([1, 4]), rel=1e-6)
    assert _moved_by([1, 4]) != pytest.approx(_moved_by([1, 2]), rel=0.1), "the control: its own count would be seen"


def test_a_kernel_that_runs_twice_in_a_step_counts_once() -> None:
    """A replicated hot tier with several ranks: a lookup without gradient, and the update by a second forward in backward."""
    kernel = _kernel()
    count = StepCount([kernel])
    for step in (1, 2, 3):
        assert count.advance() == step
        with torch.no_grad():
            _look_up(kernel, 0)
        count.resume(step)
        _look_up(kernel, 0).sum().backward()
        assert _counts(kernel) == [(step, step)]
    assert _row(kernel, 0) == pytest.approx(1 - _moved_by([1, 2, 3]), rel=1e-6)


def test_an_update_has_the_step_of_its_own_forward() -> None:
    """Two forwards before their backwards, as when one collection serves two towers; here and in a stock kernel."""
    ours, stock = _kernel(), _kernel()
    count = StepCount([ours])
    outs = [_look_up(stock, 0), _look_up(stock, 1)]
    steps = [count.advance(), count.advance()]
    for row, step in reversed(list(enumerate(steps))):
        outs[row].sum().backward()
        count.resume(step)
        _look_up(ours, row).sum().backward()
    torch.testing.assert_close(ours.split_embedding_weights(), stock.split_embedding_weights(), rtol=0, atol=0)
    assert count.advance() == 3
    assert _counts(ours) == [(3, 3)]


def test_forwards_without_training_count_as_in_stock() -> None:
    ours, stock = _kernel(), _kernel()
    count = StepCount([ours])
    for training in (True, False, False, True):
        for kernel in (ours, stock):
            kernel.train(training)
            if kernel is ours:
                count.advance()
            with torch.set_grad_enabled(training):
                out = _look_up(kernel, 2)
            if training:
                out.sum().backward()
        assert _counts(ours) == _counts(stock)
    assert torch.equal(ours.split_embedding_weights()[0], stock.split_embedding_weights()[0])
    assert _row(ours, 2) == pytest.approx(1 - _moved_by([1, 4]), rel=1e-6)


@pytest.mark.parametrize("loaded_into", [[0, 1], [1]], ids=["both tiers", "the stock tier"])
def test_count_goes_on_from_what_was_loaded_before_the_first_forward(loaded_into: list[int]) -> None:
    kernels, stock = [_kernel(), _kernel()], _kernel()
    count = StepCount(kernels)
    for kernel in [stock, *(kernels[i] for i in loaded_into)]:
        kernel.set_optimizer_step(1000)
    for step in (1001, 1002):
        assert count.advance() == step
        for kernel in [stock, kernels[0], *(kernels[1:] if step == 1002 else [])]:
            _look_up(kernel, 0).sum().backward()
        assert _counts(*kernels) == _counts(stock) * 2 == [(step, step)] * 2
    assert torch.equal(kernels[0].split_embedding_weights()[0], stock.split_embedding_weights()[0])
    assert _row(kernels[1], 0) == pytest.approx(1 - _moved_by([1002]), rel=1e-6)


def test_later_changes_do_not_reach_the_updates_as_in_stock() -> None:
    ours, stock = _kernel(), _kernel()
    count = StepCount([ours])
    for _ in range(2):
        count.advance()
        for kernel in (ours, stock):
            _look_up(kernel, 0).sum().backward()
            kernel.set_optimizer_step(1000)
    assert torch.equal(ours.split_embedding_weights()[0], stock.split_embedding_weights()[0])


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD])
def test_optimizers_without_a_count_are_left_alone(optimizer: EmbOptimType) -> None:
    kernel = _kernel(optimizer)
    count = StepCount([kernel])
    assert [count.advance(), count.advance()] == [0, 0]
    count.resume(0)
    assert _counts(kernel) == [(0, 0)]
    assert not kernel._forward_pre_hooks
