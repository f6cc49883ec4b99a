"""Access histograms against a Counter, levels against a full sort, and a skew curve by hand."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core import histogram as module
from fae_torchrec.core.errors import DataError
from fae_torchrec.core.histogram import AccessHistogram, count_levels, skew_curve, top_share
from fae_torchrec.core.row_counts import RowCounts

ROWS = 9


def _dense(counts: list[int]) -> RowCounts:
    return RowCounts.from_dense(np.array(counts, dtype=np.int64))


BATCH = st.tuples(st.booleans(), st.lists(st.integers(0, ROWS - 1), max_size=25))


@given(
    st.lists(BATCH, max_size=6),
    st.sampled_from([1, 7, 1000]),  # ids that wait
    st.sampled_from([(64, 16), (64, 0), (0, 16)]),  # soon dense; sparse until there are more rows than half of them; a huge table
)
def test_counts_are_those_of_a_counter(batches: list[tuple[bool, list[int]]], buffer: int, dense: tuple[int, int]) -> None:
    histogram = AccessHistogram(ROWS)  # batches of up to 25 ids: both fewer and more than the rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BUFFER_IDS", buffer)
        patch.setattr(module, "_ORDINARY_ROWS", dense[0])
        patch.setattr(module, "_DENSE_FROM", dense[1])
        for elsewhere, ids in batches:
            if elsewhere:
                histogram.add_counts(_dense(np.bincount(ids, minlength=ROWS).tolist() if ids else [0] * ROWS))
            else:
                histogram.add(np.array(ids, dtype=np.int64))
            histogram.row_counts()  # asking in between changes nothing
        counts = histogram.row_counts()
    expected = Counter(i for _, ids in batches for i in ids)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == expected
    assert histogram.total == counts.total == expected.total()


@pytest.mark.parametrize("size", [3, 30])
@pytest.mark.parametrize("bad", [-1, ROWS])
def test_a_bad_id_counts_nothing(size: int, bad: int) -> None:
    histogram = AccessHistogram(ROWS)
    ids = np.zeros(size, dtype=np.int64)
    ids[2] = bad
    with pytest.raises(DataError, match=rf"id {bad} .*0\.\.8"):
        histogram.add(ids)
    assert histogram.total == histogram.row_counts().total == 0


@pytest.mark.parametrize("rows", [9, 10**9])
def test_any_shape_counts_and_what_waits_is_a_copy(rows: int) -> None:
    histogram = AccessHistogram(rows)
    for shape in ((2, 3), (5, 4)):
        ids = np.full(shape, 4, dtype=np.int64)
        histogram.add(ids)
        ids[:] = 5
    counts = histogram.row_counts()
    assert (counts.ids.tolist(), counts.counts.tolist()) == ([4], [26])


def test_counts_of_another_table_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[3, 4\] rows"):
        AccessHistogram(3).add_counts(_dense([0, 1, 0, 0]))


def _peak_of_counting(rows: int, ids: np.ndarray, batches: int) -> tuple[int, int]:
    """Bytes held at most, and after the last batch."""
    tracemalloc.start()
    try:
        histogram = AccessHistogram(rows)
        for _ in range(batches):
            histogram.add(ids)
        held, peak = tracemalloc.get_traced_memory()
        assert histogram.total == batches * ids.size
        return peak, held
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_the_rows_seen_or_of_the_rows() -> None:
    seen = 50_000
    ids = np.arange(seen) * 997
    peak, held = _peak_of_counting(10**9, ids, batches=40)  # 2 M accesses, which would take 16 MB, in a table of 8 GB
    assert held <= 16 * seen + 8 * module._BUFFER_IDS + 8 * seen
    assert peak <= 8 * held
    _, held = _peak_of_counting(4_000, ids % 4_000, batches=10)  # dense from the first batch on
    assert held <= 8 * 4_000 + 10_000


COUNTS = st.lists(st.one_of(st.integers(0, 12), st.integers(65_530, 65_540), st.just(2**40)), min_size=1, max_size=40)


@given(COUNTS, st.sampled_from([1, 3, 1 << 22]), st.sampled_from([1, 5, 1 << 16]))
def test_levels_are_those_of_a_full_sort(counts: list[int], chunk: int, clip: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_ROWS", chunk)
        patch.setattr(module, "_LEVEL_CLIP", clip)
        levels, rows_at = count_levels(_dense(counts))
    expected = sorted(Counter(count for count in counts if count).items(), reverse=True)
    assert list(zip(levels.tolist(), rows_at.tolist(), strict=True)) == expected


def test_skew_curve_by_hand() -> None:
    row_share, access_share = skew_curve(_dense([1, 6, 0, 3]), points=3)
    np.testing.assert_allclose(row_share, [0.25, 0.5, 1.0])
    np.testing.assert_allclose(access_share, [0.6, 0.9, 1.0])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30))
def test_skew_curve_is_the_cumulated_sort(counts: list[int]) -> None:
    row_share, access_share = skew_curve(_dense(counts), points=17)
    cumulated = np.concatenate([[0], np.cumsum(sorted(counts, reverse=True))])
    expected = np.interp(row_share * len(counts), np.arange(len(counts) + 1), cumulated) / max(sum(counts), 1)
    np.testing.assert_allclose(access_share, expected, atol=1e-12)
    assert row_share[-1] == 1 and len(row_share) == 17


def test_skew_curve_of_a_table_nobody_accessed_is_flat() -> None:
    assert skew_curve(_dense([0] * 5))[1].tolist() == [0.0] * 100


def test_the_share_of_the_top_rows_by_hand() -> None:
    counts = _dense([0, 50, 5, 0, 20, 25] + [0] * 194)  # 200 rows: 1 % are two
    assert top_share(counts) == 0.75
    assert (top_share(counts, 0.0), top_share(counts, 1.0)) == (0.5, 1.0)
    assert top_share(_dense([0, 0, 0])) == 0.0
