"""What the stock planner may choose for each tier: the one table of (tier, device) -> sharding types and kernels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType
from torchrec.distributed.types import CacheAlgorithm, CacheParams, ShardingType

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind
from fae_torchrec.distributed.input_error import input_error


@dataclass(frozen=True)
class TierOptions:
    """Stock sharding types and compute kernels of one tier on one device.

    Attributes:
        sharding_types: allowed ones.
        kernels: allowed ones.
        on_host: whether the kernels run on the CPU, whatever the device.
        staged: whether cold rows can be brought beside the hot ones for a step (`Staging`).
    """

    sharding_types: tuple[str, ...]
    kernels: tuple[str, ...]
    on_host: bool = False
    staged: bool = False


_FUSED = (EmbeddingComputeKernel.FUSED.value,)
_BY_TABLE = (ShardingType.TABLE_WISE.value,)
# Not column-wise: a column shard keeps a row-wise optimizer state of its own, and a hot row has one for all its columns.
_BY_ROW = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
COLD_TIERS: Mapping[tuple[str, str], TierOptions] = {
    ("host", "cpu"): TierOptions(_BY_TABLE, _FUSED, on_host=True, staged=True),
    ("host", "cuda"): TierOptions(_BY_TABLE, _FUSED, on_host=True),
    ("uvm", "cuda"): TierOptions(_BY_ROW, (EmbeddingComputeKernel.FUSED_UVM.value,), staged=True),
    ("uvm_caching", "cuda"): TierOptions(_BY_ROW, (EmbeddingComputeKernel.FUSED_UVM_CACHING.value,)),
}
CACHE_SLOT_BYTES = 20
"""FBGEMM 1.6 to 1.8: the index of a cached row and its time (int64 each), and its lock (int32)."""
MOST_CACHED = 0.999
"""TorchRec 1.8 refuses a plan with a cache load factor that is not below 1."""
# Replicated rows are on every rank; what stands there is for the homes of all-hot tables. TorchRec shards no pooled table by row on a CPU.
HOT_TIERS: Mapping[tuple[str, str], TierOptions] = {
    ("replicated", "cpu"): TierOptions(_BY_TABLE, _FUSED),
    ("replicated", "cuda"): TierOptions(_BY_TABLE, _FUSED),
    ("table_wise", "cpu"): TierOptions(_BY_TABLE, _FUSED),
    ("table_wise", "cuda"): TierOptions(_BY_TABLE, _FUSED),
    ("row_wise", "cuda"): TierOptions((ShardingType.ROW_WISE.value,), _FUSED),
}


def cold_options(cold_tier: str, device_type: str, world_size: int) -> TierOptions:
    """What a cold tier may be on a device.

    Args:
        cold_tier: "host", "uvm", "uvm_caching", or "auto": on a CPU the host, on one CUDA device UVM (whose cold rows are staged, which
            measured faster than a cache: docs/gpu.md), on several UVM caching.
        device_type: "cpu" or "cuda".
        world_size: ranks.

    Raises:
        PlannerError: the tier does not exist on the device.
    """
    default = {"cpu": "host", "cuda": "uvm" if world_size == 1 else "uvm_caching"}
    tier = default.get(device_type, "") if cold_tier == "auto" else cold_tier
    if (tier, device_type) not in COLD_TIERS:
        raise _no_such_tier("cold", cold_tier, device_type, COLD_TIERS, " or 'auto'")
    return COLD_TIERS[tier, device_type]


def hot_options(hot_tier: str, device_type: str) -> TierOptions:
    """What a hot tier may be on a device.

    Args:
        hot_tier: "replicated", "table_wise" or "row_wise".
        device_type: "cpu" or "cuda".

    Raises:
        PlannerError: the tier does not exist on the device.
    """
    if (hot_tier, device_type) not in HOT_TIERS:
        raise _no_such_tier("hot", hot_tier, device_type, HOT_TIERS)
    return HOT_TIERS[hot_tier, device_type]


def cold_cache(placement: RowPlacement, options: TierOptions, cache_bytes: int | None, world_size: int) -> CacheParams | None:
    """How the rows of a cold tier behind UVM caching are cached: LRU, prefetched into by the pipeline.

    Args:
        placement: where the rows live.
        options: what the cold tier may be.
        cache_bytes: fast memory per rank for cached rows with FBGEMM's 20 bytes of bookkeeping each; None leaves TorchRec's default, a
            fifth of all rows.
        world_size: ranks that share the tables.

    Returns:
        What tables get whose constraints say nothing; None where nothing is cached.

    Raises:
        PlannerError: bytes are given that are out of range, or of which this cold tier can make no use.
    """
    if cache_bytes is not None and cache_bytes < (0 if options.staged else 1):
        least = "at least 0 (0: nothing is staged)" if options.staged else "above 0"
        raise input_error(f"cold_cache_bytes must be {least}, received {cache_bytes}; leave it out for the cold tier's default")
    if options.kernels != (EmbeddingComputeKernel.FUSED_UVM_CACHING.value,):
        if cache_bytes and not (options.staged and world_size == 1):
            raise input_error(
                f"cold_cache_bytes={cache_bytes}: this cold tier brings no rows to fast memory on {world_size} ranks; use "
                "cold_tier='uvm_caching' (or, with one rank on CUDA, 'uvm'), or give none"
            )
        return None
    load_factor = None
    if cache_bytes is not None:
        cold = [table for table in placement.tables if placement.kind(table.name) is not TableKind.HOT]
        whole = sum(table.rows * (table.weight_bytes + CACHE_SLOT_BYTES) for table in cold)
        load_factor = min(MOST_CACHED, cache_bytes * world_size / whole) if whole else None
    return CacheParams(algorithm=CacheAlgorithm.LRU, load_factor=load_factor, prefetch_pipeline=True)


def cold_constraints(
    placement: RowPlacement,
    options: TierOptions,
    given: Mapping[str, ParameterConstraints] | None = None,
    cache: CacheParams | None = None,
    preferred: tuple[str, ...] = (),
) -> dict[str, ParameterConstraints]:
    """Constraints under which the stock planner plans the cold tier.

    Args:
        placement: where the rows live.
        options: what the cold tier may be.
        given: the user's own constraints by table; their sharding types and kernels are kept where the tier allows them, and those of
            tables that the placement does not know as they are.
        cache: how tables are cached whose constraints do not say (`cold_cache`).
        preferred: sharding types that tables get whose constraints do not say; of those that the tier may be.

    Raises:
        PlannerError: the given constraints leave a table nothing to choose.
    """
    constraints = dict(given or {})
    for table in placement.tables:
        if placement.kind(table.name) is TableKind.HOT:
            continue
        constraint = copy.deepcopy(constraints.get(table.name, ParameterConstraints()))
        types = constraint.sharding_types or list(preferred)
        constraint.sharding_types = _allowed(table.name, "sharding types", types, options.sharding_types)
        constraint.compute_kernels = _allowed(table.name, "compute kernels", constraint.compute_kernels, options.kernels)
        constraint.cache_params = constraint.cache_params or cache
        constraints[table.name] = constraint
    return constraints


def hot_constraints(
    placement: RowPlacement, options: TierOptions, given: Mapping[str, ParameterConstraints] | None = None
) -> dict[str, ParameterConstraints]:
    """Constraints under which the stock planner plans sharded hot rows: the tier's own choice, with the user's word on the features.

    Args:
        placement: where the rows live.
        options: what the hot tier may be.
        given: the user's own constraints by table; what they say of sharding types, kernels and caches is the cold tier's.
    """
    return {
        table.name: replace(
            copy.deepcopy((given or {}).get(table.name, ParameterConstraints())),
            sharding_types=list(options.sharding_types),
            compute_kernels=list(options.kernels),
            cache_params=None,
            min_partition=None,
        )
        for table in placement.tables
        if placement.hot_rows(table.name)
    }


def _no_such_tier(
    what: str, tier: str, device_type: str, tiers: Mapping[tuple[str, str], TierOptions], otherwise: str = ""
) -> PlannerError:
    allowed = [f"{name} on {device}" for name, device in tiers]
    return input_error(f"there is no {what} tier {tier!r} on device {device_type!r}; choose one of {allowed}{otherwise}")


def _allowed(table: str, what: str, given: list[str] | None, offered: tuple[str, ...]) -> list[str]:
    both = [value for value in offered if not given or value in given]
    if not both:
        raise PlannerError(
            f"table {table!r}: constraints allow the {what} {given}, its cold tier offers {list(offered)}; add one of these, or leave the "
            "table to stock sharding (stock_tables)",
            PlannerErrorType.STRICT_CONSTRAINTS,
        )
    return both
