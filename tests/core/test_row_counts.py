"""Sparse row counts against a Counter."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.row_counts import RowCounts

ROWS = 9


def _counts(by_row: dict[int, int], rows: int = ROWS) -> RowCounts:
    ids = sorted(by_row)
    return RowCounts(rows, np.array(ids, dtype=np.int64), np.array([by_row[i] for i in ids], dtype=np.int64))


PART = st.dictionaries(st.integers(0, ROWS - 1), st.integers(1, 2**40))


@given(st.lists(PART, min_size=1, max_size=4))
def test_merged_is_the_sum(parts: list[dict[int, int]]) -> None:
    merged = RowCounts.merged(_counts(part) for part in parts)
    expected = sum((Counter(part) for part in parts), Counter())
    assert dict(zip(merged.ids.tolist(), merged.counts.tolist(), strict=True)) == expected
    assert merged.total == expected.total() and merged.rows == ROWS
    assert merged.ids.dtype == merged.counts.dtype == np.int64


@given(PART)
def test_lookups_and_dense_counts(by_row: dict[int, int]) -> None:
    counts = _counts(by_row)
    expected = [by_row.get(row, 0) for row in range(ROWS)]
    assert counts.dense().tolist() == counts.of(np.arange(ROWS)).tolist() == expected
    assert counts.of(np.array([[8, 0], [8, 3]])).tolist() == [[expected[8], expected[0]], [expected[8], expected[3]]]
    back = RowCounts.from_dense(counts.dense())
    assert (back.rows, back.ids.tolist(), back.counts.tolist()) == (ROWS, counts.ids.tolist(), counts.counts.tolist())
    assert pickle.loads(pickle.dumps(counts)).total == counts.total


def test_counts_of_other_tables_are_not_merged() -> None:
    with pytest.raises(DataError, match=r"\[9, 10\] rows"):
        RowCounts.merged([_counts({1: 1}), _counts({1: 1}, rows=10)])
    with pytest.raises(DataError, match="cannot be merged"):
        RowCounts.merged([])


@pytest.mark.parametrize(
    ("ids", "counts", "said"),
    [
        ([0, 9], [1, 1], r"id 9 .*0\.\.8"),
        ([-1], [1], "id -1"),
        ([2, 1], [1, 1], "ascending"),
        ([2, 2], [1, 1], "ascending"),
        ([[0, 1]], [[1, 1]], "ascending"),
        ([0, 1], [1, 0], "minimum 0"),
        ([0, 1], [3], r"\[1\] .*for 2 ids"),
    ],
)
def test_what_is_no_count_is_refused(ids: list[int], counts: list[int], said: str) -> None:
    with pytest.raises(DataError, match=said):
        RowCounts(ROWS, np.array(ids, dtype=np.int64), np.array(counts, dtype=np.int64))


def test_types_are_checked() -> None:
    with pytest.raises(DataError, match="received float64"):
        RowCounts(ROWS, np.array([1]), np.array([1.0]))
    with pytest.raises(DataError, match="minimum -2"):
        RowCounts.from_dense(np.array([0, -2, 3]))
