"""One run as the report has it: what training gave, the audit per sample, and the fast memory of its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

from fae_torchrec.core.tables import TableKind, TableSet
from fae_torchrec.distributed.constraints import CACHE_SLOT_BYTES
from fae_torchrec.distributed.fast_memory import fast_memory_bytes, shard_rows
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.training.audit import KindAudit
from fae_torchrec.training.baselines import BASELINES, planned_caches
from fae_torchrec.training.progress import TrainResult


def run_entry(name: str, ranks: int, fast_memory: Mapping[str, int], result: TrainResult, kinds: Mapping[str, KindAudit]) -> dict[str, Any]:
    """One entry of the report's `runs`.

    Args:
        name: the placement; TorchRec's own (`BASELINES`) have no hot rows.
        ranks: that trained.
        fast_memory: as `planned_fast_memory` gives it.
        result: what training gave.
        kinds: the audit; a run's kind that it lacks is taken as its like.
    """
    samples = sum(result.samples_by_kind.values())
    hot_cold = name not in BASELINES

    def per_sample(quantity: str) -> float:
        """The audit's quantity per sample, kinds weighted as the run had them."""
        total = 0.0
        for kind, count in result.samples_by_kind.items():
            alike = _audits_of(kind, kinds)
            total += count * sum(_quantity(each, quantity) for each in alike) / sum(each.samples for each in alike)
        return total / samples

    lookups, cached = per_sample("lookups"), per_sample("cached_rows")
    collectives = sorted({name for sums in kinds.values() for name in sums.crossed_by_collective})
    return {
        "placement": name,
        "ranks": ranks,
        "samples_per_s": result.samples_per_s,
        "samples_per_s_spread": list(result.samples_per_s_spread),
        "hot_inputs": per_sample("hot_samples") if hot_cold else None,
        "hot_batches": result.steps_by_kind.get("hot", 0) / sum(result.steps_by_kind.values()) if hot_cold else None,
        "fast_memory_bytes": sum(fast_memory.values()),
        "fast_memory": dict(fast_memory),
        "bytes_crossed_per_sample": per_sample("crossed_bytes"),
        "bytes_crossed_by_collective": {name: per_sample(name) for name in collectives},
        "lookups_per_sample": lookups,
        "cache_hits": per_sample("cache_hits") / cached if cached else None,
        "hot_lookups": 1 - per_sample("cold_rows") / lookups if hot_cold and lookups else None,
        "cold_rows_per_sample": per_sample("cold_rows"),
        "cold_bytes_per_sample": per_sample("cold_bytes"),
        "train_loss": result.train_loss,
        "test_auc": result.test.auc,
        "test_logloss": result.test.logloss,
        "test_accuracy": result.test.accuracy,
        "steps": sum(result.steps_by_kind.values()),
        "steps_by_kind": result.steps_by_kind,
        "samples": samples,
        "samples_by_kind": result.samples_by_kind,
        "wall_s": result.wall_s,
        "swap_losses": result.swap_losses,
        "breakdown": {
            kind: {part: getattr(sums, f"{part}_ms") / sums.steps for part in ("input_dist", "forward", "backward", "optimizer")}
            for kind, sums in kinds.items()
        },
        "audit": {kind: asdict(sums) for kind, sums in kinds.items()},
        "loss_curve": [list(point) for point in result.loss_curve],
    }


def planned_fast_memory(plan: ShardingPlan, tables: TableSet, device_type: str, ranks: int) -> dict[str, int]:
    """Bytes of embeddings that a plan keeps in fast memory, on the rank that has most.

    Args:
        plan: of the whole model, stock's or ours.
        tables: of the model.
        device_type: "cpu", where only a hot tier counts (stock's tables and ours lie in the same memory), or "cuda".
        ranks: of the plan.

    Returns:
        By purpose: "hot rows" (weights and optimizer state), "index" (from id to slot), "stock tables" (whole in device memory), and, where
        there is one, "staging" (for cold rows at their batch's turn) and "cache" (of UVM caching, FBGEMM's bookkeeping in it).
    """
    return max((_of_rank(plan, tables, device_type, rank) for rank in range(ranks)), key=lambda parts: sum(parts.values()))


def planned_cold_memory(plan: ShardingPlan, tables: TableSet, device_type: str, ranks: int) -> dict[str, int]:
    """Bytes of embeddings that a plan keeps outside fast memory, on the rank that has most.

    Args:
        plan: of the whole model, stock's or ours.
        tables: of the model.
        device_type: "cpu", where all but the hot tier is such memory, or "cuda".
        ranks: of the plan.

    Returns:
        By purpose: "cold tier" (whole tables: hot rows have a home there too) and "stock tables". All-hot tables take none.
    """
    return max((_cold_of_rank(plan, tables, device_type, rank) for rank in range(ranks)), key=lambda parts: sum(parts.values()))


def _cold_of_rank(plan: ShardingPlan, tables: TableSet, device_type: str, rank: int) -> dict[str, int]:
    parts = {"cold tier": 0, "stock tables": 0}
    for collection in plan.plan.values():
        assert isinstance(collection, EmbeddingModuleShardingPlan)
        placement = collection.placement if isinstance(collection, FAEModuleShardingPlan) else None
        placed = () if placement is None else placement.tables.names
        for name, sharding in collection.items():
            held = shard_rows(sharding, rank) * tables[name].row_bytes
            if name in placed:
                assert placement is not None
                parts["cold tier"] += held if placement.kind(name) is not TableKind.HOT else 0
            elif device_type == "cpu" or sharding.compute_kernel != EmbeddingComputeKernel.FUSED.value:
                parts["stock tables"] += held
    return parts


def _of_rank(plan: ShardingPlan, tables: TableSet, device_type: str, rank: int) -> dict[str, int]:
    parts = {"hot rows": 0, "index": 0, "stock tables": 0}
    for collection in plan.plan.values():
        assert isinstance(collection, EmbeddingModuleShardingPlan)
        placed: list[str] = []
        if isinstance(collection, FAEModuleShardingPlan):
            placed = [name for name in collection if name in collection.placement.tables.names]
            of_hot_tier = fast_memory_bytes(
                collection.placement, [[tables[name] for name in placed]], collection.hot, rank, device_type=device_type
            )
            parts.update({purpose: parts[purpose] + count for purpose, count in of_hot_tier.items()})
            if collection.staging_rows:
                row_bytes = max(tables[name].row_bytes for name in placed)
                parts["staging"] = parts.get("staging", 0) + 2 * collection.staging_rows * row_bytes
        if device_type == "cuda":
            parts["stock tables"] += sum(
                shard_rows(sharding, rank) * tables[name].row_bytes
                for name, sharding in collection.items()
                if name not in placed and sharding.compute_kernel == EmbeddingComputeKernel.FUSED.value
            )
    cached = _cached_bytes(plan, tables, rank) if device_type == "cuda" else 0
    return {**parts, "cache": cached} if cached else parts


def _cached_bytes(plan: ShardingPlan, tables: TableSet, rank: int) -> int:
    """Bytes of the caches that UVM caching keeps in device memory."""
    factors = {cache.table: cache.load_factor for cache in planned_caches(plan, tables)}
    shardings = [item for collection in plan.plan.values() for item in collection.items()]
    return sum(
        round(factors[name] * shard_rows(sharding, rank)) * (tables[name].weight_bytes + CACHE_SLOT_BYTES)
        for name, sharding in shardings
        if name in factors
    )


def _quantity(audited: KindAudit, name: str) -> float:
    """A sum of the audit, or the bytes of the collective of that name."""
    return float(getattr(audited, name) if hasattr(audited, name) else audited.crossed_by_collective.get(name, 0.0))


def _audits_of(kind: str, kinds: Mapping[str, KindAudit]) -> list[KindAudit]:
    """The kind's audit; where the audited batches had none of it, that of the other kind that uses both tiers; else all."""
    other = {"cold": "mixed", "mixed": "cold"}.get(kind, kind)
    return next(([kinds[name]] for name in (kind, other) if name in kinds), list(kinds.values()))
