"""ScriptRebundling: as many steps as the script's, of the same sizes, the same kinds on every rank, every sample once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import Policy, ShuffleSchedule
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.batches import HotColdBatch, is_hot_batch
from fae_torchrec.launch_rebundling import RebundlingOptions, ScriptRebundling

ROWS, HOT = 100, 10
TABLES = TableSet((TableSpec("t_a", ROWS, 4, ("a",)), TableSpec("t_b", ROWS, 4, ("b",))))
PLACEMENT = RowPlacement(TABLES, {"t_a": np.arange(HOT), "t_b": np.arange(HOT)}, "test", 1000, 0.5, 0.5)


@dataclass
class OwnBatch(Batch):
    """A type of the script's own."""


class Ranks:
    """An all-gather among threads."""

    def __init__(self, world_size: int) -> None:
        self._barrier, self._said = Barrier(world_size, timeout=20), {}

    def of(self, rank: int):  # type: ignore[no-untyped-def]
        def agree(counts: np.ndarray) -> np.ndarray:
            self._said[rank] = counts
            self._barrier.wait()
            everyone = np.stack([self._said[other] for other in sorted(self._said)])
            self._barrier.wait()
            return everyone

        return agree


def batch(numbers: np.ndarray, hot: np.ndarray, kind: type[Batch] = Batch) -> Batch:
    """Samples with their numbers as dense features; hot ones have hot ids in both features, others a cold one in the first."""
    ids = np.stack([np.where(hot, numbers % HOT, HOT + numbers % (ROWS - HOT)), numbers % HOT])
    kjt = KeyedJaggedTensor(["a", "b"], torch.from_numpy(ids.reshape(-1)), lengths=torch.ones(ids.size, dtype=torch.int32))
    return kind(torch.from_numpy(numbers.astype(np.float32))[:, None], kjt, torch.zeros(len(numbers)))


def rank_batches(rank: int, sizes: list[int], share: float, seed: int) -> list[Batch]:
    rng = np.random.default_rng([seed, rank])
    ends = np.cumsum([0, *sizes])
    return [batch(np.arange(begin, end), rng.random(end - begin) < share) for begin, end in pairwise(ends)]


def bundle(
    per_rank: list[list[Batch]], window: int = 4, policy: Policy = "proportional", notes: list[str] | None = None
) -> list[list[HotColdBatch]]:
    ranks = Ranks(len(per_rank))
    model = nn.Linear(1, 1)

    def one(rank: int) -> list[HotColdBatch]:
        rebundling = ScriptRebundling(
            PLACEMENT,
            ShuffleSchedule(policy),
            model,
            ranks.of(rank),
            rank,
            len(per_rank),
            RebundlingOptions(window, 1 << 30),
            ([] if notes is None else notes).append,
        )
        source = iter(per_rank[rank])
        assert rebundling(source) is rebundling(source), "one pass for one iterator"
        return list(rebundling(source))

    with ThreadPoolExecutor(len(per_rank)) as threads:
        return list(threads.map(one, range(len(per_rank))))


def numbers_of(given: Batch) -> list[int]:
    return [int(number) for number in given.dense_features[:, 0]]


def hot_by_hand(given: Batch) -> list[bool]:
    ids = given.sparse_features.values().view(2, -1)
    return [bool(a < HOT and b < HOT) for a, b in ids.T.tolist()]


def most_hot_steps(window: list[Batch]) -> int:
    """How many of a window's first batches its hot samples fill, counted one by one."""
    left, steps = sum(sum(hot_by_hand(given)) for given in window), 0
    for given in window:
        left -= len(given.labels)
        if left < 0:
            break
        steps += 1
    return steps


@pytest.mark.parametrize("policy", ["proportional", "fixed"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("sizes", [[8] * 10 + [3], [8] * 8, [5, 7, 2, 9, 1, 4]])
def test_steps_sizes_kinds_and_samples(sizes: list[int], world_size: int, share: float, policy: Policy) -> None:
    per_rank = [rank_batches(rank, sizes, share, seed=5) for rank in range(world_size)]
    made = bundle(per_rank, policy=policy)
    assert {len(steps) for steps in made} == {len(sizes)}, "as many steps as the script's"
    for begin in range(0, len(sizes), 4):
        window = slice(begin, begin + 4)
        hot_steps = min(most_hot_steps(batches[window]) for batches in per_rank)
        for given, steps in zip(per_rank, made, strict=True):
            assert sorted(len(s.labels) for s in steps[window]) == sorted(sizes[window])
            trained = sorted(number for s in steps[window] for number in numbers_of(s))
            assert trained == sorted(number for g in given[window] for number in numbers_of(g)), "each sample of the window, once"
            assert sum(s.kind == "hot" for s in steps[window]) == hot_steps
    for at_a_step in zip(*made, strict=True):
        assert len({(s.kind, len(s.labels)) for s in at_a_step}) == 1, "the ranks take the same kind of step, of the size that they had"
    for steps in made:
        for s in steps:
            assert is_hot_batch(s) == (s.kind == "hot")
            assert s.weight == 1.0
            assert s.num_samples == len(s.labels)
            if s.kind == "hot":
                assert all(hot_by_hand(s))


def test_the_grid_has_hot_and_cold_steps_in_a_row() -> None:
    """The grid above would be empty talk if no case had both."""
    (steps,) = bundle([rank_batches(0, [8] * 8, 0.4, seed=5)])
    assert {s.kind for s in steps} == {"hot", "cold"}
    assert any(any(hot_by_hand(s)) for s in steps if s.kind == "cold"), "hot samples that are left go with the cold ones"


def test_samples_have_numbers_of_their_own() -> None:
    made = bundle([rank_batches(rank, [4, 4], 0.5, seed=1) for rank in range(2)])
    numbers = [number for steps in made for s in steps for number in s.sample_numbers.tolist()]
    assert sorted(numbers) == list(range(16))
    for rank, steps in enumerate(made):
        for s in steps:
            assert s.sample_numbers.tolist() == [number * 2 + rank for number in numbers_of(s)]


def test_ranks_with_other_numbers_of_batches_stop_together() -> None:
    notes: list[str] = []
    made = bundle([rank_batches(0, [4] * 9, 0.5, seed=1), rank_batches(1, [4] * 6, 0.5, seed=1)], notes=notes)
    assert [len(steps) for steps in made] == [6, 6]
    assert sorted(number for s in made[0] for number in numbers_of(s)) == list(range(24))
    assert len(notes) == 2
    assert "[3, 0] by rank are left" in notes[0]


def test_one_batch_is_read_at_each_step() -> None:
    taken = 0

    def source() -> Iterator[Batch]:
        nonlocal taken
        for given in rank_batches(0, [4] * 12, 0.5, seed=1):
            taken += 1
            yield given

    rebundling = ScriptRebundling(
        PLACEMENT, ShuffleSchedule("proportional"), nn.Linear(1, 1), lambda c: c[None], 0, 1, RebundlingOptions(4, 1 << 30), print
    )
    made = rebundling(source())
    seen = []
    for _ in made:
        seen.append(taken)
    assert seen == [5, 6, 7, 8, 9, 10, 11, 12, 12, 12, 12, 12]


def test_the_buffer_bounds_the_window() -> None:
    given = rank_batches(0, [4] * 6, 0.5, seed=1)
    tensors = [
        given[0].dense_features,
        given[0].labels,
        given[0].sparse_features.values(),
        given[0].sparse_features.lengths(),
    ]
    two_batches = 2 * sum(t.numel() * t.element_size() for t in tensors)
    options = RebundlingOptions(64, 2 * two_batches)  # half of it is for the window that is read
    rebundling = ScriptRebundling(PLACEMENT, ShuffleSchedule("proportional"), nn.Linear(1, 1), lambda c: c[None], 0, 1, options, print)
    steps = list(rebundling(iter(given)))
    for begin in (0, 2, 4):
        assert sorted(n for s in steps[begin : begin + 2] for n in numbers_of(s)) == list(range(4 * begin, 4 * begin + 8))


def test_evaluation_and_the_policy_stock_pass_iterators_through() -> None:
    model = nn.Linear(1, 1)
    for mode, policy in ((False, "proportional"), (True, "stock")):
        model.train(mode)
        options = RebundlingOptions(4, 1 << 30)
        rebundling = ScriptRebundling(PLACEMENT, ShuffleSchedule(policy), model, lambda c: c[None], 0, 1, options, print)  # type: ignore[arg-type]
        source = iter(rank_batches(0, [4], 0.5, seed=1))
        assert rebundling(source) is source


def test_other_batches_pass_as_they_are() -> None:
    notes: list[str] = []
    given = [batch(np.arange(4), np.ones(4, dtype=bool), OwnBatch) for _ in range(3)]
    (passed,) = bundle([given], notes=notes)
    assert all(a is b for a, b in zip(passed, given, strict=True))
    assert "batches of type OwnBatch are not sorted" in notes[0]
    # Where one rank has such batches, none sorts: the kinds of the steps would differ.
    plain = rank_batches(1, [4] * 3, 1.0, seed=1)
    passed, others = bundle([given, plain])
    assert all(a is b for a, b in zip(others, plain, strict=True))


def test_an_empty_pass_is_empty() -> None:
    assert bundle([[], []]) == [[], []]
