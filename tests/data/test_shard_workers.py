"""Worker processes that read shards: the same batches in the same order, and the errors that the source itself would raise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError, FAEError
from fae_torchrec.data import shard_workers
from fae_torchrec.data.shard_workers import rank_batches
from tests.data.small_shards import ShardsInMemory, cut_samples, make_samples


class Spoiled(ShardsInMemory):
    """The last shard is malformed, or empty, which kills its reader."""

    def __init__(self, how: str) -> None:
        super().__init__([make_samples(40, seed) for seed in range(3)])
        self._how = ""
        self.shard_sizes()  # counted before it was spoiled
        if how == "killed":
            self._shards[-1] = []
        self._how = how

    def read_shard(self, shard: int) -> Iterator[Batch]:
        """As the class says."""
        if self._how == "malformed" and shard == 2:
            yield from cut_samples(self._shards[2][:20], 17)
            raise DataError("file 2, line 20: no number; correct it")
        yield from super().read_shard(shard)


def same(one: Batch, other: Batch) -> bool:
    tensors = [
        (batch.dense_features, batch.labels, batch.sparse_features.values(), batch.sparse_features.lengths()) for batch in (one, other)
    ]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True)) and one.sparse_features.keys() == other.sparse_features.keys()


def test_same_batches_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ShardsInMemory([make_samples(count, seed) for seed, count in enumerate((100, 3, 61, 1, 250))])
    for batch_size, rank, world_size, workers in ((32, 0, 1, 2), (7, 1, 3, 3), (500, 0, 1, 9), (1, 414, 415, 1)):
        alone = list(source.batches(batch_size, rank=rank, world_size=world_size))
        shared = list(rank_batches(source, batch_size, rank=rank, world_size=world_size, num_workers=workers))
        assert len(shared) == len(alone) > 0 and all(map(same, shared, alone))
    assert all(map(same, rank_batches(source, 32), source.batches(32)))
    assert list(rank_batches(source, 32, world_size=1000, num_workers=2)) == [], "a share without samples"


def test_chunks_of_a_large_shard() -> None:
    """A shard that is larger than what is sent at once comes in several chunks."""
    one = make_samples(1, one_hot=True)
    source = ShardsInMemory([one * (2 * shard_workers._CHUNK_SAMPLES + 5)])
    assert [batch.labels.numel() for batch in rank_batches(source, 30_000, num_workers=1)] == [30_000, 30_000, 5_541]


def test_an_error_comes_after_what_was_read_before() -> None:
    batches = rank_batches(Spoiled("malformed"), 16, num_workers=2)
    assert [next(batches).labels.numel() for _ in range(5)] == [16] * 5
    with pytest.raises(DataError, match=r"^file 2, line 20: no number; correct it$"):
        list(batches)


def test_a_killed_worker() -> None:
    with pytest.raises(FAEError, match=r"exited unexpectedly.*take fewer workers"):
        list(rank_batches(Spoiled("killed"), 16, num_workers=2))


def test_a_pass_may_be_left() -> None:
    batches = rank_batches(ShardsInMemory([make_samples(100)]), 8, num_workers=1)
    next(batches)
    batches.close()  # type: ignore[attr-defined]  # it is a generator
    assert next(batches, None) is None


def test_refused() -> None:
    class Unsharded:
        feature_names: tuple[str, ...] = ("x",)
        num_dense, num_samples = 1, 5

        def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
            return iter([])

    with pytest.raises(ConfigError, match=r"num_workers: received 2 for a Unsharded; .* give 0"):
        rank_batches(Unsharded(), 8, num_workers=2)
    with pytest.raises(ConfigError, match="num_workers must be at least 0, received -1"):
        rank_batches(Unsharded(), 8, num_workers=-1)
    with pytest.raises(ConfigError, match="rank=3"):
        rank_batches(ShardsInMemory([make_samples(9)]), 8, rank=3, world_size=2, num_workers=2)
    assert list(rank_batches(Unsharded(), 8)) == []
