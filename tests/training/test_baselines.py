"""TorchRec's own placements: planned for CUDA without one, refused where they do not exist, and warned of where set up wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torchrec.distributed.planner import Topology
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import CacheAlgorithm, CacheParams, ShardingPlan

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.baselines import (
    BASELINES,
    PlannedCache,
    cache_warnings,
    planned_caches,
    rows_of_two_batches,
    stock_baseline,
    stock_planner,
)
from fae_torchrec.training.run_entry import planned_cold_memory, planned_fast_memory
from tests.training.small_run import ROWS, Samples, new_model

MODEL = new_model()
TABLES = model_tables(MODEL)
WHOLE = sum(ROWS.values())
ON_CUDA = ["stock", "stock-hbm", "stock-prefetch", "stock-uvm", "stock-uvm-caching"]


def plan(name: str, ranks: int = 1, cache_bytes: int | None = None) -> ShardingPlan:
    topology = Topology(world_size=ranks, local_world_size=ranks, compute_device="cuda")
    planner = stock_planner(TABLES, topology, 16, stock_baseline(name, "cuda"), cache_bytes)
    return planner.plan(MODEL, get_default_sharders())


@pytest.mark.parametrize("name", ON_CUDA)
def test_plan_on_cuda(name: str) -> None:
    """Every table is where the name says; the rest of the memory is cold."""
    shardings = [sharding for collection in plan(name).plan.values() for sharding in collection.values()]  # type: ignore[attr-defined]
    assert len(shardings) == len(ROWS)
    if (kernel := BASELINES[name].kernel) is not None:
        assert {sharding.compute_kernel for sharding in shardings} == {kernel}
    fast, cold = planned_fast_memory(plan(name), TABLES, "cuda", 1), planned_cold_memory(plan(name), TABLES, "cuda", 1)
    if name == "stock-hbm":
        assert (fast["stock tables"], sum(cold.values())) == (WHOLE * 16, 0)
    elif name != "stock":
        assert (fast["stock tables"], cold["stock tables"]) == (0, WHOLE * 16)
        assert ("cache" in fast) == BASELINES[name].caches


def test_caches_of_a_plan_by_hand() -> None:
    """A tenth of the tables with 20 bytes of bookkeeping a row; the caches of two ranks hold a fifth."""
    whole = WHOLE * (16 + 20)
    for ranks in (1, 2):
        caches = planned_caches(plan("stock-prefetch", ranks, cache_bytes=whole // 10), TABLES)
        assert {cache.table: cache.rows for cache in caches} == {f"t_{name}": rows for name, rows in ROWS.items()}
        assert all(cache.load_factor == pytest.approx(ranks / 10, rel=1e-3) and cache.prefetch_pipeline for cache in caches)
    default = planned_caches(plan("stock-uvm-caching"), TABLES)
    assert {(cache.load_factor, cache.prefetch_pipeline) for cache in default} == {(0.2, False)}
    assert planned_caches(plan("stock-uvm"), TABLES) == []
    assert {cache.load_factor for cache in planned_caches(plan("stock-prefetch", cache_bytes=10 * whole), TABLES)} == {0.999}


@pytest.mark.parametrize("name", [name for name in BASELINES if name not in ("stock", "stock-host")])
def test_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"received '{name}' with train.device 'cpu'.*\['stock', 'stock-host'\]"):
        stock_baseline(name, "cpu")


def test_which_exist_where() -> None:
    assert stock_baseline("stock-host", "cpu") is BASELINES["stock-host"]
    assert stock_baseline("fae", "cpu") is stock_baseline("fae-unsegregated", "cuda") is None
    with pytest.raises(ConfigError, match="no kernel that looks tables up on the host of a GPU"):
        stock_baseline("stock-host", "cuda")
    assert sorted(name for name, baseline in BASELINES.items() if baseline.device in (None, "cuda")) == ON_CUDA


def cache(table: str = "t", rows: int = 1000, factor: float = 0.2, *, prefetch: bool = True, lfu: bool = False) -> PlannedCache:
    return PlannedCache(table, rows, factor, prefetch, lfu)


@pytest.mark.parametrize(
    ("caches", "prefetches", "needed", "words"),
    [
        ([cache()], True, {"t": 200}, []),
        ([cache()], True, {"t": 201}, [r"of 200 rows is smaller than the 201 distinct rows of two batches.*at least 0\.2"]),
        ([cache(), cache("u", 100, 1.0)], True, {"t": 250, "u": 50}, []),  # one cache for both
        ([cache(prefetch=False)], False, {"t": 999}, []),
        ([cache(prefetch=False)], True, {}, ["the cache of t is not told so.*prefetch_pipeline=True"]),
        ([cache(prefetch=True)], False, {}, ["of t without a pipeline that prefetches"]),
        ([cache(lfu=True)], True, {}, ["t is LFU"]),
        ([], True, {}, ["no table is cached"]),
        ([], False, {}, []),
    ],
)
def test_warnings(caches: list[PlannedCache], prefetches: bool, needed: dict[str, int], words: list[str]) -> None:
    warnings = cache_warnings("mine", caches, prefetches=prefetches, rows_of_two_batches=needed)
    assert len(warnings) == len(words)
    for warning, wanted in zip(warnings, words, strict=True):
        assert warning.startswith("mine: ")
        assert re.search(wanted, warning), warning


def test_a_plan_of_somebody_else() -> None:
    """CacheParams that name nothing are TorchRec's default; LFU is seen."""
    given: Any = plan("stock-prefetch")
    first, second, *_ = (sharding for collection in given.plan.values() for sharding in collection.values())
    first.cache_params, second.cache_params = None, CacheParams(CacheAlgorithm.LFU, load_factor=0.5)
    caches = {item.table: item for item in planned_caches(given, TABLES)}
    assert caches["t_a"] == PlannedCache("t_a", 6, 0.2, False) and caches["t_b"] == PlannedCache("t_b", 300, 0.5, False, lfu=True)


def test_rows_of_two_batches_against_sets() -> None:
    samples = Samples(100)
    found = rows_of_two_batches(samples, TABLES, 20, pairs=2)
    batches = list(samples.batches(20))
    for name in ROWS:
        pairs = [set(one[name].values().tolist()) | set(two[name].values().tolist()) for one, two in _features(batches)]
        assert found[f"t_{name}"] == max(map(len, pairs))
    assert rows_of_two_batches(samples, TABLES, 1000) == dict.fromkeys(TABLES.names, 0), "less than a pair says nothing"


def _features(batches: list[Any]) -> list[tuple[Any, Any]]:
    return [(batches[at].sparse_features, batches[at + 1].sparse_features) for at in (0, 2)]
