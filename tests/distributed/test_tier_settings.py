"""What the stock planner is told of cold tables: ids per sample of cold batches, and the misses of a cache of cold rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints

from fae_torchrec.core.expected_access import expected_access
from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.distributed.hot_plan import cold_tables, showing
from fae_torchrec.distributed.sharder import FAEEmbeddingBagCollectionSharder
from fae_torchrec.distributed.tier_settings import ColdCacheStatistics, cold_cache_size, tier_settings
from tests.distributed.small_budget import KIB, ROWS, gpus, new_model, new_profile

MODEL = new_model()
PROFILE = new_profile(MODEL)
PLACEMENT = replace(RowPlacement.from_hot_set(select_hot_set(PROFILE, 30 * KIB)), hot_inputs=0.5)
ACCESS = expected_access(PROFILE, PLACEMENT.hot_ids)


def test_cold_ids_per_sample() -> None:
    told = tier_settings(PLACEMENT, gpus(2), 16, access=ACCESS).cold_constraints
    for name in ("middle", "large"):
        expected = min(2 * ACCESS[name].cold_ids_per_sample, 1.0)  # half of the samples are hot: the others have all cold ids
        assert told[name].pooling_factors == [pytest.approx(expected)]
    assert "tiny" not in told, "all hot"
    given = {"large": ParameterConstraints(pooling_factors=[20.0])}
    told = tier_settings(PLACEMENT, gpus(2), 16, given, access=ACCESS).cold_constraints
    assert told["large"].pooling_factors == [pytest.approx(20 * min(2 * ACCESS["large"].cold_ids_per_sample, 1.0))]
    assert given["large"].pooling_factors == [20.0]
    blind = tier_settings(PLACEMENT, gpus(2), 16).cold_constraints
    assert blind["large"].pooling_factors == ParameterConstraints().pooling_factors


def test_the_cache_has_room_for_two_batches_and_its_misses_are_of_cold_rows() -> None:
    settings = tier_settings(PLACEMENT, gpus(2), 16, access=ACCESS)
    cache = settings.cold_constraints["large"].cache_params
    assert cache is not None and cache.stats is not None and cache.load_factor is not None
    distinct = ACCESS["large"].cold.distinct(32 * min(2.0, 1 / ACCESS["large"].cold_ids_per_sample))
    assert cache.stats.expected_lookups == pytest.approx(distinct)
    assert cache.load_factor == pytest.approx(2 * 1.25 * distinct / ROWS["large"])
    miss = cache.stats.expected_miss_rate(cache.load_factor)
    assert 0.8 < miss < 1, "what comes again is hot: a cache of cold rows misses nearly always"
    # The whole table's own accesses are not as hard to cache.
    nothing_hot = {name: ids[:0] for name, ids in PLACEMENT.hot_ids.items()}
    whole = ColdCacheStatistics(expected_access(PROFILE, nothing_hot)["large"], 32)
    assert whole.expected_miss_rate(0.05) < miss - 0.2
    assert cold_cache_size(settings, 2) is not None
    given = tier_settings(PLACEMENT, gpus(2), 16, cold_cache_bytes=64 * KIB, access=ACCESS).cold_constraints["large"].cache_params
    assert given is not None and given.load_factor != cache.load_factor and given.stats is not None
    blind = tier_settings(PLACEMENT, gpus(2), 16)
    assert blind.cold_constraints["large"].cache_params.load_factor is None and cold_cache_size(blind, 2) is None


def test_statistics_at_the_ends() -> None:
    statistics = ColdCacheStatistics(ACCESS["large"], 32)
    assert statistics.expected_miss_rate(0.0) == 1.0
    assert statistics.expected_miss_rate(1.0) == pytest.approx(0.0, abs=1e-6)
    assert 0 < statistics.cacheability < 1


def test_the_stock_estimator_asks_them() -> None:
    """The control: with statistics, rows that the cache misses cost time; with load factors alone, none."""
    sharder = showing(FAEEmbeddingBagCollectionSharder(), cold_tables(PLACEMENT))
    prefetch = []
    for access in (ACCESS, None):
        constraints = dict(tier_settings(PLACEMENT, gpus(2), 16, access=access).cold_constraints)
        options = EmbeddingEnumerator(gpus(2), 16, constraints).enumerate(MODEL, [sharder])
        prefetch.append({option.name: _prefetch(option) for option in options})
    assert all(value > 0 for value in prefetch[0].values()) and prefetch[0].keys() == {"middle", "large"}
    assert all(value == 0 for value in prefetch[1].values())


def _prefetch(option: object) -> float:
    return sum(shard.perf.prefetch_compute for shard in option.shards)  # type: ignore[attr-defined]
