"""The Statistical Optimizer: cutoffs and intervals by hand, coverage over 300 seeds, and a search that ends where it must."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.estimate import Estimate
from fae_torchrec.core.row_counts import RowCounts
from fae_torchrec.core.statistical_optimizer import (
    CHUNK_ROWS,
    CHUNKS,
    ChunkSample,
    StatisticalOptimizer,
    access_cutoff,
    chunk_interval,
)
from tests.core.small_profiles import profile_of_counts

ROWS = 200_000
CUTOFFS = (1, 2, 5, 30, 100, 1000, 3000)
SEEDS = 300


def test_cutoffs_by_hand() -> None:
    assert access_cutoff(1.0, 300) == 3  # H = 3 accesses
    assert access_cutoff(1.0, 301) == 4  # H = 3.01: counts are whole
    assert access_cutoff(1.0, 100) == access_cutoff(0.001, 100) == access_cutoff(5.0, 0) == 1  # never "not seen"


def test_the_interval_by_hand() -> None:
    found = np.array([8] * 17 + [10] + [12] * 17)  # mean 10, sample variance 34 * 4 / 34 = 4
    value, half_width = chunk_interval(found, 140.0)
    assert value == pytest.approx(1400)
    # Three quarters of the chunks were not looked at; t(0.0005, 34) = 3.6007 is in printed tables.
    assert half_width == pytest.approx(140 * 3.6007 * (0.75 * 4 / 35) ** 0.5, rel=1e-4)
    assert chunk_interval(found, 35.0)[1] == 0, "nothing is unknown of a table that was looked at whole"


@cache
def _scattered() -> RowCounts:
    """Zipf counts of 200,000 rows, each at a random id."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, ROWS + 1) ** 1.05
    return RowCounts.from_dense(rng.permutation(rng.multinomial(400_000, share / share.sum())))


@cache
def _by_popularity() -> RowCounts:
    """The same counts, the most popular rows first, as a vocabulary has them."""
    return RowCounts.from_dense(np.sort(_scattered().dense())[::-1].copy())


def _coverage(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Share of the runs whose interval holds the truth, per cutoff; `low` and `high` are [SEEDS, cutoffs]."""
    exact = np.array([np.count_nonzero(_scattered().counts >= cutoff) for cutoff in CUTOFFS])
    return np.mean((low <= exact) & (exact <= high), axis=0)


@pytest.mark.parametrize("counts", [_scattered, _by_popularity])
def test_intervals_hold_the_exact_number_wherever_the_hot_rows_lie(counts: object) -> None:
    assert callable(counts)
    ends = np.empty((SEEDS, len(CUTOFFS), 3))
    for seed in range(SEEDS):
        sample = ChunkSample(counts(), np.random.default_rng(seed))
        estimates = [sample.rows_at_least(cutoff) for cutoff in CUTOFFS]
        ends[seed] = [(estimate.low, estimate.value, estimate.high) for estimate in estimates]
    low, value, high = np.moveaxis(ends, 2, 0)
    assert (_coverage(low, high) >= 0.99).all()
    half = (high - low) / 4
    assert (_coverage(value - half, value + half) < 0.97).all(), "intervals of half the width must be told from right ones"
    width = np.mean(high - low, axis=0) / 2 / np.mean(value, axis=0)
    assert width[0] < 0.04 and width[2] < 0.15, "and the intervals are not simply wide"


def _consecutive_chunks(counts: RowCounts) -> tuple[np.ndarray, np.ndarray]:
    """FAE's interval alone, of chunks of consecutive rows: ends [SEEDS, cutoffs]."""
    chunks = -(-ROWS // CHUNK_ROWS)
    dense = np.append(counts.dense(), np.zeros(chunks * CHUNK_ROWS - ROWS, dtype=np.int64)).reshape(chunks, CHUNK_ROWS)
    hot_rows = np.stack([(dense >= cutoff).sum(axis=1) for cutoff in CUTOFFS])
    drawn = np.stack([np.random.default_rng(seed).choice(chunks, CHUNKS, replace=False) for seed in range(SEEDS)])
    value, half_width = chunk_interval(np.moveaxis(hot_rows[:, drawn], 0, 1), chunks)
    return value - half_width, value + half_width


def test_why_chunks_are_not_consecutive_rows() -> None:
    scattered, by_popularity = (_coverage(*_consecutive_chunks(counts)) for counts in (_scattered(), _by_popularity()))
    assert (scattered[:5] >= 0.99).all(), "right if hot rows lie anywhere ..."
    assert scattered[-1] < 0.95, "... and are not few: twelve rows are often in no chunk, and the interval is then 0 to 0"
    assert by_popularity[3] < 0.5 and by_popularity[4] < 0.3, "with ids in order of popularity the hot rows are in chunks never drawn"


def test_small_tables_are_counted_whole() -> None:
    dense = np.arange(CHUNKS * CHUNK_ROWS) % 100
    sample = ChunkSample(RowCounts.from_dense(dense), np.random.default_rng(0))
    assert sample.is_whole
    exact = int((dense >= 40).sum())
    assert sample.rows_at_least(40) == Estimate(exact, exact, exact)
    assert sample.rows_at_least(100) == Estimate(0, 0, 0)
    assert not ChunkSample(RowCounts.from_dense(np.append(dense, 3)), np.random.default_rng(0)).is_whole


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(35_841, 300_000), st.integers(0, 40), st.integers(1, 6))
def test_intervals_stay_within_what_is_certain(seed: int, rows: int, seen: int, cutoff: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(rows, seen, replace=False))
    counts = RowCounts(rows, ids, rng.integers(1, 6, seen))
    estimate = ChunkSample(counts, rng).rows_at_least(cutoff)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= min(seen, counts.total // cutoff)
    assert estimate.low <= int((counts.counts >= cutoff).sum()) <= estimate.high


def test_the_search_takes_the_lowest_threshold_that_fits() -> None:
    # Rows of 4 bytes in a (20 accesses) and of 8 in b (10). Shares in per cent: a 50, 25, 15, 5, 5; b 60, 30, 10.
    optimizer = StatisticalOptimizer(profile_of_counts([10, 5, 3, 1, 1], [6, 3, 1]), ["a", "b"], seed=0)
    for budget, used, above, at_most in [(0, 0, 60, 200), (8, 8, 50, 60), (12, 12, 30, 50), (24, 24, 15, 25), (28, 28, 10, 15)]:
        found = optimizer.search(budget)
        assert above < found.threshold_percent <= at_most * (1 + 1e-6) and found.clamped == ()
        assert found.hot_bytes == Estimate(used, used, used)
        tried = {threshold: high for threshold, _, _, high in found.steps}
        assert tried[found.threshold_percent] <= budget
        assert all(high > budget for threshold, high in tried.items() if threshold < found.threshold_percent)
        assert len(tried) <= 60


def test_the_search_says_which_cutoffs_were_clamped() -> None:
    optimizer = StatisticalOptimizer(profile_of_counts([10, 5, 3, 1, 1], [6, 3, 1]), ["a", "b"], seed=0)
    found = optimizer.search(36)  # all but the two rows of a seen once: t is above 5 %, half an access of b
    assert found.hot_bytes.value == 12 + 24 and found.clamped == ("b",)
    assert optimizer.cutoffs(found.threshold_percent) == {"a": 2, "b": 1}
    everything = optimizer.search(10**9)
    assert everything.hot_bytes.value == 20 + 24 and everything.clamped == ("a", "b") and len(everything.steps) == 1


def test_tables_not_asked_for_do_not_count() -> None:
    profile = profile_of_counts([10, 5], [6, 3], [0, 0])
    assert StatisticalOptimizer(profile, ["b"], seed=0).hot_bytes(1.0).value == 16
    assert StatisticalOptimizer(profile, ["b", "c"], seed=0).search(100).clamped == ("b",)
    assert StatisticalOptimizer(profile, [], seed=0).search(0).hot_bytes == Estimate(0, 0, 0)


@pytest.mark.parametrize("budget", [0, 2_000, 40_000, 200_000])
def test_the_search_holds_the_upper_end_against_the_budget(budget: int) -> None:
    counts = _scattered()
    profile = profile_of_counts(counts.dense().tolist())
    optimizer = StatisticalOptimizer(profile, ["a"], seed=3)
    found = optimizer.search(budget)
    assert found == StatisticalOptimizer(profile, ["a"], seed=3).search(budget)
    cutoff = access_cutoff(found.threshold_percent, counts.total)
    exact = 4 * int((counts.counts >= cutoff).sum())
    assert found.hot_bytes.low <= exact <= found.hot_bytes.high <= budget
    one_access_less = 100 * (cutoff - 1) / counts.total
    assert access_cutoff(one_access_less * (1 - 1e-9), counts.total) == cutoff - 1
    assert optimizer.hot_bytes(one_access_less * (1 - 1e-9)).high > budget


def test_wrong_questions_are_refused() -> None:
    profile = profile_of_counts([1])
    with pytest.raises(ConfigError, match=r"tables \['z'\].*has \['a'\]"):
        StatisticalOptimizer(profile, ["a", "z"], seed=0)
    with pytest.raises(ConfigError, match="at least 0 bytes, received -1"):
        StatisticalOptimizer(profile, ["a"], seed=0).search(-1)
