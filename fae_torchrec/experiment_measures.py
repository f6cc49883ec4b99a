"""What a run is measured by beside its training: memory of every tier, and for a comparison the work that was done and all test scores."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from fae_torchrec.config import RunConfig
from fae_torchrec.core.tables import TableSet
from fae_torchrec.distributed.tier_memory import tier_memory
from fae_torchrec.experiment_data import ExperimentData
from fae_torchrec.training.metrics import Scores, evaluate
from fae_torchrec.training.peak_memory import PeakMemory
from fae_torchrec.training.run_entry import planned_cold_memory, planned_fast_memory
from fae_torchrec.training.trainer import Trainer
from fae_torchrec.training.work import learning_rates, sharding_types

_FAST, _COLD = ("hot rows", "index"), ("cold tier", "stock tables")  # of `tier_memory`, on a CPU


def start_logloss(
    config: RunConfig, data: ExperimentData, model: DistributedModelParallel, device: torch.device, group: dist.ProcessGroup
) -> float:
    """The log loss of the untrained model on the first test batch of every rank. Collective."""
    batches = data.test.batches(config.train.eval_batch_size, rank=group.rank(), world_size=group.size())
    return evaluate(model, islice(batches, 1), device, group).logloss


def work_entry(
    config: RunConfig,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    trainer: Trainer,
    scores: Scores,
    start: dict[str, Any],
    device: torch.device,
    group: dist.ProcessGroup,
) -> dict[str, Any]:
    """The work of a finished run, as `fae_torchrec.training.work.unequal_work` compares it. Collective.

    Args:
        config: the experiment.
        model: trained.
        optimizer: of the model.
        trainer: that trained it.
        scores: after training.
        start: "start_weights" and "start_logloss".
        device: where it was trained.
        group: the ranks.
    """
    train = config.train
    return {
        "ranks": group.size(),
        "batch_size": train.batch_size,
        "epochs": train.epochs,
        "drop_last": config.loader.drop_last,
        "whole_epochs": train.steps is None or trainer.steps < train.steps,
        "steps": trainer.steps,
        **trainer.trained.of_ranks(group, device),
        "test_samples": scores.samples,
        **start,
        "optimizer": f"{train.optimizer.value} {train.learning_rate:g}, dense {train.dense_learning_rate:g}",
        "learning_rates": learning_rates(optimizer),
        "sharding_types": sharding_types(model.plan),
    }


def write_scores(path: str | Path, scores: Scores) -> None:
    """Keeps all test scores of a run: .npz with float32 "logits" and uint8 "labels", [samples]."""
    assert scores.outputs is not None
    logits, labels = (values.cpu().numpy() for values in scores.outputs)
    np.savez(path, logits=logits.astype(np.float32), labels=labels.astype(np.uint8))


def memory_entry(
    model: DistributedModelParallel, tables: TableSet, peak: PeakMemory, device: torch.device, group: dist.ProcessGroup
) -> dict[str, Any]:
    """The memory of a run as its entry has it. Collective.

    Args:
        model: sharded.
        tables: of the model.
        peak: made before training.
        device: where it trains.
        group: the ranks.

    Returns:
        "fast_memory" and "cold_memory" (planned, by purpose) with their sums "..._bytes", "memory" (everything, rank by rank), and the most
        of any rank: "host_peak_bytes", "device_peak_bytes" (None without a GPU), "fast_memory_allocated_bytes" and
        "cold_memory_allocated_bytes" (None on a GPU, where tables of both tiers are the device's to FBGEMM).
    """
    allocated: list[Any] = [None] * group.size()
    dist.all_gather_object(allocated, tier_memory(model), group=group)
    peaks = peak.of_ranks(group)
    fast = planned_fast_memory(model.plan, tables, device.type, group.size())
    cold = planned_cold_memory(model.plan, tables, device.type, group.size())

    def most(purposes: tuple[str, ...]) -> int | None:
        return None if device.type == "cuda" else max(sum(parts[purpose] for purpose in purposes) for parts in allocated)

    return {
        "fast_memory": fast,
        "fast_memory_bytes": sum(fast.values()),
        "fast_memory_allocated_bytes": most(_FAST),
        "cold_memory": cold,
        "cold_memory_bytes": sum(cold.values()),
        "cold_memory_allocated_bytes": most(_COLD),
        "host_peak_bytes": max(peaks["host_bytes"]),
        "device_peak_bytes": None if peaks["device_bytes"] is None else max(peaks["device_bytes"]),
        "memory": {"allocated": allocated, **peaks},
    }
