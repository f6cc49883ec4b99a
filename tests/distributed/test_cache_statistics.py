"""TorchRec's own reading of our statistics: its miss rates are a simulated cache's, and its planner sizes caches by them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.proposers import EmbeddingOffloadScaleupProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import CacheAlgorithm, CacheParams, DataType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.cache_statistics import MeasuredCacheStatistics, TableCacheStatistics, measure_cache_statistics
from fae_torchrec.distributed.cache_statistics import cache_constraints, torchrec_cache_statistics
from tests.data.lru_simulation import simulated_misses

ROWS, DIM = 20_000, 64
EASY = TableCacheStatistics(ROWS, 300.0, 0.1, np.array([800, 100, 50, 50]), 20, 1.0)
HARD = TableCacheStatistics(ROWS, 900.0, 0.5, np.array([250, 250, 250, 250]), 0, 1.0)
TABLES = TableSet(tuple(TableSpec(name, ROWS, DIM, (name,)) for name in ("x", "y")))


def _measured(x: TableCacheStatistics = EASY, y: TableCacheStatistics = HARD) -> MeasuredCacheStatistics:
    return MeasuredCacheStatistics(TABLES, {"x": x, "y": y}, 1024, 10, 7, "by hand")


def _load_factors(constraints: Mapping[str, ParameterConstraints]) -> tuple[float, float]:
    """What the stock planner chooses on a device that holds half of both tables."""
    configs = [EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[name]) for name in ("x", "y")]
    topology = Topology(world_size=1, local_world_size=1, compute_device="cuda", hbm_cap=ROWS * DIM * 4)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=1024,
        constraints=dict(constraints),
        proposer=[EmbeddingOffloadScaleupProposer()],
        storage_reservation=FixedPercentageStorageReservation(0.0),
    )
    model = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    plan = planner.plan(model, [EmbeddingBagCollectionSharder()]).plan[""]
    assert {plan[name].compute_kernel for name in ("x", "y")} == {"fused_uvm_caching"}
    return plan["x"].cache_params.load_factor, plan["y"].cache_params.load_factor


def test_the_stock_planner_sizes_caches_by_the_statistics() -> None:
    given = cache_constraints(_measured(), load_factor=0.1)
    x, y = _load_factors(given)
    assert y > 0.5 > 0.3 > x > 0.1, "the table that is asked for more rows and is harder to cache gets more"
    # Both tables are alike, so memory is dealt by cacheability * expected lookups: 30 to 450.
    assert (y - 0.1) / (x - 0.1) == pytest.approx(450 / 30, rel=0.01)
    assert _load_factors(cache_constraints(_measured(HARD, EASY), load_factor=0.1)) == pytest.approx((y, x)), "statistics, not names"
    for constraint in given.values():
        assert constraint.cache_params is not None
        constraint.cache_params.stats = None
    assert _load_factors(given) == (0.1, 0.1), "without statistics nothing is scaled"


@pytest.mark.parametrize("exponent", [0.0, 1.2])
def test_torchrecs_miss_rates_are_those_of_a_simulated_cache(exponent: float) -> None:
    rows, bins = 400, 40
    rng = np.random.default_rng(0)
    shares = np.cumsum(np.arange(1, rows + 1) ** -exponent)
    steps = np.searchsorted(shares, rng.random((60, 64)) * shares[-1])
    kjt = KeyedJaggedTensor(["a"], torch.from_numpy(steps.ravel()), lengths=torch.ones(steps.size, dtype=torch.int32), stride=steps.size)
    batch = Batch(dense_features=torch.empty(steps.size, 0), sparse_features=kjt, labels=torch.empty(steps.size))
    tables = TableSet((TableSpec("t", rows, 4, ("a",)),))
    statistics = torchrec_cache_statistics(measure_cache_statistics([batch], tables, global_batch_size=64, bins=bins))["t"]
    simulated = {size: simulated_misses(steps, size) for size in range(rows // bins, rows, 23)}
    for size, misses in simulated.items():
        found = statistics.expected_miss_rate(size / rows)
        at_edge = -(-size // 10) * 10  # TorchRec does not interpolate: a size stands for the upper edge of its bin
        expected = simulated_misses(steps, at_edge) if at_edge < rows else 0.0
        assert found == pytest.approx(expected, abs=1e-6)
        assert found <= misses + 1e-6
    assert statistics.expected_miss_rate(0.0) == 1
    assert statistics.expected_miss_rate(1.0) == 0
    area = np.mean([statistics.expected_miss_rate(share) for share in np.linspace(0, 1, 1000)])
    assert statistics.cacheability == pytest.approx(area, abs=1 / bins + 1 / rows)
    assert statistics.expected_lookups == np.mean([len(set(step)) for step in steps.tolist()])


def test_a_table_that_is_never_accessed_misses_nothing() -> None:
    idle = TableCacheStatistics(ROWS, 0.0, 0.0, np.zeros(4, dtype=np.int64), 0, 1.0)
    assert torchrec_cache_statistics(_measured(idle))["x"].expected_miss_rate(0.3) == 0


def test_constraints_of_ones_own_are_kept() -> None:
    mine = {
        "x": ParameterConstraints(
            sharding_types=["row_wise"],
            compute_kernels=["fused", "fused_uvm_caching"],
            cache_params=CacheParams(load_factor=0.3, precision=DataType.FP16),
        ),
        "y": ParameterConstraints(compute_kernels=["fused"]),
        "z": ParameterConstraints(min_partition=8),
    }
    made = cache_constraints(_measured(), load_factor=0.1, reserved_memory=64.0, base_constraints=mine)
    x = made["x"]
    assert (x.sharding_types, x.compute_kernels) == (["row_wise"], ["fused_uvm_caching"])
    assert x.cache_params is not None
    assert x.cache_params.stats is not None
    kept = (x.cache_params.load_factor, x.cache_params.precision, x.cache_params.reserved_memory, x.cache_params.algorithm)
    assert kept == (0.3, DataType.FP16, 64.0, CacheAlgorithm.LRU)
    assert made["y"] == mine["y"], "a table that is not to be cached"
    assert made["z"] == mine["z"], "a table that was not measured"
    assert made["z"] is not mine["z"]
    assert mine["x"].cache_params is not None
    assert mine["x"].cache_params.stats is None, "what was given is not changed"


def test_refusals() -> None:
    lfu = {"y": ParameterConstraints(cache_params=CacheParams(algorithm=CacheAlgorithm.LFU))}
    with pytest.raises(PlannerError, match=r"table 'y': its cache is CacheAlgorithm.LFU, the statistics are of CacheAlgorithm.LRU"):
        cache_constraints(_measured(), base_constraints=lfu)
    for wrong in (0.0, 1.5):
        with pytest.raises(PlannerError, match=rf"table 'x': load_factor must be above 0 and at most 1 .*received {wrong}"):
            cache_constraints(_measured(), load_factor=wrong)
