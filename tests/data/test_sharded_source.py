"""ShardedSource: what its own methods make of the shards of a subclass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.sharded_source import ShardedSource
from tests.data.test_dealing import dealt


class Numbers(ShardedSource):
    """Sample i has the dense value, the id and the label i; shards have the given sizes and are read in pieces of 3."""

    def __init__(self, sizes: list[int]) -> None:
        self.feature_names, self.num_dense, self.name = ("f",), 1, "numbers"
        self.sizes = sizes
        self.read: list[int] = []

    @property
    def num_shards(self) -> int:
        return len(self.sizes)

    def size_hint(self) -> int:
        return 1

    def read_shard(self, shard: int) -> Iterator[Batch]:
        self.read.append(shard)
        first = sum(self.sizes[:shard])
        for numbers in torch.arange(first, first + self.sizes[shard]).split(3) if self.sizes[shard] else ():
            kjt = KeyedJaggedTensor(["f"], values=numbers, lengths=torch.ones(len(numbers), dtype=torch.int32))
            yield Batch(dense_features=numbers.float()[:, None], sparse_features=kjt, labels=numbers.float())


def numbers_of(batch: Batch) -> list[int]:
    numbers: list[int] = batch.sparse_features.values().tolist()
    assert batch.labels.tolist() == batch.dense_features.view(-1).tolist() == numbers
    return numbers


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 10), max_size=7), batch_size=st.integers(1, 12), world=st.integers(1, 4))
def test_samples_are_dealt_whatever_the_shards(sizes: list[int], batch_size: int, world: int) -> None:
    source = Numbers(sizes)
    assert source.num_samples == sum(sizes)
    for rank in range(world):
        batches = source.batches(batch_size, rank=rank, world_size=world)
        assert [numbers_of(batch) for batch in batches] == dealt(sum(sizes), batch_size, rank, world)


def test_sizes_are_counted_once_and_other_ranks_shards_are_not_read() -> None:
    source = Numbers([4, 0, 4, 4])
    assert source.shard_sizes().tolist() == [4, 0, 4, 4]
    assert source.shard_sizes().dtype == np.int64
    assert source.read == [0, 1, 2, 3]
    assert [numbers_of(batch) for batch in source.batches(4, rank=1, world_size=3)] == [[4, 5, 6, 7]]
    assert source.read == [0, 1, 2, 3, 2]
    assert source.skipped() == {}


def test_a_rank_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="world_size"):
        Numbers([4]).batches(4, rank=1)


def test_a_shard_that_changed_is_noticed() -> None:
    source = Numbers([4, 4])
    assert source.num_samples == 8
    source.sizes = [4, 3]
    with pytest.raises(DataError, match="shard 1 has 3 samples, where 4 were counted"):
        list(source.batches(3))
