"""Measured cache statistics as TorchRec takes them: CacheStatistics of each table, and constraints for the stock planner."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.planner.shard_estimators import EmbeddingOffloadStats
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheAlgorithm, CacheParams

from fae_torchrec.data.cache_statistics import MeasuredCacheStatistics
from fae_torchrec.distributed.input_error import input_error

_CACHED = EmbeddingComputeKernel.FUSED_UVM_CACHING.value


def torchrec_cache_statistics(measured: MeasuredCacheStatistics) -> dict[str, EmbeddingOffloadStats]:
    """TorchRec's `CacheStatistics` of every table, for `CacheParams(stats=...)`.

    Args:
        measured: from `measure_cache_statistics`, under the global batch size that will be trained with.

    Returns:
        Table name -> EmbeddingOffloadStats.
    """
    return {
        name: EmbeddingOffloadStats(
            cacheability=one.cacheability,
            expected_lookups=one.expected_lookups,
            mrc_hist_counts=torch.from_numpy(one.histogram.copy()),
            height=one.rows,
        )
        for name, one in measured.by_table.items()
    }


def cache_constraints(
    measured: MeasuredCacheStatistics,
    *,
    load_factor: float = UVM_CACHING_RATIO,
    reserved_memory: float | None = None,
    base_constraints: Mapping[str, ParameterConstraints] | None = None,
) -> dict[str, ParameterConstraints]:
    """Constraints that keep the measured tables in host memory behind a cache on the device, with the statistics of that cache.

    For `EmbeddingShardingPlanner(constraints=..., proposer=[EmbeddingOffloadScaleupProposer()])`: the proposer deals the device memory
    that is left to the caches, in proportion to cacheability * expected_lookups; without statistics it leaves every cache as it is.

    Args:
        measured: from `measure_cache_statistics`.
        load_factor: the smallest cache, as a share of the table, in (0, 1]; the proposer only adds to it. Default: TorchRec's.
        reserved_memory: bytes beside the cache, as in `CacheParams`.
        base_constraints: constraints of one's own by table. What they say is kept: a table whose kernels leave out `fused_uvm_caching`
            is not cached and stays as it is; cache parameters that are set win over the arguments above. Tables that were not
            measured stay as they are.

    Returns:
        Table name -> constraints; new objects.

    Raises:
        PlannerError: a load factor is out of range, or a cache of one's own is not LRU, which is what was measured.
    """
    constraints = {name: copy.deepcopy(constraint) for name, constraint in (base_constraints or {}).items()}
    for name, statistics in torchrec_cache_statistics(measured).items():
        given = constraints.get(name, ParameterConstraints())
        if given.compute_kernels and _CACHED not in given.compute_kernels:
            continue
        cache = given.cache_params or CacheParams()
        if cache.algorithm not in (None, CacheAlgorithm.LRU):
            raise input_error(f"table {name!r}: its cache is {cache.algorithm}, the statistics are of CacheAlgorithm.LRU; use that or none")
        chosen = load_factor if cache.load_factor is None else cache.load_factor
        if not 0 < chosen <= 1:
            raise input_error(f"table {name!r}: load_factor must be above 0 and at most 1 (the proposer scales it), received {chosen}")
        constraints[name] = replace(
            given,
            compute_kernels=[_CACHED],
            cache_params=replace(
                cache,
                algorithm=CacheAlgorithm.LRU,
                load_factor=chosen,
                reserved_memory=reserved_memory if cache.reserved_memory is None else cache.reserved_memory,
                stats=statistics,
            ),
        )
    return constraints
