"""What the stock planner is told about both tiers of a placement: options, constraints, caches and the staging area."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheStatistics

from fae_torchrec.core.expected_access import TableAccess
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.distributed.constraints import (
    CACHE_SLOT_BYTES,
    TierOptions,
    cold_cache,
    cold_constraints,
    cold_options,
    hot_constraints,
    hot_options,
)
from fae_torchrec.distributed.staging_room import staging_bytes

_LEAST_IDS = 1e-3  # per sample and feature: the stock planner's estimates divide by what a table is asked for
_CACHED_BATCHES, _MARGIN = 2, 1.25  # a prefetch cache below two batches is slower than plain UVM (torchrec#4099)
_LEAST_FACTOR, _MOST_FACTOR = 1e-4, 0.99  # TorchRec 1.8 refuses load factors of 0 and 1


@dataclass(frozen=True)
class TierSettings:
    """A placement and what follows from it for the stock planner.

    Attributes:
        placement: where the rows live.
        hot_tier: "replicated", "table_wise" or "row_wise".
        cold_options: what the cold tier may be.
        hot_options: what the hot tier may be.
        cold_constraints: by table; of tables that the placement does not know, as they were given.
        hot_constraints: by table with hot rows.
        staging_bytes: fast memory per rank of a staging area; 0: there is none.
    """

    placement: RowPlacement
    hot_tier: str
    cold_options: TierOptions
    hot_options: TierOptions
    cold_constraints: Mapping[str, ParameterConstraints]
    hot_constraints: Mapping[str, ParameterConstraints]
    staging_bytes: int


class ColdCacheStatistics(CacheStatistics):
    """What TorchRec's estimator asks about the cache in front of a table's cold rows. Its figures are of the cold accesses alone.

    Args:
        access: of the table, under the placement.
        samples: of a step in which the cold tier is asked, over all ranks.
        density: accesses per sample of such a step over those of a sample at large (hot batches ask nothing).
    """

    def __init__(self, access: TableAccess, samples: int, density: float = 1.0) -> None:
        sizes, misses = access.cold.miss_curve(samples * density)
        # Load factors are of the whole table: the cold tier keeps all rows at home.
        self._factors = np.append(sizes, access.table.rows) / access.table.rows
        self._misses = np.append(misses, 0.0)
        self._lookups = access.cold.distinct(samples * density)

    @property
    def expected_lookups(self) -> float:
        """Distinct cold rows of a step."""
        return self._lookups

    def expected_miss_rate(self, clf: float) -> float:
        """Share of the lookups that an LRU cache with room for `clf` of the table's rows misses."""
        return float(np.interp(clf, self._factors, self._misses))

    @property
    def cacheability(self) -> float:
        """Area under the curve of misses over load factors 0 to 1."""
        widths = np.diff(self._factors)
        return float(widths @ (self._misses[1:] + self._misses[:-1]) / 2)


def tier_settings(
    placement: RowPlacement,
    topology: Topology,
    batch_size: int | None,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    cold_tier: str = "auto",
    hot_tier: str = "replicated",
    cold_cache_bytes: int | None = None,
    access: Mapping[str, TableAccess] | None = None,
) -> TierSettings:
    """Settles everything that depends on the placement and not on the model.

    Args:
        placement: where the rows live.
        topology: of all ranks.
        batch_size: per rank; None for TorchRec's default.
        constraints: the user's own by table.
        cold_tier: as FAEShardingPlanner.
        hot_tier: as FAEShardingPlanner, but for "auto".
        cold_cache_bytes: as FAEShardingPlanner.
        access: expected accesses by table. With it the stock planner is told the cold ids per sample of a batch that is not hot, and
            how often a cache of cold rows misses; the cache of `uvm_caching` is made for the cold rows of two batches where
            `cold_cache_bytes` does not say. Without it stock's defaults stand.

    Raises:
        PlannerError: a tier does not exist on the device, or a constraint does not fit.
    """
    device, ranks = topology.compute_device, topology.world_size
    cold = cold_options(cold_tier, device, ranks)
    hot = hot_options(hot_tier, device)
    cache = cold_cache(placement, cold, cold_cache_bytes, ranks)
    staged = 0
    if cold.staged and hot_tier == "replicated" and ranks == 1:
        room = device == "cuda" and cold_cache_bytes is None
        staged = staging_bytes(placement, batch_size, constraints) if room else cold_cache_bytes or 0
    # On a single rank all sharding types hold the same rows, and table-wise has the least to do (`LocalTier`).
    types = cold.sharding_types[: 1 if ranks == 1 else None]
    of_cold = cold_constraints(placement, cold, constraints, cache, types)
    of_hot = hot_constraints(placement, hot, constraints)
    if access is not None:
        samples, density = (batch_size or BATCH_SIZE) * ranks, 1 / max(1 - placement.hot_inputs, 1e-3)
        for name, one in access.items():
            if name in of_cold and one.hot_rows < one.table.rows:
                of_cold[name] = _told(of_cold[name], one, samples, density, cache is not None and cold_cache_bytes is None)
            if name in of_hot:
                hot_ids = [ids - cold_ids for ids, cold_ids in zip(one.ids, one.cold_ids, strict=True)]
                of_hot[name] = replace(of_hot[name], pooling_factors=_pooling(of_hot[name], one, hot_ids))
    return TierSettings(placement, hot_tier, cold, hot, of_cold, of_hot, staged)


def cold_cache_size(settings: TierSettings, ranks: int) -> int | None:
    """Fast memory of a rank for all caches of cold rows, with FBGEMM's bookkeeping; None where no cache's size is known."""
    total = 0.0
    for table in settings.placement.tables:
        constraint = settings.cold_constraints.get(table.name)
        if constraint is not None and constraint.cache_params is not None:
            if constraint.cache_params.load_factor is None:
                return None
            total += constraint.cache_params.load_factor * table.rows * (table.weight_bytes + CACHE_SLOT_BYTES)
    return math.ceil(total / ranks) or None


def _told(constraint: ParameterConstraints, access: TableAccess, samples: int, density: float, sized: bool) -> ParameterConstraints:
    """A cold table's constraint with what is expected of its cold rows."""
    told = copy.copy(constraint)
    cold_ids = [min(cold * density, ids) for cold, ids in zip(access.cold_ids, access.ids, strict=True)]
    told.pooling_factors = _pooling(constraint, access, cold_ids)
    if told.cache_params is not None and told.cache_params.stats is None:
        statistics = ColdCacheStatistics(access, samples, min(density, access.ids_per_sample / max(access.cold_ids_per_sample, 1e-9)))
        factor = told.cache_params.load_factor
        if sized and factor is None:
            # Before the hot rows are chosen it is not known how dense cold batches will be: at most every id is another row.
            rows = statistics.expected_lookups if access.hot_rows else samples * access.ids_per_sample
            factor = _CACHED_BATCHES * _MARGIN * rows / access.table.rows
            factor = min(max(factor, _LEAST_FACTOR), _MOST_FACTOR)
        told.cache_params = replace(told.cache_params, load_factor=factor, stats=statistics)
    return told


def _pooling(constraint: ParameterConstraints, access: TableAccess, expected: list[float]) -> list[float]:
    """Expected ids per sample of each feature; where the user has given ids per sample, the same share of those."""
    given: list[float] = constraint.pooling_factors
    for others in (constraint.num_poolings, constraint.batch_sizes):
        if others and len(others) != len(expected):
            return given
    if not given or len(given) != len(expected) or given == ParameterConstraints().pooling_factors:
        return [max(ids, _LEAST_IDS) for ids in expected]
    shares = [part / ids if ids else 0.0 for part, ids in zip(expected, access.ids, strict=True)]
    return [max(ids * share, _LEAST_IDS) for ids, share in zip(given, shares, strict=True)]
