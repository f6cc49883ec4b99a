"""Sources one after the other: the samples are all of theirs, in order."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.data.joined_source import JoinedSource
from fae_torchrec.data.synthetic import SyntheticCriteo
from tests.data.small_shards import ShardsInMemory, make_samples


def _source(samples: int, seed: int) -> SyntheticCriteo:
    return SyntheticCriteo("kaggle", scale=0.001, num_samples=samples, seed=seed)


def test_the_samples_are_those_of_all_sources_in_order() -> None:
    parts = [_source(3_000, 0), _source(10, 1), _source(70_000, 2)]
    joined = pickle.loads(pickle.dumps(JoinedSource(parts)))
    assert joined.num_shards == sum(part.num_shards for part in parts) > 3
    assert joined.shard_sizes().tolist() == [size for part in parts for size in part.shard_sizes().tolist()]
    assert joined.num_samples == joined.size_hint() == 73_010
    labels = np.concatenate([batch.labels.numpy() for part in parts for batch in part.batches(4_096)])
    assert np.array_equal(np.concatenate([batch.labels.numpy() for batch in joined.batches(1_000)]), labels)
    shards = [np.concatenate([batch.labels.numpy() for batch in joined.read_shard(n)]) for n in range(joined.num_shards)]
    assert np.array_equal(np.concatenate(shards), labels)
    assert joined.name == "; ".join(part.name for part in parts)


def test_skipped_lines_are_added_up() -> None:
    parts = [ShardsInMemory([make_samples(2), make_samples(2), make_samples(2)]) for _ in range(2)]
    joined = JoinedSource(parts)
    for shard in range(joined.num_shards):
        list(joined.read_shard(shard))
    assert joined.skipped() == {path: 2 * lines for path, lines in parts[0].skipped().items()} != {}


def test_unlike_sources_are_refused() -> None:
    for sources in ([], [_source(5, 0), ShardsInMemory([make_samples(2)])]):
        with pytest.raises(ConfigError, match="the same features and dense columns"):
            JoinedSource(sources)
