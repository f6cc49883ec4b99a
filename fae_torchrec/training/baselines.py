"""The stock placements that `fae compare` trains beside FAE: where TorchRec's own planner puts the tables, and which pipeline trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheAlgorithm, CacheParams, EmbeddingModuleShardingPlan, ShardingPlan, ShardingType

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.batches import BatchSource
from fae_torchrec.distributed.constraints import CACHE_SLOT_BYTES, MOST_CACHED

# The stock planner may choose what does the same arithmetic as the unsharded table. Not data parallel: TorchRec 1.8 then trains the table
# with the dense optimizer instead of its fused one. Not column-wise: a row-wise optimizer then keeps a state per column shard.
SAME_ARITHMETIC = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
_CACHING = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
_TORCHREC_LOAD_FACTOR = 0.2  # where CacheParams names none


@dataclass(frozen=True)
class StockBaseline:
    """A placement of TorchRec alone.

    Attributes:
        name: as `compare.placements` has it.
        device: where it exists, "cpu" or "cuda"; None for both.
        kernel: the one compute kernel of all tables; None lets the planner choose.
        prefetches: whether TorchRec's PrefetchTrainPipelineSparseDist trains.
        meaning: in words.
    """

    name: str
    device: str | None
    kernel: str | None
    prefetches: bool
    meaning: str

    @property
    def caches(self) -> bool:
        """Whether rows are cached in fast memory."""
        return bool(self.kernel == _CACHING)


_FUSED = EmbeddingComputeKernel.FUSED.value
BASELINES: Mapping[str, StockBaseline] = {
    baseline.name: baseline
    for baseline in (
        StockBaseline("stock", None, None, False, "what TorchRec's planner chooses"),
        StockBaseline("stock-hbm", "cuda", _FUSED, False, "all tables in the GPUs' memory"),
        StockBaseline("stock-uvm", "cuda", EmbeddingComputeKernel.FUSED_UVM.value, False, "all tables in host memory that the GPUs read"),
        StockBaseline("stock-uvm-caching", "cuda", _CACHING, False, "as stock-uvm, behind a cache in the GPUs' memory"),
        StockBaseline("stock-prefetch", "cuda", _CACHING, True, "as stock-uvm-caching, rows brought into the cache a batch ahead"),
        StockBaseline("stock-host", "cpu", _FUSED, False, "all tables on the host, looked up by its CPU"),
    )
}


def stock_baseline(name: str, device_type: str) -> StockBaseline | None:
    """The stock placement of that name; None for one with hot rows.

    Args:
        name: of a placement.
        device_type: "cpu" or "cuda".

    Raises:
        ConfigError: there is no such placement on the device.
    """
    baseline = BASELINES.get(name)
    if baseline is not None and baseline.device not in (None, device_type):
        here = [other for other, each in BASELINES.items() if each.device in (None, device_type)]
        why = (
            "device memory and UVM are a GPU's: set train.device: cuda"
            if device_type == "cpu"
            else "TorchRec has no kernel that looks tables up on the host of a GPU (benchmarks/gpu.py measures one that was made by hand)"
        )
        raise ConfigError(
            f"compare.placements: received {name!r} with train.device {device_type!r}; {why}, or take of the stock placements on a "
            f"{device_type} {here}"
        )
    return baseline


def stock_planner(
    tables: TableSet, topology: Topology, batch_size: int, baseline: StockBaseline | None = None, cache_bytes: int | None = None
) -> EmbeddingShardingPlanner:
    """TorchRec's planner, bound to what keeps the tables' arithmetic and to what the baseline is.

    Args:
        tables: of the model.
        topology: the ranks.
        batch_size: per rank.
        baseline: None lets the planner choose.
        cache_bytes: fast memory per rank for cached rows with FBGEMM's bookkeeping of them; None leaves TorchRec's default, a fifth of all
            rows.
    """
    kernels = None if baseline is None or baseline.kernel is None else [baseline.kernel]
    cache = None
    if baseline is not None and baseline.caches:
        whole = sum(table.rows * (table.weight_bytes + CACHE_SLOT_BYTES) for table in tables)
        load_factor = None if cache_bytes is None else min(MOST_CACHED, cache_bytes * topology.world_size / whole)
        cache = CacheParams(CacheAlgorithm.LRU, load_factor=load_factor, prefetch_pipeline=baseline.prefetches)
    constraints = {
        name: ParameterConstraints(sharding_types=list(SAME_ARITHMETIC), compute_kernels=kernels, cache_params=cache)
        for name in tables.names
    }
    return EmbeddingShardingPlanner(topology=topology, batch_size=batch_size, constraints=constraints)


@dataclass(frozen=True)
class PlannedCache:
    """How the rows of one table are cached.

    Attributes:
        table: its name.
        rows: of the table.
        load_factor: share of the rows that the cache holds.
        prefetch_pipeline: what its CacheParams say of the pipeline.
        lfu: whether the least frequently used rows leave first, rather than the least recently used ones.
    """

    table: str
    rows: int
    load_factor: float
    prefetch_pipeline: bool
    lfu: bool = False


def planned_caches(plan: ShardingPlan, tables: TableSet) -> list[PlannedCache]:
    """The caches of a plan's tables, stock's or anybody's."""
    caches = []
    for collection in plan.plan.values():
        assert isinstance(collection, EmbeddingModuleShardingPlan)
        for name, sharding in collection.items():
            if sharding.compute_kernel == _CACHING:
                params = sharding.cache_params or CacheParams()
                caches.append(
                    PlannedCache(
                        name,
                        tables[name].rows,
                        _TORCHREC_LOAD_FACTOR if params.load_factor is None else params.load_factor,
                        bool(params.prefetch_pipeline),
                        params.algorithm is CacheAlgorithm.LFU,
                    )
                )
    return caches


def cache_warnings(name: str, caches: Sequence[PlannedCache], *, prefetches: bool, rows_of_two_batches: Mapping[str, int]) -> list[str]:
    """What is wrong with how a baseline caches its rows, so that a comparison with it would flatter the other side.

    Args:
        name: of the baseline.
        caches: of its plan.
        prefetches: whether its pipeline brings rows into the caches ahead (PrefetchTrainPipelineSparseDist).
        rows_of_two_batches: table -> distinct rows of two batches in a row, over all ranks.

    Returns:
        A sentence for each, with its remedy.
    """
    if not caches:
        return [f"{name}: the pipeline prefetches, but no table is cached; use TrainPipelineSparseDist"] if prefetches else []
    unmarked, marked = (sorted(c.table for c in caches if c.prefetch_pipeline is flag) for flag in (False, True))
    warnings = []
    if prefetches and unmarked:
        warnings.append(
            f"{name}: the pipeline prefetches, but the cache of {_listed(unmarked)} is not told so; FBGEMM may then evict rows between "
            "their prefetch and their use: set CacheParams(prefetch_pipeline=True)"
        )
    if not prefetches and marked:
        warnings.append(
            f"{name}: CacheParams(prefetch_pipeline=True) of {_listed(marked)} without a pipeline that prefetches; rows are locked and "
            "looked up twice for nothing: use PrefetchTrainPipelineSparseDist, or leave prefetch_pipeline out"
        )
    frequent = sorted(cache.table for cache in caches if cache.lfu)
    if prefetches and frequent:
        warnings.append(f"{name}: the cache of {_listed(frequent)} is LFU, which FBGEMM cannot prefetch into: use CacheAlgorithm.LRU")
    slots = sum(min(round(cache.rows * cache.load_factor), cache.rows) for cache in caches)
    needed = sum(rows_of_two_batches.get(cache.table, 0) for cache in caches)
    if prefetches and slots < needed:
        warnings.append(
            f"{name}: a prefetch cache of {slots:,} rows is smaller than the {needed:,} distinct rows of two batches; it is then slower "
            f"than plain UVM: give it a load factor of at least {needed / sum(cache.rows for cache in caches):.2g} (compare.cache), or "
            "take smaller batches"
        )
    return warnings


def rows_of_two_batches(source: BatchSource, tables: TableSet, global_batch_size: int, *, pairs: int = 2) -> dict[str, int]:
    """Table -> distinct rows that two steps in a row look up, over all ranks: the most over the first pairs of steps.

    Args:
        source: the train data.
        tables: of the model.
        global_batch_size: samples of a step.
        pairs: how many are looked at.
    """
    most = dict.fromkeys(tables.names, 0)
    batches = islice(source.batches(global_batch_size), 2 * pairs)
    for first, second in zip(batches, batches, strict=False):
        seen = [batch.sparse_features.to_dict() for batch in (first, second)]
        for table in tables:
            ids = [features[name].values().cpu().numpy() for features in seen for name in table.feature_names]
            most[table.name] = max(most[table.name], np.unique(np.concatenate(ids)).size)
    return most


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
