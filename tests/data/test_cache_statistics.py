"""Cache statistics against LRU caches simulated access by access, at every size; and what sampling and short streams do to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.cache_statistics import MeasuredCacheStatistics, TableCacheStatistics, measure_cache_statistics
from tests.data.lru_simulation import simulated_misses

Bags = Sequence[Sequence[int]]


def _batch(*features: Bags) -> Batch:
    """One batch; features are called a, b, ... and given as bags, one per sample."""
    values = [i for bags in features for bag in bags for i in bag]
    lengths = [len(bag) for bags in features for bag in bags]
    kjt = KeyedJaggedTensor(
        list("abc"[: len(features)]), torch.tensor(values, dtype=torch.int64), lengths=torch.tensor(lengths), stride=len(features[0])
    )
    return Batch(dense_features=torch.empty(kjt.stride(), 0), sparse_features=kjt, labels=torch.empty(kjt.stride()))


def _steps(ids: np.ndarray) -> Iterable[Batch]:
    """int64 [steps, samples], one id per sample."""
    return (_batch(step[:, None].tolist()) for step in ids)


def _table(rows: int) -> TableSet:
    return TableSet((TableSpec("t", rows, 4, ("a",)),))


def _measured(ids: np.ndarray, rows: int, **options: int) -> TableCacheStatistics:
    return measure_cache_statistics(_steps(ids), _table(rows), global_batch_size=ids.shape[1], **options).by_table["t"]


def _zipf(rows: int, shape: tuple[int, int], seed: int, exponent: float = 1.2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shares = np.cumsum(np.arange(1, rows + 1) ** -exponent)
    ids: np.ndarray = rng.permutation(rows)[np.searchsorted(shares, rng.random(shape) * shares[-1])]
    return ids


def test_every_cache_size_against_a_simulated_cache() -> None:
    rows, steps = 40, _zipf(40, (21, 16), seed=0)
    measured = _measured(steps, rows)
    assert measured.histogram.shape == (rows,), "one bin per row where there are fewer rows than bins"
    hits = np.concatenate([[0], np.cumsum(measured.histogram)[:-1]])
    misses = 1 - hits / measured.accesses  # of caches of 0..rows-1 rows
    simulated = [simulated_misses(steps, size) for size in range(rows)]
    np.testing.assert_allclose(misses, simulated, atol=1e-12)
    assert measured.cacheability == pytest.approx(np.mean(simulated), abs=1e-12), "the area under the steps of the curve"
    assert 0.05 < simulated[rows // 2] < 0.5, "or the case is trivial"
    assert measured.expected_lookups == pytest.approx(np.mean([len(set(step)) for step in steps.tolist()]))


def test_by_hand() -> None:
    # 0 1 | 0 2 || 0 1 | 2 3: in the second half, 0 has 1 row since (2), 1 has 2 (0 2), 2 has 2 (0 1), 3 is new.
    measured = _measured(np.array([[0, 1], [0, 2], [1, 0], [3, 2]]), 5)
    assert measured.histogram.tolist() == [0, 1, 2, 0, 1]
    assert (measured.accesses, measured.first_accesses, measured.expected_lookups) == (4, 1, 2.0)
    assert measured.cacheability == pytest.approx((2 + 3 + 3 + 5) / 4 / 5)


def test_extremes() -> None:
    one_row = _measured(np.full((6, 8), 3), 100)
    assert (one_row.cacheability, one_row.expected_lookups) == (0.01, 1.0)
    in_turn = _measured(np.tile(np.arange(100).reshape(10, 10), (4, 1)), 100)
    assert (in_turn.cacheability, in_turn.first_accesses) == (1.0, 0), "each row comes again after all others"
    always_new = _measured(np.arange(100).reshape(10, 10), 100)
    assert (always_new.cacheability, always_new.first_accesses) == (1.0, 50)


def test_uniform_access_is_a_half_and_skewed_access_less() -> None:
    rows, shape = 500, (400, 25)
    uniform = _measured(np.random.default_rng(1).integers(0, rows, shape), rows)
    assert uniform.cacheability == pytest.approx((1 + 1 / rows) / 2, abs=0.05 / 2 + 0.01), "up to half a step's rows, 5 % of these"
    assert _measured(_zipf(rows, shape, 1), rows).cacheability < 0.25
    assert _measured(_zipf(rows, shape, 1, exponent=2.5), rows).cacheability < 0.05


def test_a_short_stream_looks_harder_never_easier() -> None:
    ids = _zipf(2000, (400, 50), seed=2)
    found = [_measured(ids[:steps], 2000).cacheability for steps in (4, 20, 100, 400)]
    assert found == sorted(found, reverse=True)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 9), min_size=4, max_size=12))
def test_how_the_stream_is_cut_does_not_count(data: st.DataObject, sizes: list[int]) -> None:
    samples = sum(sizes)
    bag = st.lists(st.integers(0, 19), max_size=3)
    features = [data.draw(st.lists(bag, min_size=samples, max_size=samples)) for _ in range(2)]
    tables = TableSet((TableSpec("both", 20, 4, ("a", "b")), TableSpec("one", 20, 4, ("b",))))
    size = data.draw(st.integers(1, samples // 2))
    stops = np.cumsum(sizes).tolist()
    cut = [_batch(*(bags[start:stop] for bags in features)) for start, stop in zip([0, *stops], stops, strict=False)]
    whole = [_batch(*(bags[: samples // size * size] for bags in features))]  # the rest does not fill a global batch
    measured, expected = (measure_cache_statistics(batches, tables, global_batch_size=size) for batches in (cut, whole))
    assert measured.fingerprint == expected.fingerprint
    assert measured.global_batches == samples // size
    distinct = [
        {row for bags in features for bag in bags[start : start + size] for row in bag} for start in range(0, samples - size + 1, size)
    ]
    assert measured.by_table["both"].expected_lookups == pytest.approx(np.mean([len(rows) for rows in distinct]))


@pytest.mark.parametrize("skewed", [True, False])
def test_sampled_rows(skewed: bool) -> None:
    rows, shape = 20_000, (120, 1000)
    ids = _zipf(rows, shape, 3) if skewed else np.random.default_rng(3).integers(0, rows, shape)
    exact = _measured(ids, rows)
    assert exact.row_rate == 1
    sampled = [_measured(ids, rows, max_accesses=16384, seed=seed) for seed in range(16)]
    for one in sampled:
        assert one.row_rate in (1 / 4, 1 / 8)
        assert one.accesses <= 16384 * 0.6, "the second half of what was kept"
        assert one.expected_lookups == exact.expected_lookups, "counted on all rows"
    # One seed's standard deviation is 0.009 (over 40), and 0.024 anywhere on the curve; the default keeps 64 times as many accesses.
    assert np.mean([one.cacheability for one in sampled]) == pytest.approx(exact.cacheability, abs=0.015)
    curve = np.mean([np.cumsum(one.histogram) / one.accesses for one in sampled], axis=0)
    np.testing.assert_allclose(curve, np.cumsum(exact.histogram) / exact.accesses, atol=0.03)
    assert len({one.histogram.tobytes() for one in sampled}) == len(sampled), "other seeds choose other rows"


def test_a_small_table_keeps_its_rows_and_forgets_its_past() -> None:
    ids = np.random.default_rng(4).integers(0, 12, (3000, 8))
    measured = _measured(ids, 12, max_accesses=4096)
    latest = _measured(ids[-500:], 12)
    assert measured.row_rate == 1
    assert 1000 < measured.accesses < 4096
    assert measured.cacheability == pytest.approx(latest.cacheability, abs=0.03)


def test_a_step_looked_up_at_once() -> None:
    """FBGEMM looks up a whole step before it evicts by the step of last use: within two steps' rows of our curve."""
    steps = _zipf(300, (80, 20), seed=5)
    widest = 2 * max(len(set(step)) for step in steps.tolist())
    for size in (60, 120, 180):
        last_used: dict[int, int] = {}
        misses = accesses = 0
        for number, step in enumerate(np.unique(step).tolist() for step in steps):
            if number >= len(steps) // 2:
                accesses += len(step)
                misses += sum(row not in last_used for row in step)
            last_used.update(dict.fromkeys(step, number))
            last_used = dict(sorted(last_used.items(), key=lambda used: -used[1])[:size])
        assert simulated_misses(steps, size + widest) <= misses / accesses <= simulated_misses(steps, size - widest)


def test_a_table_that_is_never_accessed() -> None:
    measured = measure_cache_statistics([_batch([[], [], [], []])], _table(7), global_batch_size=2).by_table["t"]
    assert (measured.cacheability, measured.expected_lookups, measured.accesses) == (0.0, 0.0, 0)


def test_saved_and_loaded(tmp_path: Path) -> None:
    tables = TableSet((TableSpec("big", 3000, 4, ("a",)), TableSpec("small", 5, 4, ("b",))))
    rng = np.random.default_rng(6)
    batch = _batch(rng.integers(0, 3000, (64, 1)).tolist(), rng.integers(0, 5, (64, 1)).tolist())
    measured = measure_cache_statistics([batch], tables, global_batch_size=8, bins=50, source="here")
    measured.save(tmp_path / "cache_statistics.npz")
    loaded = MeasuredCacheStatistics.load(tmp_path / "cache_statistics.npz")
    assert loaded.fingerprint == measured.fingerprint
    shown = json.loads(json.dumps(loaded.to_json()))
    assert shown == measured.to_json()
    assert (shown["source"], shown["global_batch_size"], shown["global_batches"]) == ("here", 8, 8)
    assert [len(shown["tables"][name]["histogram"]) for name in ("big", "small")] == [50, 5]
    assert sum(shown["tables"]["big"]["histogram"]) == shown["tables"]["big"]["accesses"]
    other = replace(measured, by_table={**measured.by_table, "small": replace(measured.by_table["small"], cacheability=0.5)})
    assert other.fingerprint != measured.fingerprint


def test_refusals() -> None:
    batch = _batch([[0], [1], [2]])
    with pytest.raises(DataError, match=r"my file: 1 whole global batches of 2 samples .* at least 2 are needed"):
        measure_cache_statistics([batch], _table(3), global_batch_size=2, source="my file")
    with pytest.raises(DataError, match=r"my file, in the 3 samples after the first 3: .*table 't'"):
        measure_cache_statistics([batch, _batch([[0], [3], [1]])], _table(3), global_batch_size=1, source="my file")
    for wrong in ({"global_batch_size": 0}, {"bins": 0}, {"max_accesses": 100}):
        with pytest.raises(ConfigError, match=rf"{next(iter(wrong))} must be at least \d+, received {next(iter(wrong.values()))}"):
            measure_cache_statistics([batch], _table(3), **{"global_batch_size": 1, **wrong})
    good = TableCacheStatistics(3, 1.5, 0.4, np.array([1, 0, 2]), 1, 1.0)
    for change in ({"cacheability": 1.1}, {"expected_lookups": 4.0}, {"row_rate": 0.0}, {"histogram": np.zeros(3)}, {"rows": 2}):
        with pytest.raises(DataError, match="measure the statistics again"):
            replace(good, **change)
    with pytest.raises(DataError, match=r"rows \{'t': 3\}, allowed are exactly \{'t': 4\}"):
        MeasuredCacheStatistics(_table(4), {"t": good}, 1, 2, 7, "")
