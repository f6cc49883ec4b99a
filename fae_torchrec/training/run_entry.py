"""One run as the report has it: what training gave, the audit per sample, and the fast memory of its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

from fae_torchrec.core.tables import TableSet
from fae_torchrec.distributed.fast_memory import fast_memory_bytes, shard_rows
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.training.audit import KindAudit
from fae_torchrec.training.progress import TrainResult


def run_entry(name: str, ranks: int, fast_memory: Mapping[str, int], result: TrainResult, kinds: Mapping[str, KindAudit]) -> dict[str, Any]:
    """One entry of the report's `runs`.

    Args:
        name: the placement; "stock" has no hot rows.
        ranks: that trained.
        fast_memory: as `planned_fast_memory` gives it.
        result: what training gave.
        kinds: the audit; a run's kind that it lacks is taken as its like.
    """
    samples = sum(result.samples_by_kind.values())
    hot_cold = name != "stock"

    def per_sample(quantity: str) -> float:
        """The audit's quantity per sample, kinds weighted as the run had them."""
        total = 0.0
        for kind, count in result.samples_by_kind.items():
            alike = _audits_of(kind, kinds)
            total += count * sum(getattr(each, quantity) for each in alike) / sum(each.samples for each in alike)
        return total / samples

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
    """Bytes of embeddings that a plan keeps in fast memory, on the rank that has most; caches of a cold tier are not in it.

    Args:
        plan: of the whole model, stock's or ours.
        tables: of the model.
        device_type: "cpu", where only a hot tier counts (stock's tables and ours lie in the same memory), or "cuda".
        ranks: of the plan.

    Returns:
        By purpose: "hot rows" (weights and optimizer state), "index" (from id to slot), "stock tables" (whole in device memory), and
        "staging" (for cold rows at their batch's turn) where there is such an area.
    """
    return max((_of_rank(plan, tables, device_type, rank) for rank in range(ranks)), key=lambda parts: sum(parts.values()))


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
    return parts


def _audits_of(kind: str, kinds: Mapping[str, KindAudit]) -> list[KindAudit]:
    """The kind's audit; where the audited batches had none of it, that of the other kind that uses both tiers; else all."""
    other = {"cold": "mixed", "mixed": "cold"}.get(kind, kind)
    return next(([kinds[name]] for name in (kind, other) if name in kinds), list(kinds.values()))
