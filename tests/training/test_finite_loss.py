"""A loss that is no number ends the run on every rank alike, with the step, its kind and the rank; a filler's does not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from fae_torchrec.core.errors import DivergedError, FAEError
from fae_torchrec.training.finite_loss import FiniteLossGuard
from tests.training.thread_ranks import run_on_threads

KINDS = ["cold", "cold", "hot", "hot", "mixed", "cold"]


def watch(losses: dict[int, list[float]], *, every: int = 100, fillers: tuple[tuple[int, int], ...] = ()) -> list[tuple[int, str]]:
    """Steps 11.. of each rank; (steps added, message) of each rank, the message empty where nothing was raised."""

    def run(group: dist.ProcessGroup) -> tuple[int, str]:
        guard, added = FiniteLossGuard(group, torch.device("cpu"), every=every), 0
        try:
            for n, loss in enumerate(losses[group.rank()]):
                guard.add(11 + n, KINDS[n], 0 if (group.rank(), n) in fillers else 4, torch.tensor(float(loss), requires_grad=True))
                added += 1
            guard.check()
        except DivergedError as error:
            return added, str(error)
        return added, ""

    return run_on_threads(run, len(losses))  # type: ignore[return-value]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_is_named_on_every_rank(bad: float) -> None:
    first, second = watch({0: [1, 1, 1, 1, bad, bad], 1: [1, 1, 1, bad, 1, bad]})
    assert first == second
    assert "first at step 14, a hot batch, on rank 1;" in first[1]
    assert "lower the learning rate" in first[1] and "checkpoints made before are kept" in first[1]


def test_of_two_ranks_in_one_step_the_lower_is_named() -> None:
    first, second = watch({0: [1, math.nan], 1: [1, math.nan]})
    assert first == second
    assert "step 12, a cold batch, on rank 0;" in first[1]


def test_finite_losses_and_those_of_fillers_pass() -> None:
    assert watch({0: [1e30, 1, 0], 1: [1, math.nan, 1]}, fillers=((1, 1),)) == [(3, ""), (3, "")]
    assert watch({0: [], 1: []}) == [(0, ""), (0, "")]


def test_it_looks_every_so_many_steps() -> None:
    (one, message), other = watch({0: [1, math.nan, 1, 1, 1], 1: [1] * 5}, every=3)
    assert one == 2, "the third step's add raised"
    assert "step 12" in message and other == (one, message)
    ((one, message),) = watch({0: [1, 1, 1, math.nan, 1]}, every=3)
    assert one == 5 and "step 14, a hot batch" in message, "the steps of the first look are forgotten"
    assert watch({0: [math.nan] * 5}, every=0) == [(5, "")]


def test_without_a_group() -> None:
    guard = FiniteLossGuard(None)
    guard.add(1, "hot", 2, torch.tensor(math.nan))
    with pytest.raises(FAEError, match="step 1, a hot batch, on rank 0"):
        guard.check()
    guard.check()  # it was said once
