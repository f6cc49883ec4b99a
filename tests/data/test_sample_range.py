"""Parts of a source: the samples are exactly those of the range, whatever the shards, and both parts together are the whole."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.sample_range import SampleRange, held_out
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.synthetic import SyntheticCriteo
from tests.data.small_shards import FEATURES, cut_samples, make_samples


class _Shards(ShardedSource):
    """Shards in memory, some of them empty."""

    def __init__(self, shards: list[list[Batch]]) -> None:
        self.feature_names, self.num_dense, self.name = FEATURES, 1, "in memory"
        self._shards = shards

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def read_shard(self, shard: int) -> Iterator[Batch]:
        yield from self._shards[shard]

    def size_hint(self) -> int:
        return 0


def _labels_and_ids(batches: Iterable[Batch]) -> list[tuple[float, tuple[tuple[int, ...], ...]]]:
    """Sample by sample: its label and the ids of each feature."""
    samples = []
    for batch in batches:
        kjt = batch.sparse_features
        columns = [kjt[key].to_dense() for key in list(kjt.keys())]
        samples += [(float(batch.labels[n]), tuple(tuple(column[n].tolist()) for column in columns)) for n in range(batch.labels.numel())]
    return samples


def _source(sizes: list[int], batch_size: int) -> _Shards:
    samples = make_samples(sum(sizes))
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return _Shards([list(cut_samples(samples[end - size : end], batch_size)) for size, end in zip(sizes, ends, strict=True)])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(1, 4), st.data())
def test_a_range_is_the_samples_in_it(sizes: list[int], batch_size: int, data: st.DataObject) -> None:
    source = _source(sizes, batch_size)
    start = data.draw(st.integers(0, sum(sizes) - 1))
    stop = data.draw(st.integers(start + 1, sum(sizes)))
    part = pickle.loads(pickle.dumps(SampleRange(source, start, stop)))
    every = _labels_and_ids(batch for shard in range(source.num_shards) for batch in source.read_shard(shard))
    mine = [_labels_and_ids(part.read_shard(shard)) for shard in range(part.num_shards)]
    assert [sample for shard in mine for sample in shard] == every[start:stop]
    assert [len(shard) for shard in mine] == part.shard_sizes().tolist()
    assert part.num_samples == part.size_hint() == stop - start
    assert _labels_and_ids(part.batches(3)) == every[start:stop]


def test_what_is_held_out_is_the_end() -> None:
    source = SyntheticCriteo("kaggle", scale=0.001, num_samples=5_000)
    train, test = held_out(source, 0.1)
    assert (train.num_samples, test.num_samples) == (4_500, 500)
    assert _labels_and_ids([*train.batches(4_096), *test.batches(4_096)]) == _labels_and_ids(source.batches(4_096))
    assert train.name == f"{source.name}, samples 0..4499" and test.name == f"{source.name}, samples 4500..4999"
    assert (train.feature_names, train.num_dense) == (source.feature_names, 13)
    with pytest.raises(DataError, match="coded already"):
        next(train.read_keys(0))


def test_each_side_has_a_sample() -> None:
    source = _source([2], 2)
    assert [part.num_samples for part in held_out(source, 0.001)] == [1, 1]
    assert [part.num_samples for part in held_out(source, 0.999)] == [1, 1]


def test_what_is_no_range_is_refused() -> None:
    source = _source([2, 2], 2)
    for start, stop in ((0, 5), (-1, 2), (2, 2)):
        with pytest.raises(ConfigError, match=rf"samples {start}\.\.{stop - 1} are not within 0\.\.3"):
            SampleRange(source, start, stop)
    for share in (0, 1, -0.5):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            held_out(source, share)
    with pytest.raises(ConfigError, match="of 1 samples"):
        held_out(_source([1], 1), 0.5)
