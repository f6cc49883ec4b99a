"""Dealing samples to ranks against a second method that deals them one by one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.data.dealing import cut_runs, rank_runs, touched
from tests.data.small_shards import FEATURES, make_batch, make_samples


def dealt(num_samples: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """The sample numbers of each batch of a rank, as BatchSource words it."""
    share, position = num_samples // world_size, 0
    batches = []
    for done in range(0, share, batch_size):
        size = min(batch_size, share - done)
        step = [[position + r * size + i for i in range(size)] for r in range(world_size)]
        position += size * world_size
        batches.append(step[rank])
    return batches


def as_lists(starts: np.ndarray, stops: np.ndarray) -> list[list[int]]:
    return [list(range(start, stop)) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]


def test_eleven_samples_by_hand() -> None:
    assert as_lists(*rank_runs(11, 2, 0, 2)) == [[0, 1], [4, 5], [8]]
    assert as_lists(*rank_runs(11, 2, 1, 2)) == [[2, 3], [6, 7], [9]]


@settings(deadline=None)
@given(n=st.integers(0, 80), batch_size=st.integers(1, 20), world=st.integers(1, 5))
def test_runs_are_dealt_as_batch_source_says(n: int, batch_size: int, world: int) -> None:
    for rank in range(world):
        assert as_lists(*rank_runs(n, batch_size, rank, world)) == dealt(n, batch_size, rank, world)


@pytest.mark.parametrize(
    ("batch_size", "rank", "world", "says"),
    [(0, 0, 1, "batch_size"), (1, 2, 2, "rank=2"), (1, -1, 1, "rank=-1"), (1, 0, 0, "world_size=0")],
)
def test_what_cannot_be_dealt(batch_size: int, rank: int, world: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rank_runs(10, batch_size, rank, world)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), max_size=12),
    batch_size=st.integers(1, 6),
    world=st.integers(1, 3),
)
def test_touched_pieces_are_those_with_a_sample(sizes: list[int], batch_size: int, world: int) -> None:
    ends = np.cumsum(np.array(sizes, dtype=np.int64))
    begins = ends - np.array(sizes, dtype=np.int64)
    for rank in range(world):
        runs = rank_runs(sum(sizes), batch_size, rank, world)
        wanted = {sample for run in as_lists(*runs) for sample in run}
        expected = [bool(wanted & set(range(b, e))) for b, e in zip(begins.tolist(), ends.tolist(), strict=True)]
        assert touched(begins, ends, *runs).tolist() == expected


def _bags(batch: Batch) -> list[dict[str, list[int]]]:
    bags = {key: torch.split(batch.sparse_features[key].values(), batch.sparse_features[key].lengths().tolist()) for key in FEATURES}
    return [{key: bags[key][i].tolist() for key in FEATURES} for i in range(batch.labels.numel())]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), batch_size=st.integers(1, 7), world=st.integers(1, 3))
def test_cut_runs_joins_and_cuts_bags(sizes: list[int], batch_size: int, world: int) -> None:
    samples = make_samples(sum(sizes), seed=len(sizes))
    at = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    for rank in range(world):
        pieces = ((first, make_batch(samples[first:last])) for first, last in pairwise(at))
        cut = [_bags(batch) for batch in cut_runs(pieces, *rank_runs(len(samples), batch_size, rank, world))]
        assert cut == [[samples[i] for i in run] for run in dealt(len(samples), batch_size, rank, world)]
