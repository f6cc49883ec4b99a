"""Profiles counted in parts: the same, bit for bit, however the shards are dealt to workers and ranks."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError, DataError, FAEError
from fae_torchrec.data import kept_inputs
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.kept_inputs import InputPool, KeptInputs
from fae_torchrec.data.partial_profile import PartialProfile
from tests.data.small_shards import TABLES, ShardsInMemory, make_samples

SHARDS = [make_samples(size, seed, one_hot=seed % 2 == 0) for seed, size in enumerate([40, 3, 25, 60, 17, 1])]
CALIBRATOR = Calibrator(TABLES, sample_rate=0.4, seed=3, keep_inputs=20, fresh_inputs=30)


def test_the_whole_is_counted_once_and_says_what_was_skipped() -> None:
    profile = CALIBRATOR.run_source(ShardsInMemory(SHARDS))
    assert profile.total_samples == sum(map(len, SHARDS)) == 146
    assert (profile.counted_inputs.num_samples, profile.fresh_inputs and profile.fresh_inputs.num_samples) == (20, 30)
    assert profile.skipped == ShardsInMemory.skipped_in(range(6)) and profile.source == "in memory"
    every = Calibrator(TABLES, sample_rate=1).run_source(ShardsInMemory(SHARDS))
    expected = Counter(i for shard in SHARDS for sample in shard for i in sample["x"])
    assert every.counts["b"].dense().tolist() == [expected[i] for i in range(20)]


@pytest.mark.parametrize("read_before", [[], [1, 4], range(6)])
def test_skipped_lines_count_once_whoever_read_them_before(read_before: Iterable[int]) -> None:
    parts = []
    for shards in ([0, 3, 4], [1, 2], [5]):
        source = ShardsInMemory(SHARDS)
        for shard in read_before:
            list(source.read_shard(shard))
        parts.append(CALIBRATOR.count(source, shards))
    assert PartialProfile.merged(parts).profile().skipped == ShardsInMemory.skipped_in(range(6))


def test_workers_together_may_not_skip_more_than_allowed() -> None:
    parts = []
    for shards in ([0, 1, 2], [3, 4, 5]):  # 3 and 12 malformed lines
        source = ShardsInMemory(SHARDS)
        source.max_bad_lines = 14
        parts.append(CALIBRATOR.count(source, shards))
    assert parts[0].profile().skipped == ShardsInMemory.skipped_in([1, 2])
    with pytest.raises(DataError, match=r"15 malformed lines .*'file 0': 3.* 14 are allowed"):
        PartialProfile.merged(parts).profile()


def test_shards_draw_independently() -> None:
    """Two shards of the same samples are not sampled alike; one shard is what `run` makes of it."""
    calibrator = Calibrator(TABLES, sample_rate=0.5, seed=3)
    source = ShardsInMemory([SHARDS[3], SHARDS[3]])
    a, b = (calibrator.count(source, [shard]) for shard in (0, 1))
    assert a.counted.draws.tolist() != b.counted.draws.tolist()
    assert a.profile("x").counts["a"].dense().tolist() == calibrator.run(source.read_shard(0)).counts["a"].dense().tolist()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=6, max_size=6), st.permutations(range(4)), st.sampled_from([2, 1024]))
def test_the_deal_does_not_matter(worker_of: list[int], order: list[int], max_pieces: int) -> None:
    whole = CALIBRATOR.run_source(ShardsInMemory(SHARDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_inputs, "_MAX_PIECES", max_pieces)
        parts = [
            CALIBRATOR.count(ShardsInMemory(SHARDS), [shard for shard in reversed(range(6)) if worker_of[shard] == worker])
            for worker in order
        ]
        sent = [pickle.loads(pickle.dumps(part)) for part in parts]
        merged = PartialProfile.merged([PartialProfile.merged(sent[:2]), *sent[2:]])
    assert merged.shards == set(range(6))
    assert merged.profile("in memory").fingerprint == whole.fingerprint


def test_workers_make_the_same_profile_and_report_errors() -> None:
    whole = CALIBRATOR.run_source(ShardsInMemory(SHARDS))
    assert CALIBRATOR.run_source(ShardsInMemory(SHARDS), workers=2).fingerprint == whole.fingerprint
    bad = [{"x": [12], "y": [], "z": []}]
    with pytest.raises(DataError, match=r"^in memory, shard 6, in the 1 samples after the first 0: .*'a'.*id 12 .*0\.\.11"):
        CALIBRATOR.run_source(ShardsInMemory([*SHARDS, bad]), workers=2)
    with pytest.raises(FAEError, match="a worker that counted in memory ended without a result: killed"):
        CALIBRATOR.run_source(ShardsInMemory([*SHARDS, []]), workers=2)


def test_workers_are_not_started_for_nothing() -> None:
    with pytest.raises(ConfigError, match="workers must be at least 1, received 0"):
        CALIBRATOR.run_source(ShardsInMemory(SHARDS), workers=0)
    with pytest.raises(DataError, match="none of 0 inputs"):
        CALIBRATOR.run_source(ShardsInMemory([]), workers=2)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    source = ShardsInMemory(SHARDS)
    a, b = CALIBRATOR.count(source, [0, 1]), CALIBRATOR.count(source, [1, 2])
    with pytest.raises(DataError, match=r"shards \[1\] were counted twice"):
        PartialProfile.merged([a, b])
    other = Calibrator(TABLES, sample_rate=0.4, seed=4, keep_inputs=20, fresh_inputs=30)
    with pytest.raises(DataError, match=r"seed=3.*seed=4.*cannot be merged"):
        PartialProfile.merged([a, other.count(source, [2])])
    with pytest.raises(DataError, match="received no partial profile"):
        PartialProfile.merged([])


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), max_size=12), st.integers(1, 5), st.permutations(range(12)))
def test_equal_draws_are_kept_by_their_places(draws: list[float], size: int, order: list[int]) -> None:
    pool = InputPool(size, num_features=1)
    for place in order:
        if place < len(draws):
            pool.add(KeptInputs(np.array([draws[place]]), np.array([place]), np.array([place]), None, 1))
    expected = sorted(sorted(range(len(draws)), key=lambda place: (draws[place], place))[:size])
    assert pool.kept().places.tolist() == pool.kept().values.tolist() == expected
