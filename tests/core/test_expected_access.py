"""Expected accesses by hand, and the miss curve of cold rows against a simulated cache."""

from __future__ import annotations

import numpy as np
import pytest

from fae_torchrec.core.expected_access import AccessRates, expected_access
from fae_torchrec.core.tables import TableSet
from tests.core.small_profiles import Inputs, profile_of_inputs, small_tables
from tests.data.lru_simulation import simulated_misses

# Two features, 5 rows each: row 0 of table a is in every counted input, rows 1 and 2 in one each.
COUNTED: Inputs = [[[0, 1], [0]], [[0, 2], [1]], [[0], [0]], [[0], [0]]]
# What was not counted: of a's ids half are row 0, a quarter row 1, a quarter a row that was not seen.
FRESH: Inputs = [[[0, 1], [0]], [[0, 4], [3]]]


def test_by_hand() -> None:
    tables = small_tables([5, 5], dims=(1, 1))
    access = expected_access(profile_of_inputs(tables, COUNTED, FRESH), {"a": np.array([0]), "b": np.array([], dtype=np.int64)})
    a, b = access["a"], access["b"]
    assert (a.hot_rows, a.ids, a.cold_ids) == (1, (2.0,), (1.0,))
    assert (a.ids_per_sample, a.cold_ids_per_sample, a.coverage) == (2.0, 1.0, 0.5)
    assert a.hot.rates.tolist() == [1.0] and a.hot.rows.tolist() == [1.0], "row 0, once a sample"
    assert a.seen.rates.tolist() == [0.25] and a.seen.rows.tolist() == [2.0], "rows 1 and 2 share the half id that goes to seen cold rows"
    assert a.unseen.rates.tolist() == [0.25] and a.unseen.rows.tolist() == [2.0], "and rows 3 and 4 the half id of unseen ones"
    assert (b.coverage, b.cold_ids) == (0.0, (1.0,))
    assert b.cold.ids_per_sample == pytest.approx(1.0)
    # b: row 0 counted 3 times and row 1 once; half of the fresh ids are of seen rows.
    assert sorted(b.seen.rates.tolist()) == [0.125, 0.375]
    whole = a.all_hot()
    assert (whole.hot_rows, whole.cold_ids_per_sample, whole.coverage) == (5, 0.0, 1.0)
    assert whole.hot.ids_per_sample == pytest.approx(2.0) and whole.cold.rows.size == 0


def test_without_fresh_inputs_nothing_is_unseen() -> None:
    tables = small_tables([5, 5], dims=(1, 1))
    everything = {"a": np.arange(5), "b": np.array([1])}
    access = expected_access(profile_of_inputs(tables, COUNTED), everything)
    assert access["a"].coverage == 1 and access["a"].cold.ids_per_sample == 0
    assert access["a"].hot.ids_per_sample == pytest.approx(1.5)
    assert access["b"].cold_ids_per_sample == 0.75
    assert access["b"].unseen.ids_per_sample == 0


def test_a_table_that_nobody_asks() -> None:
    tables = TableSet(tuple(small_tables([5, 3], dims=(1, 1))))
    access = expected_access(profile_of_inputs(tables, [[[], [0]], [[], [0]]]), {"a": np.array([], dtype=np.int64), "b": np.array([0])})
    assert (access["a"].coverage, access["a"].cold.distinct(100)) == (1.0, 0.0)
    assert np.all(access["a"].cold.miss_curve(100)[1] == 0)


def test_distinct_rows_by_simulation() -> None:
    rng = np.random.default_rng(3)
    weights = 1 / np.arange(1, 401)
    rates = 3 * weights / weights.sum()
    found = AccessRates(rates, np.ones(400))
    drawn = [np.unique(rng.choice(400, size=3 * 64, p=weights / weights.sum())).size for _ in range(300)]
    assert found.ids_per_sample == pytest.approx(3)
    assert found.distinct(64) == pytest.approx(np.mean(drawn), rel=0.01)


def test_misses_of_an_lru_cache_by_simulation() -> None:
    rng = np.random.default_rng(5)
    weights = 1 / np.arange(1, 2001)
    chances = weights / weights.sum()
    steps = rng.choice(2000, size=(400, 64), p=chances)
    sizes, misses = AccessRates(chances, np.ones(2000)).miss_curve(64)
    assert np.all(np.diff(sizes) >= 0) and np.all(np.diff(misses) <= 0) and misses[0] == 1
    for size in (100, 300, 800):
        assert float(np.interp(size, sizes, misses)) == pytest.approx(simulated_misses(steps, size), abs=0.05)
    # The control: a load factor is no hit rate.
    assert abs(1 - 100 / 2000 - float(np.interp(100, sizes, misses))) > 0.15
