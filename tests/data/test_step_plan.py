"""StepPlan by hand: full batches first, nobody overtaken by more than the buffers hold, everything gone at the end."""

from __future__ import annotations

import numpy as np
import pytest

from fae_torchrec.data.step_plan import StepPlan, plan_epoch, plan_window


def _plan(available: list[int], must_go: list[int], finished: list[bool], *, drop_last: bool = False) -> list[list[int]]:
    plan, given = plan_window(np.array(available), np.array(must_go), np.array(finished), 4, drop_last=drop_last)
    assert given.tolist() == plan.sizes.sum(axis=0).tolist()
    sizes: list[list[int]] = plan.sizes.tolist()
    return sizes


@pytest.mark.parametrize(
    ("available", "must_go", "finished", "expected"),
    [
        ([9, 5], [0, 0], [False, False], [[4, 4]]),
        ([9, 5], [2, 0], [False, False], [[4, 4], [4, 1]]),
        ([9, 5], [0, 0], [True, True], [[4, 4], [4, 1], [1, 0]]),
        ([9, 5], [0, 0], [False, True], [[4, 4], [4, 1]]),  # a stream that is finished holds nobody up
        ([9, 0], [0, 0], [False, False], []),
        ([0, 0], [0, 0], [True, True], []),
        ([12, 8, 11], [0, 0, 0], [False] * 3, [[4, 4, 4], [4, 4, 4]]),
    ],
)
def test_windows_by_hand(available: list[int], must_go: list[int], finished: list[bool], expected: list[list[int]]) -> None:
    assert _plan(available, must_go, finished) == expected


def test_drop_last_leaves_out_less_than_a_batch_of_each_stream() -> None:
    assert _plan([9, 5], [0, 0], [True, True], drop_last=True) == [[4, 4], [4, 0]]
    assert _plan([9, 0], [0, 0], [True, True], drop_last=True) == [[4, 0], [4, 0]]


def test_epochs_by_hand() -> None:
    assert plan_epoch(19, 2, 4, drop_last=False).sizes.tolist() == [[4, 4], [4, 4], [2, 1]]
    assert plan_epoch(17, 2, 4, drop_last=False).sizes.tolist() == [[4, 4], [4, 4], [1, 0]]
    assert plan_epoch(19, 2, 4, drop_last=True).sizes.tolist() == [[4, 4], [4, 4]]
    assert plan_epoch(0, 3, 4, drop_last=False).sizes.shape == (0, 3)


def test_weights_and_samples_by_hand() -> None:
    plan = StepPlan(np.array([[4, 4, 4], [3, 0, 1]]))
    assert plan.steps == 2
    # Three streams on two ranks: rank 0 has streams 0 and 2.
    assert [plan.weight(0, streams, 2) for streams in ([0, 2], [1])] == [8 * 2 / 12, 4 * 2 / 12]
    assert [plan.weight(1, streams, 2) for streams in ([0, 2], [1])] == [2.0, 0.0]
    assert plan.weight(0, [], 4) == 0.0
    # Where every sample weighs the same, the second step of 4 is a third of a full one of 12.
    plan = StepPlan(np.array([[4, 4, 4], [3, 0, 1]]), full_step=12)
    assert [plan.weight(step, [0, 2], 2) for step in (0, 1)] == [8 * 2 / 12, 4 * 2 / 12]
    assert plan_epoch(19, 2, 4, drop_last=False).full_step == 8
