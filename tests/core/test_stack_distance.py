"""LRU stack distances against an LRU stack that is kept by hand."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.stack_distance import stack_distances


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _by_stack(ids: list[int]) -> list[int]:
    """The place of each id in a list of ids, latest first, that is kept in order of access."""
    stack: list[int] = []
    distances = []
    for row in ids:
        distances.append(stack.index(row) if row in stack else -1)
        if row in stack:
            stack.remove(row)
        stack.insert(0, row)
    return distances


def _lru_hits(ids: list[int], rows: int) -> list[bool]:
    """Which accesses a cache of `rows` rows that evicts the least recently used serves."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = []
    for row in ids:
        hits.append(row in cache)
        cache[row] = None
        cache.move_to_end(row)
        if len(cache) > rows:
            cache.popitem(last=False)
    return hits


def test_distances_by_hand() -> None:
    distances = stack_distances(_ids(7, 7, 3, 9, 3, 7, 7, 9))
    assert distances.dtype == np.int64
    assert distances.tolist() == [-1, 0, -1, -1, 1, 2, 0, 2]


def test_no_access_and_one() -> None:
    assert stack_distances(_ids()).tolist() == []
    assert stack_distances(_ids(5)).tolist() == [-1]
    assert stack_distances(_ids(5, 5)).tolist() == [-1, 0]
    assert stack_distances(_ids(5, 6)).tolist() == [-1, -1]


@given(st.lists(st.integers(0, 9), max_size=70))
def test_distances_are_places_in_an_lru_stack(ids: list[int]) -> None:
    assert stack_distances(_ids(*ids)).tolist() == _by_stack(ids)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20).flatmap(lambda ids: st.permutations(ids + ids[::2])))
def test_any_int64_is_an_id(ids: list[int]) -> None:
    assert stack_distances(_ids(*ids)).tolist() == _by_stack(ids)


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 14))
def test_distances_below_the_rows_of_a_cache_are_its_hits(ids: list[int], rows: int) -> None:
    distances = stack_distances(_ids(*ids))
    assert ((distances >= 0) & (distances < rows)).tolist() == _lru_hits(ids, rows)


@pytest.mark.parametrize("accesses", [255, 256, 257, 3000])
def test_a_skewed_sequence(accesses: int) -> None:
    ids = np.random.default_rng(accesses).zipf(1.2, accesses) % 1000
    assert stack_distances(ids).tolist() == _by_stack(ids.tolist())


def test_a_cycle_is_always_missed_by_a_smaller_cache() -> None:
    distances = stack_distances(np.tile(np.arange(1000), 5))
    assert (distances[:1000] == -1).all() and (distances[1000:] == 999).all()


def test_a_matrix_is_refused() -> None:
    with pytest.raises(DataError, match=r"received shape \[2, 2\]"):
        stack_distances(np.zeros((2, 2), dtype=np.int64))
