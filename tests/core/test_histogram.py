"""Access histograms against a Counter, levels against a full sort, and a skew curve by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core import histogram as module
from fae_torchrec.core.errors import DataError
from fae_torchrec.core.histogram import AccessHistogram, count_levels, skew_curve

ROWS = 9


@given(st.lists(st.lists(st.integers(0, ROWS - 1), max_size=25), max_size=5))
def test_counts_are_those_of_a_counter(batches: list[list[int]]) -> None:
    histogram = AccessHistogram(ROWS)  # batches of up to 25 ids: both fewer and more than the rows
    for ids in batches:
        histogram.add(np.array(ids, dtype=np.int64))
    expected = Counter(i for ids in batches for i in ids)
    assert histogram.counts.dtype == np.int64
    assert histogram.counts.tolist() == [expected[row] for row in range(ROWS)]
    assert histogram.total == sum(map(len, batches))


@pytest.mark.parametrize("size", [3, 30])
@pytest.mark.parametrize("bad", [-1, ROWS])
def test_a_bad_id_counts_nothing(size: int, bad: int) -> None:
    histogram = AccessHistogram(ROWS)
    ids = np.zeros(size, dtype=np.int64)
    ids[2] = bad
    with pytest.raises(DataError, match=rf"id {bad} .*0\.\.8"):
        histogram.add(ids)
    assert histogram.total == 0


def test_any_shape_counts() -> None:
    for shape in ((2, 3), (5, 4)):
        histogram = AccessHistogram(ROWS)
        histogram.add(np.full(shape, 4, dtype=np.int64))
        assert histogram.counts[4] == histogram.total == shape[0] * shape[1]


def test_merge_adds() -> None:
    a, b = AccessHistogram(3), AccessHistogram(3)
    a.add(np.array([0, 1, 1]))
    b.add(np.array([1, 2]))
    a.merge(b)
    assert a.counts.tolist() == [1, 3, 1] and b.counts.tolist() == [0, 1, 1]
    with pytest.raises(DataError, match="3 and 4 rows"):
        a.merge(AccessHistogram(4))


COUNTS = st.lists(st.one_of(st.integers(0, 12), st.integers(65_530, 65_540), st.just(2**40)), max_size=40)


@given(COUNTS, st.sampled_from([1, 3, 1 << 22]), st.sampled_from([1, 5, 1 << 16]))
def test_levels_are_those_of_a_full_sort(counts: list[int], chunk: int, clip: int) -> None:
    array = np.array(counts, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_ROWS", chunk)
        patch.setattr(module, "_LEVEL_CLIP", clip)
        levels, rows_at = count_levels(array)
    expected = sorted(Counter(counts).items(), reverse=True)
    assert list(zip(levels.tolist(), rows_at.tolist(), strict=True)) == expected


def test_skew_curve_by_hand() -> None:
    row_share, access_share = skew_curve(np.array([1, 6, 0, 3]), points=3)
    np.testing.assert_allclose(row_share, [0.25, 0.5, 1.0])
    np.testing.assert_allclose(access_share, [0.6, 0.9, 1.0])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30))
def test_skew_curve_is_the_cumulated_sort(counts: list[int]) -> None:
    row_share, access_share = skew_curve(np.array(counts), points=17)
    cumulated = np.concatenate([[0], np.cumsum(sorted(counts, reverse=True))])
    expected = np.interp(row_share * len(counts), np.arange(len(counts) + 1), cumulated) / max(sum(counts), 1)
    np.testing.assert_allclose(access_share, expected, atol=1e-12)
    assert row_share[-1] == 1 and len(row_share) == 17


def test_skew_curve_of_a_table_nobody_accessed_is_flat() -> None:
    assert skew_curve(np.zeros(5, dtype=np.int64))[1].tolist() == [0.0] * 100
